//! Writing memory: one lane a thread.

use std::io;

use crate::buffer::{ChunkBuffer, is_zero};
use crate::index::Entry;
use crate::seal::{Part, Place};
use crate::writer::{SaveError, Writer};
use crate::{CHUNK, files};

/// What a [`Lane::write`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Chunks that were zero: only noted.
    pub zero: u64,
    /// Chunks that were sealed and written.
    pub data: u64,
}

/// Writes chunks for one thread, through a buffer of its own. Lanes work side by side as long as no two of
/// them write the same chunk at a time.
pub struct Lane<'a> {
    writer: &'a Writer,
    buffer: ChunkBuffer,
}

impl<'a> Lane<'a> {
    /// Most chunks of one [`Lane::write`]: 4 MiB. On a busy host the disk waits for us between two requests,
    /// so that few large ones are faster than many small ones.
    pub const CHUNKS: usize = 64;

    pub(crate) fn new(writer: &'a Writer) -> Lane<'a> {
        Lane {
            writer,
            buffer: ChunkBuffer::new(Lane::CHUNKS),
        }
    }

    /// Writes `count` chunks from number `first` on. `fill` copies a chunk of the guest's memory into a buffer,
    /// once for each: what the guest does to its memory afterwards is not in it. Chunks that are all zero cost
    /// an entry.
    ///
    /// # Errors
    /// When `fill` or the disk fails. Chunks that were not written are what they were before; those whose write
    /// failed are absent. Written again, all is well.
    ///
    /// # Panics
    /// When `count` is over [`Lane::CHUNKS`] or a chunk lies beyond the end of memory.
    pub fn write(
        &mut self,
        first: u64,
        count: usize,
        mut fill: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<Written, SaveError> {
        let writer = self.writer;
        assert!(count <= Lane::CHUNKS && first + count as u64 <= writer.index.chunks());
        let buffer = &mut self.buffer[..count * CHUNK];
        let mut written = Written::default();
        let mut run = Run::default();
        for position in 0..count {
            let chunk = first + position as u64;
            // Copied, looked at and sealed one by one, while it is in the processor's cache.
            let bytes = &mut buffer[position * CHUNK..][..CHUNK];
            fill(chunk, bytes).map_err(|source| SaveError::Fill { chunk, source })?;
            if is_zero(bytes) {
                run.write(writer, first, buffer)?;
                writer.index.set(chunk, Entry::Zero);
                written.zero += 1;
                continue;
            }
            let counter = writer.counters(1)?;
            let place = Place {
                part: Part::Memory,
                number: chunk,
                total: writer.memory_bytes(),
            };
            let tag = writer
                .sealer
                .seal(place, counter, bytes)
                .map_err(|_| SaveError::Sealing { part: files::MEMORY })?;
            run.push(position, Entry::Data { counter, tag });
            written.data += 1;
        }
        run.write(writer, first, buffer)?;
        Ok(written)
    }
}

/// Sealed chunks that follow one another: written by one call.
#[derive(Default)]
struct Run {
    /// Position of the first in the buffer.
    start: usize,
    entries: Vec<Entry>,
}

impl Run {
    fn push(&mut self, position: usize, entry: Entry) {
        if self.entries.is_empty() {
            self.start = position;
        }
        self.entries.push(entry);
    }

    fn write(&mut self, writer: &Writer, first: u64, buffer: &[u8]) -> Result<(), SaveError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let chunk = first + self.start as u64;
        let numbers = chunk..chunk + self.entries.len() as u64;
        // What the file holds of them is neither the old nor the new from here on.
        numbers.clone().for_each(|n| writer.index.set_absent(n));
        let bytes = &buffer[self.start * CHUNK..][..self.entries.len() * CHUNK];
        writer.write_memory(bytes, chunk)?;
        for (n, entry) in numbers.zip(self.entries.drain(..)) {
            writer.index.set(n, entry);
        }
        Ok(())
    }
}
