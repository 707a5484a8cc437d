//! virtio devices and their PCI transport.

pub mod device;
pub mod rng;
