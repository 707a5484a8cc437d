//! The virtual machine monitor: one process per guest, on `/dev/kvm` through rust-vmm crates.

pub mod block;
pub mod gate;
pub mod net;
pub mod virtio;
pub mod vsock;
