//! The chain of a disk: layers from the top, and the source at the bottom.
//!
//! Normally all writes go to the top. While the top is *drained*, writes go to the source beneath it, and
//! every block that is moved there becomes absent in the top. What a crash leaves is right at any time,
//! because the top's map on disk names a block until what replaced it is durable below:
//! [`Chain::flush_plan`] tells in which order things are synced.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::BLOCK;
use super::layer::Layer;
use super::map::PageWrite;
use super::map_format::State;
use super::source::Source;
use super::storage::Storage;
use crate::virtio::buffers::Buffers;

/// The open chain.
pub(super) struct Chain {
    /// From the top.
    pub(super) layers: Vec<Layer>,
    pub(super) source: Source,
    pub(super) size: u64,
    /// The top, which is the only layer then, is being moved into the source.
    draining: bool,
    /// The source may hold writes that are not durable, though it is not the top.
    source_dirty: bool,
    /// The top's data may hold writes that are not durable, though it is drained.
    top_dirty: bool,
}

/// What a flush has to do: sync `data`, then write the pages to the map and sync it.
pub(super) struct FlushPlan {
    pub(super) data: Vec<Arc<dyn Storage>>,
    pub(super) map: Option<(Arc<dyn Storage>, Uuid, Vec<PageWrite>)>,
    /// Taken while the top was drained.
    draining: bool,
}

/// A byte range that is split at block boundaries: what is before the first whole block, the whole blocks
/// (as block numbers), what is behind them. A block that the disk's end cuts off is whole up to the end.
fn split(offset: u64, len: u64, size: u64) -> (Range<u64>, Range<u64>, Range<u64>) {
    let end = offset + len;
    let first = offset.div_ceil(BLOCK);
    let last = if end == size {
        end.div_ceil(BLOCK)
    } else {
        end / BLOCK
    };
    if last <= first {
        // No whole block, unless both ends are in the one that the disk's end cuts off.
        let boundary = (first * BLOCK).clamp(offset, end);
        return (offset..boundary, first..first, boundary..end);
    }
    let tail = (last * BLOCK).min(end);
    (offset..first * BLOCK, first..last, tail..end)
}

impl Chain {
    /// A chain at rest.
    pub(super) fn new(layers: Vec<Layer>, source: Source) -> Chain {
        Chain {
            layers,
            size: source.size,
            source,
            draining: false,
            source_dirty: false,
            top_dirty: false,
        }
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Length of a block, which the disk's end may cut off.
    fn block_len(&self, block: u64) -> u64 {
        (self.size - block * BLOCK).min(BLOCK)
    }

    /// Fills `buffers` with what the guest sees at `offset`.
    pub(super) fn read(&mut self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.read_below(0, buffers, offset)
    }

    /// Reads what the chain holds from layer `level` downwards.
    fn read_below(&mut self, level: usize, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffers.len() {
            let at = offset + done;
            let Some(layer) = self.layers.get_mut(level) else {
                return self.source.storage.read(&buffers.part(done, buffers.len()), at);
            };
            let block = at / BLOCK;
            let limit = (offset + buffers.len()).div_ceil(BLOCK) - block;
            let (state, count) = layer.map.run(block, limit)?;
            let end = ((block + count.max(1)) * BLOCK).min(offset + buffers.len());
            let part = buffers.part(done, end - at);
            match state {
                State::Absent => self.read_below(level + 1, &part, at)?,
                State::Data => layer.data.read(&part, at)?,
                State::Zero => part.fill_zero(),
            }
            done = end - offset;
        }
        Ok(())
    }

    /// Writes `buffers` at `offset`.
    pub(super) fn write(&mut self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        if self.layers.is_empty() {
            return self.source.storage.write(buffers, offset);
        }
        let (head, blocks, tail) = split(offset, buffers.len(), self.size);
        for part in [&head, &tail] {
            if !part.is_empty() {
                let data = buffers.part(part.start - offset, part.end - part.start);
                self.write_part(&data, part.start)?;
            }
        }
        if !blocks.is_empty() {
            let start = blocks.start * BLOCK;
            let end = (blocks.end * BLOCK).min(self.size);
            let data = buffers.part(start - offset, end - start);
            self.write_blocks(&data, blocks)?;
        }
        Ok(())
    }

    /// Writes whole blocks to where writes go now.
    fn write_blocks(&mut self, buffers: &Buffers<'_>, blocks: Range<u64>) -> io::Result<()> {
        let count = blocks.end - blocks.start;
        let offset = blocks.start * BLOCK;
        let (draining, source) = (self.draining, self.source.storage.clone());
        let Some(top) = self.layers.first_mut() else {
            return source.write(buffers, offset);
        };
        if draining {
            source.write(buffers, offset)?;
            top.map.set(blocks.start, count, State::Absent)
        } else {
            top.data.write(buffers, offset)?;
            top.map.set(blocks.start, count, State::Data)
        }
    }

    /// Writes less than a block.
    fn write_part(&mut self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let block = offset / BLOCK;
        let (draining, source) = (self.draining, self.source.storage.clone());
        let Some(top) = self.layers.first_mut() else {
            return source.write(buffers, offset);
        };
        match (draining, top.map.run(block, 1)?.0) {
            // The block is where writes go already.
            (false, State::Data) => return top.data.write(buffers, offset),
            (true, State::Absent) => return source.write(buffers, offset),
            _ => {}
        }
        let mut bytes = vec![0; self.block_len(block) as usize];
        self.read(&Buffers::from_slice(&mut bytes), block * BLOCK)?;
        buffers.copy_to(&mut bytes[(offset % BLOCK) as usize..]);
        self.write_blocks(&Buffers::from_slice(&mut bytes), block..block + 1)
    }

    /// Makes a range read as zeros.
    pub(super) fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (draining, source) = (self.draining, self.source.storage.clone());
        if self.layers.is_empty() {
            return source.zero(offset, len);
        }
        let (head, blocks, tail) = split(offset, len, self.size);
        for part in [head, tail] {
            if !part.is_empty() {
                let mut zeros = vec![0; (part.end - part.start) as usize];
                self.write_part(&Buffers::from_slice(&mut zeros), part.start)?;
            }
        }
        let Some(top) = self.layers.first_mut() else {
            return Ok(());
        };
        if blocks.is_empty() {
            return Ok(());
        }
        let count = blocks.end - blocks.start;
        let (start, end) = (blocks.start * BLOCK, (blocks.end * BLOCK).min(self.size));
        if draining {
            source.zero(start, end - start)?;
            top.map.set(blocks.start, count, State::Absent)
        } else {
            top.map.set(blocks.start, count, State::Zero)?;
            // Gives the space back; what the file holds does not count any more.
            top.data.zero(start, end - start)
        }
    }

    /// What is to be done, in which order, to make completed writes durable: all data first, and only then
    /// the map, which names blocks in the top, or forgets those that have gone to the source.
    pub(super) fn flush_plan(&mut self) -> FlushPlan {
        let source = self.source.storage.clone();
        let mut data = Vec::new();
        let mut map = None;
        match self.layers.first_mut() {
            None => data.push(source),
            Some(top) => {
                if !self.draining || self.top_dirty {
                    data.push(top.data.clone());
                }
                if self.draining || self.source_dirty {
                    data.push(source);
                }
                map = Some((top.map.storage().clone(), top.map.layer(), top.map.snapshot()));
            }
        }
        FlushPlan {
            data,
            map,
            draining: self.draining,
        }
    }

    /// Notes what became of a flush.
    pub(super) fn flushed(&mut self, plan: &FlushPlan, success: bool) {
        let Some((_, uuid, pages)) = &plan.map else {
            return;
        };
        if let Some(layer) = self.layers.iter_mut().find(|layer| layer.uuid() == *uuid) {
            layer.map.written(pages, success);
        }
        // Nothing is written to a top that is drained, so that its data are durable from then on.
        if success && plan.draining && self.draining {
            self.top_dirty = false;
        }
    }

    /// From now on writes go to the source.
    pub(super) fn begin_draining(&mut self) {
        self.draining = true;
        self.top_dirty = true;
        self.source_dirty = true;
    }

    /// From now on writes go to the top again. What went to the source meanwhile is synced by flushes
    /// all the same, for the map must not forget blocks sooner.
    pub(super) fn end_draining(&mut self) {
        self.draining = false;
    }

    /// Puts a layer on top.
    pub(super) fn push(&mut self, top: Layer) {
        self.layers.insert(0, top);
        self.source_dirty = false;
    }

    /// Takes the empty, drained top away, so that the source is the whole disk.
    pub(super) fn pop(&mut self) -> Option<Layer> {
        self.draining = false;
        self.layers.pop()
    }

    /// The next run of at most `limit` blocks of a layer that are in it, at or after `block`.
    pub(super) fn next_run(
        &mut self,
        level: usize,
        block: u64,
        limit: u64,
    ) -> io::Result<Option<(Range<u64>, State)>> {
        let blocks = self.blocks();
        let Some(layer) = self.layers.get_mut(level) else {
            return Ok(None);
        };
        let Some(first) = layer.map.next_present(block)?.filter(|&first| first < blocks) else {
            return Ok(None);
        };
        let (state, count) = layer.map.run(first, limit)?;
        Ok(Some((first..first + count, state)))
    }

    /// Copies blocks of a layer, all in `state`, into the source.
    pub(super) fn copy_to_source(
        &mut self,
        level: usize,
        blocks: &Range<u64>,
        state: State,
    ) -> io::Result<()> {
        let (start, end) = (blocks.start * BLOCK, (blocks.end * BLOCK).min(self.size));
        let Some(layer) = self.layers.get(level) else {
            return Ok(());
        };
        match state {
            State::Absent => Ok(()),
            State::Zero => self.source.storage.zero(start, end - start),
            State::Data => {
                let mut bytes = vec![0; (end - start) as usize];
                let buffers = Buffers::from_slice(&mut bytes);
                layer.data.read(&buffers, start)?;
                self.source.storage.write(&buffers, start)
            }
        }
    }

    /// Moves blocks of the top that is drained, all in `state`, into the source.
    pub(super) fn drain(&mut self, blocks: &Range<u64>, state: State) -> io::Result<()> {
        self.copy_to_source(0, blocks, state)?;
        match self.layers.first_mut() {
            Some(top) => top
                .map
                .set(blocks.start, blocks.end - blocks.start, State::Absent),
            None => Ok(()),
        }
    }

    /// Gives back the space of blocks that were moved, once that is durable.
    pub(super) fn reclaim(&mut self, blocks: &Range<u64>) -> io::Result<()> {
        let size = self.size;
        let (mut block, draining) = (blocks.start, self.draining);
        let Some(top) = self.layers.first_mut().filter(|_| draining) else {
            return Ok(());
        };
        while block < blocks.end {
            let (state, count) = top.map.run(block, blocks.end - block)?;
            if state == State::Absent {
                let (start, end) = (block * BLOCK, ((block + count) * BLOCK).min(size));
                top.data.zero(start, end - start)?;
            }
            block += count.max(1);
        }
        Ok(())
    }

    /// Bytes that are in layers and not in the source.
    pub(super) fn bytes_in_layers(&self) -> u64 {
        self.layers.iter().map(|layer| layer.map.present() * BLOCK).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn splitting_covers_the_range_with_whole_blocks_in_the_middle(
            size in 1u64..20_000, a in any::<u64>(), b in any::<u64>()
        ) {
            let offset = a % size;
            let len = 1 + b % (size - offset);
            let (head, blocks, tail) = split(offset, len, size);
            let middle = match blocks.is_empty() {
                true => head.end..head.end,
                false => blocks.start * BLOCK..(blocks.end * BLOCK).min(size),
            };
            prop_assert_eq!((head.start, tail.end), (offset, offset + len));
            prop_assert_eq!((head.end, middle.end), (middle.start, tail.start));
            prop_assert!(head.is_empty() || head.start / BLOCK == (head.end - 1) / BLOCK);
            prop_assert!(tail.is_empty() || tail.start / BLOCK == (tail.end - 1) / BLOCK);
        }
    }
}
