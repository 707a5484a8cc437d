//! The per-node agent: owns the guests of a node and runs the handover engine. It stands alone on a
//! directory of manifests; what it takes specs from and reports to is behind traits.
#![forbid(unsafe_code)]

pub mod config;
pub mod durable;
pub mod guest_agent;
pub mod handover;
pub mod isolation;
pub mod network;
pub mod store;
pub mod vmm;
