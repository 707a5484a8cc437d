//! A layer's map in memory: pages are loaded when they are touched, and written back by a flush.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::BLOCK;
use super::map_format::{
    BLOCKS_PER_PAGE, FormatError, SLOT, STATES, State, States, StoredPage, count_present, decode_page,
    encode_page, fill, page_at, page_count, page_offset, run,
};
use super::storage::Storage;
use crate::virtio::buffers::Buffers;

/// One page.
struct Page {
    /// `None`: as on disk.
    states: Option<Box<States>>,
    /// Blocks that are not absent.
    present: u32,
    /// Generation last given to a write of it.
    generation: u64,
    /// The slot that holds what is durable.
    slot: u8,
    /// Changed since the last snapshot.
    dirty: bool,
}

impl Page {
    fn empty() -> Page {
        Page {
            states: Some(Box::new([0; STATES])),
            present: 0,
            generation: 0,
            // The first write goes to the other one, slot 0.
            slot: 1,
            dirty: false,
        }
    }
}

/// The block states of one layer. Memory is bounded by what the layer holds, not by the disk's size.
pub(super) struct BlockMap {
    layer: Uuid,
    storage: Arc<dyn Storage>,
    /// Blocks of the disk.
    blocks: u64,
    /// Pages that were ever written; all blocks of others are absent.
    pages: BTreeMap<u32, Page>,
    present: u64,
}

/// A page on its way to the disk.
pub(super) struct PageWrite {
    page: u32,
    generation: u64,
    slot: u8,
    states: Box<States>,
}

fn invalid(error: FormatError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

fn read_page(storage: &dyn Storage, layer: Uuid, page: u32) -> io::Result<StoredPage> {
    let mut slots = vec![0; 2 * SLOT as usize];
    storage.read(&Buffers::from_slice(&mut slots), page_offset(page, 0))?;
    decode_page(layer, page, &slots).map_err(invalid)
}

impl BlockMap {
    /// The map of a layer that was just made.
    pub(super) fn new(storage: Arc<dyn Storage>, layer: Uuid, size: u64) -> BlockMap {
        BlockMap {
            layer,
            storage,
            blocks: size.div_ceil(BLOCK),
            pages: BTreeMap::new(),
            present: 0,
        }
    }

    /// Opens a map and checks every page that was ever written. Nothing is kept but counts.
    pub(super) fn open(storage: Arc<dyn Storage>, layer: Uuid, size: u64) -> io::Result<BlockMap> {
        let mut map = Self::new(storage, layer, size);
        let count = page_count(size);
        let mut from = page_offset(0, 0);
        while let Some(range) = map.storage.next_data(from)? {
            let first = page_at(range.start).unwrap_or(0);
            let last = page_at(range.end.saturating_sub(1)).unwrap_or(0);
            for page in first..=last {
                if u64::from(page) < count {
                    map.check_page(page)?;
                }
            }
            from = range.end.max(page_offset(last, 0) + 2 * SLOT);
        }
        Ok(map)
    }

    fn check_page(&mut self, page: u32) -> io::Result<()> {
        let stored = read_page(self.storage.as_ref(), self.layer, page)?;
        let entry = match &stored.durable {
            Some((slot, states)) => Page {
                states: None,
                present: count_present(states),
                generation: stored.newest,
                slot: *slot,
                dirty: false,
            },
            None if stored.newest == 0 => return Ok(()),
            // Its first write was cut short.
            None => Page {
                generation: stored.newest,
                ..Page::empty()
            },
        };
        self.present += u64::from(entry.present);
        self.pages.insert(page, entry);
        Ok(())
    }

    /// Blocks that are not absent.
    pub(super) fn present(&self) -> u64 {
        self.present
    }

    /// States of a page that exists.
    fn load(&mut self, index: u32) -> io::Result<Option<&mut Page>> {
        let Some(page) = self.pages.get_mut(&index) else {
            return Ok(None);
        };
        if page.states.is_none() {
            let stored = read_page(self.storage.as_ref(), self.layer, index)?;
            let Some((_, states)) = stored.durable.filter(|(slot, _)| *slot == page.slot) else {
                return Err(invalid(FormatError::Damaged(format!(
                    "page {index} has changed underneath"
                ))));
            };
            page.states = Some(states);
        }
        Ok(Some(page))
    }

    /// State of `block` and how many blocks from there, up to `limit`, have the same.
    pub(super) fn run(&mut self, block: u64, limit: u64) -> io::Result<(State, u64)> {
        let end = block.saturating_add(limit).min(self.blocks);
        let mut at = block;
        let mut found = None;
        while at < end {
            let index = (at / BLOCKS_PER_PAGE) as u32;
            let page_end = (u64::from(index) + 1) * BLOCKS_PER_PAGE;
            let Some(states) = self.load(index)?.and_then(|page| page.states.as_ref()) else {
                match found {
                    None | Some(State::Absent) => {
                        found = Some(State::Absent);
                        at = page_end.min(end);
                        continue;
                    }
                    Some(_) => break,
                }
            };
            let stop = end.min(page_end) - u64::from(index) * BLOCKS_PER_PAGE;
            let (state, count) = run(states, at % BLOCKS_PER_PAGE, stop);
            if *found.get_or_insert(state) != state {
                break;
            }
            at += count;
            if at < end.min(page_end) {
                break;
            }
        }
        Ok((found.unwrap_or(State::Absent), at - block))
    }

    /// The first block at or after `block` that is not absent.
    pub(super) fn next_present(&mut self, block: u64) -> io::Result<Option<u64>> {
        let first = (block / BLOCKS_PER_PAGE) as u32;
        let candidates: Vec<u32> = self
            .pages
            .range(first..)
            .filter(|(_, page)| page.present > 0)
            .map(|(&index, _)| index)
            .take(2)
            .collect();
        // The first page may have none left behind `block`; the one after it has some in any case.
        for index in candidates {
            let start = u64::from(index) * BLOCKS_PER_PAGE;
            let from = block.max(start);
            let (state, len) = self.run(from, start + BLOCKS_PER_PAGE - from)?;
            let found = if state == State::Absent { from + len } else { from };
            if found < (start + BLOCKS_PER_PAGE).min(self.blocks) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Sets the state of `count` blocks from `block`; durable after the next flush.
    pub(super) fn set(&mut self, block: u64, count: u64, state: State) -> io::Result<()> {
        let end = block.saturating_add(count).min(self.blocks);
        let mut at = block;
        while at < end {
            let index = (at / BLOCKS_PER_PAGE) as u32;
            let stop = end.min((u64::from(index) + 1) * BLOCKS_PER_PAGE);
            if self.load(index)?.is_none() {
                if state == State::Absent {
                    at = stop;
                    continue;
                }
                self.pages.insert(index, Page::empty());
            }
            let Some(page) = self.pages.get_mut(&index) else {
                break;
            };
            let Some(states) = page.states.as_mut() else { break };
            let first = u64::from(index) * BLOCKS_PER_PAGE;
            if fill(states, at - first, stop - first, state) {
                page.dirty = true;
                let before = page.present;
                page.present = count_present(states);
                self.present = self.present + u64::from(page.present) - u64::from(before);
            }
            at = stop;
        }
        Ok(())
    }

    /// Takes what has changed, to be written by [`write_pages`] once the data it speaks of are durable.
    pub(super) fn snapshot(&mut self) -> Vec<PageWrite> {
        let mut writes = Vec::new();
        for (&index, page) in self.pages.iter_mut().filter(|(_, page)| page.dirty) {
            let Some(states) = &page.states else { continue };
            page.dirty = false;
            // Grows by every attempt, so that the remains of a failed one are always older.
            page.generation += 1;
            writes.push(PageWrite {
                page: index,
                generation: page.generation,
                slot: 1 - page.slot,
                states: states.clone(),
            });
        }
        writes
    }

    /// Notes what became of a snapshot.
    pub(super) fn written(&mut self, writes: &[PageWrite], success: bool) {
        for write in writes {
            if let Some(page) = self.pages.get_mut(&write.page) {
                match success {
                    true => page.slot = write.slot,
                    false => page.dirty = true,
                }
            }
        }
    }

    /// The map's file.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The layer it belongs to.
    pub(super) fn layer(&self) -> Uuid {
        self.layer
    }
}

/// Writes the pages of a snapshot and makes them durable.
pub(super) fn write_pages(storage: &dyn Storage, layer: Uuid, writes: &[PageWrite]) -> io::Result<()> {
    if writes.is_empty() {
        return Ok(());
    }
    for write in writes {
        let mut bytes = encode_page(layer, write.page, write.generation, &write.states);
        storage.write(
            &Buffers::from_slice(&mut bytes[..]),
            page_offset(write.page, write.slot),
        )?;
    }
    storage.sync()
}
