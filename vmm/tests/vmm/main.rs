//! The VMM's binary against the real `/dev/kvm`, with tiny kernels: what it promises to the guest and to
//! the node agent. Where there is no `/dev/kvm`, each test says that it is skipped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod figures;
mod handover;
mod machine;
mod payload;
mod session;
