//! The virtual machine monitor: one process per guest, on `/dev/kvm` through rust-vmm crates.

pub mod block;
pub mod boot;
pub mod check;
pub mod control;
pub mod gate;
pub mod laps;
pub mod layout;
pub mod legacy;
pub mod machine;
pub mod memory_restore;
pub mod net;
pub mod pci;
pub mod persist;
pub mod process;
pub mod seccomp;
pub mod supervisor;
pub mod virtio;
pub mod vsock;
