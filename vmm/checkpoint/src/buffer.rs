//! Memory that direct I/O accepts.

use std::ops::{Deref, DerefMut};

use crate::CHUNK;

/// What direct I/O wants of addresses, offsets and lengths at most (a page).
const ALIGNMENT: usize = 4096;

/// A buffer of whole chunks, aligned for direct I/O.
pub struct ChunkBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl ChunkBuffer {
    /// A buffer of `chunks` chunks, zeroed.
    pub fn new(chunks: usize) -> ChunkBuffer {
        let length = chunks * CHUNK;
        let bytes = vec![0; length + ALIGNMENT];
        // The vector is never grown, so that its address stays what it is.
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        ChunkBuffer { bytes, start, length }
    }

    /// How many chunks fit.
    pub fn chunks(&self) -> usize {
        self.length / CHUNK
    }
}

impl Deref for ChunkBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for ChunkBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Whether all of `bytes` are zero. Most chunks are not, and say so in their first bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Blocks without a branch inside are compared by vector instructions.
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zeroed() {
        for chunks in [0, 1, 16] {
            let buffer = ChunkBuffer::new(chunks);
            assert_eq!(buffer.as_ptr().align_offset(ALIGNMENT), 0);
            assert_eq!((buffer.len(), buffer.chunks()), (chunks * CHUNK, chunks));
            assert!(is_zero(&buffer));
        }
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 4096];
        for at in [0, 1, 255, 256, 4095] {
            bytes[at] = 0x10;
            assert!(!is_zero(&bytes));
            bytes[at] = 0;
        }
        assert!(is_zero(&bytes));
    }
}
