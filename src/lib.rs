//! The operator: one leader in a cluster that assigns Guests and SeamlessReboots to nodes, makes the
//! resources that guests and hosts ask for, and rolls HostUpdates out.
//!
//! ```text
//! world/   one watch for each kind, what is known of nodes and agents, what concerns whom
//! <kind>/  a reconciler each: fetch → build (a pure function) → apply
//! write/   the only way to write: fenced by the lease, limited, and not at all where nothing changes
//! ```
//!
//! It talks to agents by way of the API server only; `docs/cluster.md` says who writes what.
#![forbid(unsafe_code)]

pub mod cli;
pub mod controller;
pub mod error;
pub mod guest;
pub mod host;
pub mod host_update;
pub mod invalid;
pub mod lease;
pub mod metrics;
pub mod node_update;
pub mod place;
pub mod run;
pub mod seamless_reboot;
pub mod server;
pub mod world;
pub mod write;
