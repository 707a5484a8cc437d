//! The virtio block device, its raw files and its copy-on-write layers.
//!
//! A [`Disk`] is the raw file that the user named with a chain of layers above it; a [`BlockDevice`]
//! shows it to the guest.

mod chain;
mod device;
mod disk;
mod error;
mod layer;
mod map;
mod map_format;
mod merge;
mod persist;
mod request;
mod source;
mod split;
mod storage;

pub use device::BlockDevice;
pub use disk::Disk;
pub use error::DiskError;
pub use source::{SOURCE_VERSION, SourceRecord};

/// Unit of the block device's addresses (virtio 1.2, 5.2).
pub const SECTOR: u64 = 512;

/// Unit of layers: states are kept for blocks of this size.
pub const BLOCK: u64 = 4096;

#[cfg(test)]
mod disk_files_test;
#[cfg(test)]
mod disk_test;
#[cfg(test)]
mod sim;
