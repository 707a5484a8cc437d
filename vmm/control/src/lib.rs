//! Control API of the VMM: what its process is told at start ([`config`]), what it is asked while it
//! runs ([`api`]), the fence on disk that both sides read ([`owner`]), and a blocking [`client`].
//!
//! This crate is the only thing of the VMM that the node agent knows. It holds types and no mechanism;
//! it knows nothing of Kubernetes.
#![forbid(unsafe_code)]

pub mod api;
pub mod client;
pub mod config;
pub mod owner;
pub mod session;

/// Version of the control API and of [`config::VmConfig`]. A VMM refuses a configuration of a version
/// it does not know; an agent asks `GET /v1/vm` and reads [`api::VmInfo::api_version`] before anything
/// else, so that agents are upgraded while guests run.
pub const API_VERSION: u32 = 1;
