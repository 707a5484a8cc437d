//! End-to-end tests, the node VM harness, the demo and the benches.
#![forbid(unsafe_code)]

pub mod bed;
pub mod bench;
pub mod chart;
pub mod client;
pub mod cluster;
pub mod control_plane;
pub mod counter;
pub mod demo;
pub mod e2e;
pub mod kubelet;
pub mod ledger;
pub mod load;
pub mod machine;
pub mod operator;
pub mod outside;
pub mod pair;
pub mod updates;
