//! The file format of a layer's map, `<uuid>.map`.
//!
//! | offset | content |
//! | --- | --- |
//! | 0, 4096 | the header's two slots, written alternately: one sector each |
//! | 8192 + 8192 p, + 4096 | page p's two slots, written alternately |
//!
//! A page keeps the states of [`BLOCKS_PER_PAGE`] blocks, two bits each. A write replaces the older slot,
//! so that what was durable stays whole whatever becomes of it. Each of a page's eight sectors carries the
//! page's generation and a checksum of its own (CRC-32C, over the layer's UUID and the sector's place as
//! well). That tells a torn write, whose sectors are whole but of different generations, from damage,
//! which is never passed over in silence. It takes for granted what disks promise: that a sector of 512
//! bytes is written whole or not at all. A slot of zeros was never written, so that an empty map is a
//! sparse file.

use uuid::Uuid;

/// Version of the format.
pub const MAP_VERSION: u32 = 1;

/// Size of one slot.
pub(super) const SLOT: u64 = 4096;

/// Where pages begin.
const PAGES: u64 = 2 * SLOT;

const SECTOR: usize = 512;
const SECTORS: usize = SLOT as usize / SECTOR;
const PAYLOAD: usize = 496;
const MAGIC: &[u8; 8] = b"USTDYMAP";

/// Bytes of states in a page.
pub(super) const STATES: usize = SECTORS * PAYLOAD;

/// Blocks whose states are in one page.
pub const BLOCKS_PER_PAGE: u64 = STATES as u64 * 4;

/// State of one block in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not in this layer: what is below counts.
    Absent,
    /// In this layer's data file.
    Data,
    /// All zeros.
    Zero,
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapHeader {
    /// Grows with each replacement.
    pub generation: u64,
    /// The layer.
    pub uuid: Uuid,
    /// The layer below; `None`: the source.
    pub parent: Option<Uuid>,
    /// Write session of what is below when the layer was made upon it.
    pub parent_session: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Write session of the layer: grows, durably, before the first write of each opening for writing.
    pub session: u64,
}

/// States of one page.
pub(super) type States = [u8; STATES];

/// Why something in a map cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("{0}")]
    Damaged(String),
    #[error("format version {0}")]
    Version(u32),
}

fn damaged<T>(text: impl Into<String>) -> Result<T, FormatError> {
    Err(FormatError::Damaged(text.into()))
}

/// Number of pages for a disk of `size` bytes.
pub(super) fn page_count(size: u64) -> u64 {
    size.div_ceil(super::BLOCK).div_ceil(BLOCKS_PER_PAGE)
}

/// Size of the map file of a disk of `size` bytes.
pub(super) fn file_size(size: u64) -> u64 {
    PAGES + page_count(size) * 2 * SLOT
}

/// Where a page's slot (0 or 1) is.
pub(super) fn page_offset(page: u32, slot: u8) -> u64 {
    PAGES + (u64::from(page) * 2 + u64::from(slot)) * SLOT
}

/// The page whose slots include the file offset; `None` within the header.
pub(super) fn page_at(offset: u64) -> Option<u32> {
    offset
        .checked_sub(PAGES)
        .map(|offset| (offset / (2 * SLOT)) as u32)
}

fn crc(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

impl MapHeader {
    /// The sector to be written.
    pub(super) fn encode(&self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        bytes[0..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&MAP_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.generation.to_le_bytes());
        bytes[24..40].copy_from_slice(self.uuid.as_bytes());
        bytes[40..56].copy_from_slice(self.parent.unwrap_or(Uuid::nil()).as_bytes());
        bytes[56..64].copy_from_slice(&self.parent_session.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.size.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.session.to_le_bytes());
        let sum = crc(&[&bytes[..508]]);
        bytes[508..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one slot; `None` when it was never written.
    fn decode_slot(slot: &[u8]) -> Result<Option<MapHeader>, FormatError> {
        let Some(bytes) = slot.get(..SECTOR) else {
            return damaged("its header is cut short");
        };
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if &bytes[..8] != MAGIC {
            return damaged("its header is not that of a layer's map");
        }
        // Before the checksum, whose place another version may have moved.
        if u32_at(8) != MAP_VERSION {
            return Err(FormatError::Version(u32_at(8)));
        }
        if u32_at(508) != crc(&[&bytes[..508]]) {
            return damaged("the checksum of its header is wrong");
        }
        let parent = Uuid::from_bytes(std::array::from_fn(|i| bytes[40 + i]));
        Ok(Some(MapHeader {
            generation: u64_at(16),
            uuid: Uuid::from_bytes(std::array::from_fn(|i| bytes[24 + i])),
            parent: (!parent.is_nil()).then_some(parent),
            parent_session: u64_at(56),
            size: u64_at(64),
            session: u64_at(72),
        }))
    }

    /// Reads the newer of both slots, which are the first 8 KiB of the file.
    pub(super) fn decode(slots: &[u8]) -> Result<MapHeader, FormatError> {
        let (first, second) = slots.split_at(slots.len().min(SLOT as usize));
        // A header is one sector, which is never torn: whatever cannot be read is damage.
        match (Self::decode_slot(first)?, Self::decode_slot(second)?) {
            (Some(a), Some(b)) if a.generation == b.generation => {
                damaged("both slots of its header have the same generation")
            }
            (Some(a), Some(b)) if a.generation > b.generation => Ok(a),
            (_, Some(header)) | (Some(header), None) => Ok(header),
            (None, None) => damaged("it has no header"),
        }
    }

    /// Where the header of this generation is written.
    pub(super) fn offset(&self) -> u64 {
        (self.generation % 2) * SLOT
    }
}

/// A page as it was found on disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredPage {
    /// Newest generation of any sector in either slot. The next write takes a greater one, so that its
    /// sectors are never taken for those of a write that was cut short before.
    pub(super) newest: u64,
    /// The slot with what is durable, and that; `None` when nothing is.
    pub(super) durable: Option<(u8, Box<States>)>,
}

fn sector_crc(layer: Uuid, page: u32, sector: usize, body: &[u8]) -> u32 {
    crc(&[layer.as_bytes(), &page.to_le_bytes(), &[sector as u8], body])
}

/// The slot to be written for a page.
pub(super) fn encode_page(
    layer: Uuid,
    page: u32,
    generation: u64,
    states: &States,
) -> Box<[u8; SLOT as usize]> {
    let mut bytes = Box::new([0; SLOT as usize]);
    for (i, (sector, payload)) in bytes
        .chunks_exact_mut(SECTOR)
        .zip(states.chunks_exact(PAYLOAD))
        .enumerate()
    {
        sector[..PAYLOAD].copy_from_slice(payload);
        sector[PAYLOAD..504].copy_from_slice(&generation.to_le_bytes());
        sector[504..508].copy_from_slice(&page.to_le_bytes());
        let sum = sector_crc(layer, page, i, &sector[..508]);
        sector[508..].copy_from_slice(&sum.to_le_bytes());
    }
    bytes
}

/// What a slot of a page holds.
enum Slot {
    /// Nothing was ever written.
    Empty,
    /// A whole page.
    Whole(u64),
    /// A write was cut short: sectors are whole, but of different generations.
    Torn,
    /// A sector is not what was written; the newest generation among the others.
    Damaged(u64),
}

fn inspect(layer: Uuid, page: u32, slot: &[u8]) -> (Slot, u64) {
    let mut generations = [0; SECTORS];
    let mut bad = false;
    for (i, sector) in slot.chunks_exact(SECTOR).enumerate() {
        if sector.iter().all(|&byte| byte == 0) {
            continue;
        }
        let sum = u32::from_le_bytes(std::array::from_fn(|b| sector[508 + b]));
        if sum != sector_crc(layer, page, i, &sector[..508]) {
            bad = true;
            continue;
        }
        generations[i] = u64::from_le_bytes(std::array::from_fn(|b| sector[PAYLOAD + b]));
    }
    let newest = generations.iter().copied().max().unwrap_or(0);
    let slot = if bad {
        Slot::Damaged(newest)
    } else if newest == 0 {
        Slot::Empty
    } else if generations.iter().all(|&generation| generation == newest) {
        Slot::Whole(newest)
    } else {
        Slot::Torn
    };
    (slot, newest)
}

/// Reads a page from both of its slots.
pub(super) fn decode_page(layer: Uuid, page: u32, slots: &[u8]) -> Result<StoredPage, FormatError> {
    if slots.len() != 2 * SLOT as usize {
        return damaged(format!("page {page} is cut short"));
    }
    let (first, second) = slots.split_at(SLOT as usize);
    let damage = || damaged(format!("a checksum of page {page} is wrong"));
    let (a, newest_a) = inspect(layer, page, first);
    let (b, newest_b) = inspect(layer, page, second);
    let newest = newest_a.max(newest_b);
    let slot = match (a, b) {
        (Slot::Whole(a), Slot::Whole(b)) if a == b => {
            return damaged(format!("both slots of page {page} have the same generation"));
        }
        (Slot::Whole(a), Slot::Whole(b)) => u8::from(b > a),
        // What is torn was being written and is not durable.
        (Slot::Whole(_), Slot::Empty | Slot::Torn) => 0,
        (Slot::Empty | Slot::Torn, Slot::Whole(_)) => 1,
        // Damage to what is outdated anyway does no harm; that it is outdated its other sectors tell.
        (Slot::Whole(a), Slot::Damaged(other)) if (1..a).contains(&other) => 0,
        (Slot::Damaged(other), Slot::Whole(b)) if (1..b).contains(&other) => 1,
        (Slot::Damaged(_), _) | (_, Slot::Damaged(_)) => return damage(),
        (Slot::Empty, Slot::Empty | Slot::Torn) | (Slot::Torn, Slot::Empty) => {
            return Ok(StoredPage {
                newest,
                durable: None,
            });
        }
        // One slot is always whole once both were written.
        (Slot::Torn, Slot::Torn) => return damage(),
    };
    let bytes = if slot == 0 { first } else { second };
    let mut states = Box::new([0; STATES]);
    for (sector, payload) in bytes.chunks_exact(SECTOR).zip(states.chunks_exact_mut(PAYLOAD)) {
        payload.copy_from_slice(&sector[..PAYLOAD]);
    }
    // The fourth value of two bits means nothing.
    if states.iter().any(|&byte| byte & (byte >> 1) & 0x55 != 0) {
        return damaged(format!("page {page} has an unknown block state"));
    }
    Ok(StoredPage {
        newest,
        durable: Some((slot, states)),
    })
}

/// State of the block at `index` within a page.
pub(super) fn get(states: &States, index: u64) -> State {
    match states[index as usize / 4] >> (index % 4 * 2) & 3 {
        1 => State::Data,
        2 => State::Zero,
        _ => State::Absent,
    }
}

fn bits(state: State) -> u8 {
    match state {
        State::Absent => 0,
        State::Data => 1,
        State::Zero => 2,
    }
}

/// Sets the state of the block at `index` within a page.
pub(super) fn set(states: &mut States, index: u64, state: State) {
    let byte = &mut states[index as usize / 4];
    let shift = index % 4 * 2;
    *byte = *byte & !(3 << shift) | bits(state) << shift;
}

/// Sets the states of blocks `start` to `end` (excluded) within a page; returns whether any has changed.
pub(super) fn fill(states: &mut States, start: u64, end: u64, state: State) -> bool {
    let whole = bits(state) * 0x55;
    let mut changed = false;
    let mut at = start;
    while at < end {
        if at.is_multiple_of(4) && end - at >= 4 {
            // Byte by byte, for a discard may name very many blocks.
            let bytes = &mut states[at as usize / 4..end as usize / 4];
            changed |= bytes.iter().any(|&byte| byte != whole);
            bytes.fill(whole);
            at += bytes.len() as u64 * 4;
        } else {
            changed |= get(states, at) != state;
            set(states, at, state);
            at += 1;
        }
    }
    changed
}

/// State of block `start` within a page, and how many blocks from there, up to `end` (excluded), have it.
pub(super) fn run(states: &States, start: u64, end: u64) -> (State, u64) {
    let state = get(states, start);
    let whole = bits(state) * 0x55;
    let mut at = start + 1;
    while at < end {
        if at.is_multiple_of(4) && end - at >= 4 && states[at as usize / 4] == whole {
            at += 4;
        } else if get(states, at) == state {
            at += 1;
        } else {
            break;
        }
    }
    (state, at - start)
}

/// Blocks of a page that are not absent.
pub(super) fn count_present(states: &States) -> u32 {
    states
        .iter()
        .map(|&byte| ((byte | byte >> 1) & 0x55).count_ones())
        .sum()
}

#[cfg(test)]
#[path = "map_format_test.rs"]
mod tests;
