//! virtio devices and their PCI transport.

pub mod buffers;
pub mod device;
pub mod ring;
pub mod rng;
pub mod transport;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;
