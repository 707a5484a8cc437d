//! The per-node agent: owns the guests of a node and runs the engines, handover and host update.
//! It stands alone on a directory of manifests; what it takes specs from and reports to is behind traits.
#![forbid(unsafe_code)]

mod actions;
pub mod agent;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod credentials;
pub mod durable;
pub mod effects;
pub mod guest_agent;
pub mod guests;
pub mod halt;
pub mod handover;
pub mod host;
pub mod host_effects;
pub mod host_object;
pub mod host_update;
pub mod host_updates;
pub mod host_work;
pub mod isolation;
pub mod logs;
pub mod moment;
pub mod network;
pub mod node;
pub mod operations;
pub mod pod;
pub mod power;
pub mod records;
pub mod reporter;
pub mod sessions;
pub mod store;
#[cfg(test)]
mod testing;
pub mod vmm;
