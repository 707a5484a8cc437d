//! Checkpoints: saved sessions of guests, as directories of sealed files.
//!
//! A checkpoint is written by a [`Writer`] in rounds, while the guest runs, and becomes one when
//! [`Writer::finish`] gives its manifest its name, after everything is durable. A [`Reader`] verifies
//! manifest, index and state before it hands out anything, and each chunk of memory when it is read. What is
//! wrong with a checkpoint is a [`RefusedCheckpoint`]; what is wrong with saving one, a [`SaveError`].
//!
//! The format, field by field, is in `docs/checkpoint.md`. This crate knows no KVM and no guest: memory is
//! chunks of bytes, the state of vCPUs and devices is bytes.
#![forbid(unsafe_code)]

mod buffer;
mod files;
mod flusher;
mod index;
mod lane;
mod manifest;
mod reader;
mod refused;
mod seal;
mod writer;

#[cfg(test)]
mod crash_test;
#[cfg(test)]
mod damage_test;
#[cfg(test)]
mod round_trip_test;
#[cfg(test)]
mod sim;

pub use buffer::ChunkBuffer;
pub use files::free_bytes;
pub use lane::{Lane, Written};
pub use manifest::{Description, FORMAT, Identity, Manifest, RamRange, SavedDisk, Sealed};
pub use reader::{ChunkError, Reader};
pub use refused::RefusedCheckpoint;
pub use seal::{Key, KeyError};
pub use writer::{Progress, Report, SaveError, Saved, Writer};

/// Size of a chunk of memory, in bytes.
pub const CHUNK: usize = 64 << 10;

/// Most guest RAM that a checkpoint holds, in bytes: bounds what a reader allocates for the index.
pub const MAX_MEMORY: u64 = 4 << 40;

/// Longest state of vCPUs and devices, in bytes.
pub const MAX_STATE: u64 = 64 << 20;

/// Bytes that a checkpoint of `memory_bytes` of guest RAM and `state_bytes` of state takes at most: what
/// must be free before a save begins is this, or less where memory is known to be zero.
pub fn most_bytes(memory_bytes: u64, state_bytes: u64) -> u64 {
    /// The manifest, tags of index, changes and state, and rounding of each file to the file system's blocks.
    const REST: u64 = 2 << 20;
    let index = memory_bytes.div_ceil(CHUNK as u64) * index::ENTRY as u64;
    let changes = memory_bytes.div_ceil(CHUNK as u64) * index::CHANGE as u64;
    memory_bytes + index + changes + state_bytes + state_bytes / 1024 + REST
}
