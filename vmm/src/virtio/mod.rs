//! virtio devices and their PCI transport.

pub mod device;
