//! virtio devices and their PCI transport.

pub mod device;
pub mod rng;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;
