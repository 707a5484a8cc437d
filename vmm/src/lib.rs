//! The virtual machine monitor: one process per guest, on `/dev/kvm` through rust-vmm crates.

pub mod virtio;
