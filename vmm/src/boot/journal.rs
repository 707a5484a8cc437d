//! What the journal of an ext4 file system holds (Documentation/filesystems/ext4/journal.rst, and
//! fs/jbd2/recovery.c for its meaning), as an overlay on the blocks of the file system.
//!
//! A guest that was killed leaves its last transactions in the journal alone. Its kernel replays them when
//! it mounts the file system; we only look, so that they are laid over what is read. The reader
//! of files has a journal reader of its own, which knows neither that the journal is a ring nor that a
//! block may be revoked by a later transaction; it is shown a file system that needs no recovery.

use std::collections::{BTreeMap, HashMap};
use std::io;

/// Reads bytes of the file system.
pub type ReadAt<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>;

/// Why a journal could not be read. A file system without one, or with a clean one, is no error.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// I/O.
    #[error("reading the journal: {0}")]
    Read(#[from] io::Error),
    /// It makes no sense, or uses what we do not know.
    #[error(
        "the file system was not unmounted and its journal cannot be replayed: {0}; mount it once, or run e2fsck on the disk"
    )]
    Damaged(&'static str),
}

const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 1024;
const SUPERBLOCK_CHECKSUM: usize = 0x3fc;
const COMPAT_HAS_JOURNAL: u32 = 4;
const INCOMPAT_RECOVER: u32 = 4;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const FEATURE_64BIT: u32 = 2;
const FEATURE_CSUM_V2: u32 = 8;
const FEATURE_CSUM_V3: u32 = 0x10;
const FEATURE_FAST_COMMIT: u32 = 0x20;
const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;
/// A journal has 1024 blocks at least and rarely more than 2^18; beyond this the superblock is nonsense.
const MAX_BLOCKS: u32 = 1 << 24;

/// Where the newest content of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Newer {
    /// Block of the file system, within its journal.
    block: u64,
    /// The content begins with the journal's magic number, which is stored as zeroes.
    escaped: bool,
}

/// The committed transactions of a journal.
#[derive(Debug, Default)]
pub struct Overlay {
    block_size: u64,
    blocks: BTreeMap<u64, Newer>,
    superblock: Option<Vec<u8>>,
}

impl Overlay {
    /// Reads the journal of the file system that `read` reads.
    pub fn load(read: ReadAt<'_>) -> Result<Overlay, JournalError> {
        let mut superblock = vec![0; SUPERBLOCK_SIZE];
        read(SUPERBLOCK, &mut superblock)?;
        let needs = le32(&superblock, 0x5c) & COMPAT_HAS_JOURNAL != 0
            && le32(&superblock, 0x60) & INCOMPAT_RECOVER != 0;
        if !needs {
            return Ok(Overlay::default());
        }
        let layout = Layout::read(read, &superblock)?;
        let mut overlay = Overlay {
            block_size: layout.block_size,
            blocks: Replay::run(read, &layout)?,
            superblock: None,
        };
        // The superblock itself may be in the journal.
        overlay.read(read, SUPERBLOCK, &mut superblock)?;
        recovered(&mut superblock);
        overlay.superblock = Some(superblock);
        Ok(overlay)
    }

    /// Reads bytes of the file system as they are after a replay.
    pub fn read(&self, read: ReadAt<'_>, start: u64, buffer: &mut [u8]) -> io::Result<()> {
        read(start, buffer)?;
        let end = start + buffer.len() as u64;
        if let (Some(first), Some(last)) = (
            start.checked_div(self.block_size),
            end.checked_sub(1)
                .and_then(|last| last.checked_div(self.block_size)),
        ) {
            let mut content = vec![0; self.block_size as usize];
            for (block, newer) in self.blocks.range(first..=last) {
                read(newer.block * self.block_size, &mut content)?;
                if newer.escaped {
                    content[0..4].copy_from_slice(&MAGIC.to_be_bytes());
                }
                copy_overlap(block * self.block_size, &content, start, buffer);
            }
        }
        if let Some(superblock) = &self.superblock {
            copy_overlap(SUPERBLOCK, superblock, start, buffer);
        }
        Ok(())
    }
}

/// Copies the part of `content`, which lies at `at`, that falls into `buffer`, which lies at `start`.
fn copy_overlap(at: u64, content: &[u8], start: u64, buffer: &mut [u8]) {
    let from = at.max(start);
    let to = (at + content.len() as u64).min(start + buffer.len() as u64);
    if from < to {
        let length = (to - from) as usize;
        let (into, of) = ((from - start) as usize, (from - at) as usize);
        buffer[into..into + length].copy_from_slice(&content[of..of + length]);
    }
}

/// Marks a superblock as that of a file system that needs no recovery.
fn recovered(superblock: &mut [u8]) {
    let incompat = le32(superblock, 0x60) & !INCOMPAT_RECOVER;
    superblock[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
    if le32(superblock, 0x64) & RO_COMPAT_METADATA_CSUM != 0 {
        let checksum = checksum(!0, &superblock[..SUPERBLOCK_CHECKSUM]);
        superblock[SUPERBLOCK_CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// The kernel's `crc32c`: neither seed nor result are inverted.
fn checksum(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The journal's superblock and where its blocks lie.
struct Layout {
    block_size: u64,
    extents: Vec<Extent>,
    first: u32,
    /// One beyond the last block of the ring.
    last: u32,
    sequence: u32,
    start: u32,
    features: u32,
    seed: u32,
}

#[derive(Clone, Copy)]
struct Extent {
    logical: u32,
    length: u32,
    physical: u64,
}

impl Layout {
    fn read(read: ReadAt<'_>, superblock: &[u8]) -> Result<Layout, JournalError> {
        let shift = le32(superblock, 0x18);
        if shift > 6 {
            return Err(JournalError::Damaged("the block size is out of range"));
        }
        let block_size = 1024u64 << shift;
        let inode = journal_inode(read, superblock, block_size)?;
        let extents = extents(read, &inode, block_size)?;
        let mut layout = Layout {
            block_size,
            extents,
            first: 0,
            last: 1,
            sequence: 0,
            start: 0,
            features: 0,
            seed: 0,
        };
        let head = layout.block(read, 0)?;
        if be32(&head, 0) != MAGIC || !matches!(be32(&head, 4), 3 | 4) {
            return Err(JournalError::Damaged("its superblock lacks the magic number"));
        }
        if u64::from(be32(&head, 0xc)) != block_size {
            return Err(JournalError::Damaged(
                "its blocks differ in size from the file system's",
            ));
        }
        layout.first = be32(&head, 0x14);
        layout.last = be32(&head, 0x10);
        layout.sequence = be32(&head, 0x18);
        layout.start = be32(&head, 0x1c);
        // Version 1 has no features.
        if be32(&head, 4) == 4 {
            layout.features = be32(&head, 0x28);
        }
        layout.seed = checksum(!0, &head[0x30..0x40]);
        if layout.features & FEATURE_FAST_COMMIT != 0 {
            const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;
            let blocks = match be32(&head, 0x54) {
                0 => DEFAULT_FAST_COMMIT_BLOCKS,
                blocks => blocks,
            };
            layout.last = layout.last.saturating_sub(blocks);
            tracing::warn!(
                "the journal may hold fast commits, which are not read; the guest's kernel replays them"
            );
        }
        let bounded = layout.first > 0 && layout.first < layout.last && layout.last <= MAX_BLOCKS;
        let starts = layout.start == 0 || (layout.first..layout.last).contains(&layout.start);
        if !bounded || !starts {
            return Err(JournalError::Damaged("its superblock has blocks out of range"));
        }
        Ok(layout)
    }

    fn physical(&self, logical: u32) -> Result<u64, JournalError> {
        self.extents
            .iter()
            .find_map(|extent| {
                let within = logical.checked_sub(extent.logical)?;
                (within < extent.length).then(|| extent.physical + u64::from(within))
            })
            .ok_or(JournalError::Damaged("a block of it is not mapped"))
    }

    fn block(&self, read: ReadAt<'_>, logical: u32) -> Result<Vec<u8>, JournalError> {
        let mut block = vec![0; self.block_size as usize];
        read(self.physical(logical)? * self.block_size, &mut block)?;
        Ok(block)
    }

    fn next(&self, logical: u32, by: u32) -> u32 {
        let ring = self.last - self.first;
        (logical - self.first + by) % ring + self.first
    }

    fn has_checksums(&self) -> bool {
        self.features & (FEATURE_CSUM_V2 | FEATURE_CSUM_V3) != 0
    }

    /// Checks the checksum at the end of a descriptor or revocation block.
    fn tail_holds(&self, block: &[u8]) -> bool {
        if !self.has_checksums() {
            return true;
        }
        let at = block.len() - 4;
        let sum = checksum(checksum(self.seed, &block[..at]), &[0; 4]);
        sum == be32(block, at)
    }

    /// Checks the checksum of a commit block, which is computed with its own field as zero.
    fn commit_holds(&self, block: &[u8]) -> bool {
        if !self.has_checksums() {
            return true;
        }
        const FIELD: usize = 16;
        let sum = checksum(self.seed, &block[..FIELD]);
        let sum = checksum(checksum(sum, &[0; 4]), &block[FIELD + 4..]);
        sum == be32(block, FIELD)
    }

    fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let v3 = self.features & FEATURE_CSUM_V3 != 0;
        let wide = self.features & FEATURE_64BIT != 0;
        let size = match (v3, self.features & FEATURE_CSUM_V2 != 0, wide) {
            (true, _, _) => 16,
            (false, true, true) => 14,
            (false, true, false) => 10,
            (false, false, true) => 12,
            (false, false, false) => 8,
        };
        let end = block.len() - if self.has_checksums() { 4 } else { 0 };
        let mut tags = Vec::new();
        let mut at = 12;
        while at + size <= end {
            let (flags, high, sum) = if v3 {
                (
                    be32(block, at + 4),
                    be32(block, at + 8),
                    Sum::Full(be32(block, at + 12)),
                )
            } else {
                let sum = match self.features & FEATURE_CSUM_V2 {
                    0 => Sum::None,
                    _ => Sum::Half(be16(block, at + 4)),
                };
                (
                    u32::from(be16(block, at + 6)),
                    if wide { be32(block, at + 8) } else { 0 },
                    sum,
                )
            };
            let high = if wide { u64::from(high) << 32 } else { 0 };
            tags.push(Tag {
                block: u64::from(be32(block, at)) | high,
                escaped: flags & TAG_ESCAPED != 0,
                sum,
            });
            if flags & TAG_LAST != 0 {
                break;
            }
            at += size + if flags & TAG_SAME_UUID == 0 { 16 } else { 0 };
        }
        tags
    }

    fn revoked(&self, block: &[u8]) -> Vec<u64> {
        let wide = self.features & FEATURE_64BIT != 0;
        let size = if wide { 8 } else { 4 };
        let end = (be32(block, 12) as usize).min(block.len());
        let mut blocks = Vec::new();
        let mut at = 16;
        while at + size <= end {
            blocks.push(match wide {
                true => u64::from(be32(block, at)) << 32 | u64::from(be32(block, at + 4)),
                false => u64::from(be32(block, at)),
            });
            at += size;
        }
        blocks
    }
}

struct Tag {
    block: u64,
    escaped: bool,
    sum: Sum,
}

enum Sum {
    None,
    Half(u16),
    Full(u32),
}

/// A committed transaction's part of the log.
struct Transaction {
    sequence: u32,
    /// Descriptor blocks with the first block of their data.
    descriptors: Vec<(Vec<u8>, u32)>,
}

struct Replay;

impl Replay {
    fn run(read: ReadAt<'_>, layout: &Layout) -> Result<BTreeMap<u64, Newer>, JournalError> {
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let transactions = Replay::scan(read, layout, &mut revoked)?;
        let mut blocks = BTreeMap::new();
        for transaction in &transactions {
            for (descriptor, data) in &transaction.descriptors {
                for (index, tag) in layout.tags(descriptor).iter().enumerate() {
                    // Revoked by this or a later transaction: the block is something else by now.
                    if revoked
                        .get(&tag.block)
                        .is_some_and(|at| !after(transaction.sequence, *at))
                    {
                        continue;
                    }
                    let logical = layout.next(*data, index as u32);
                    Replay::check(read, layout, tag, logical, transaction.sequence)?;
                    blocks.insert(
                        tag.block,
                        Newer {
                            block: layout.physical(logical)?,
                            escaped: tag.escaped,
                        },
                    );
                }
            }
        }
        Ok(blocks)
    }

    /// Finds the committed transactions, oldest first, and by which transaction each block was last revoked.
    fn scan(
        read: ReadAt<'_>,
        layout: &Layout,
        revoked: &mut HashMap<u64, u32>,
    ) -> Result<Vec<Transaction>, JournalError> {
        let mut committed = Vec::new();
        if layout.start == 0 {
            return Ok(committed);
        }
        let mut sequence = layout.sequence;
        let mut at = layout.start;
        let mut left = layout.last - layout.first;
        let mut descriptors = Vec::new();
        let mut revocations = Vec::new();
        while left > 0 {
            let block = layout.block(read, at)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            let mut used = 1;
            match be32(&block, 4) {
                DESCRIPTOR if layout.tail_holds(&block) => {
                    used += layout.tags(&block).len() as u32;
                    descriptors.push((block, layout.next(at, 1)));
                }
                REVOKE if layout.tail_holds(&block) => revocations.extend(layout.revoked(&block)),
                COMMIT if layout.commit_holds(&block) => {
                    for block in revocations.drain(..) {
                        revoked.insert(block, sequence);
                    }
                    committed.push(Transaction {
                        sequence,
                        descriptors: std::mem::take(&mut descriptors),
                    });
                    sequence = sequence.wrapping_add(1);
                }
                // What was not written whole was not committed.
                _ => break,
            }
            left = left.saturating_sub(used);
            at = layout.next(at, used);
        }
        Ok(committed)
    }

    fn check(
        read: ReadAt<'_>,
        layout: &Layout,
        tag: &Tag,
        logical: u32,
        sequence: u32,
    ) -> Result<(), JournalError> {
        if matches!(tag.sum, Sum::None) {
            return Ok(());
        }
        let content = layout.block(read, logical)?;
        let sum = checksum(checksum(layout.seed, &sequence.to_be_bytes()), &content);
        let holds = match tag.sum {
            Sum::None => true,
            Sum::Half(half) => half == sum as u16,
            Sum::Full(full) => full == sum,
        };
        match holds {
            true => Ok(()),
            false => Err(JournalError::Damaged(
                "a block of a committed transaction is damaged",
            )),
        }
    }
}

/// Whether transaction `a` is later than `b`; sequence numbers wrap around.
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// Reads the inode of the journal.
fn journal_inode(read: ReadAt<'_>, superblock: &[u8], block_size: u64) -> Result<Vec<u8>, JournalError> {
    let number = le32(superblock, 0xe0);
    let per_group = le32(superblock, 0x28);
    let size = u64::from(le16(superblock, 0x58));
    if number == 0 || number > per_group || !(128..=block_size).contains(&size) {
        return Err(JournalError::Damaged("it is not within this file system"));
    }
    let wide = le32(superblock, 0x60) & INCOMPAT_64BIT != 0 && le16(superblock, 0xfe) >= 64;
    let group_0 = if block_size == 1024 {
        2 * block_size
    } else {
        block_size
    };
    let mut group = [0; 64];
    read(group_0, &mut group)?;
    let high = if wide {
        u64::from(le32(&group, 0x28)) << 32
    } else {
        0
    };
    let table = u64::from(le32(&group, 8)) | high;
    let mut inode = vec![0; 128];
    read(table * block_size + u64::from(number - 1) * size, &mut inode)?;
    Ok(inode)
}

/// The extents of an inode, in order.
fn extents(read: ReadAt<'_>, inode: &[u8], block_size: u64) -> Result<Vec<Extent>, JournalError> {
    const EXTENTS_FLAG: u32 = 0x8_0000;
    const MAX_DEPTH: usize = 5;
    const MAX_NODES: usize = 10_000;
    if le32(inode, 0x20) & EXTENTS_FLAG == 0 {
        return Err(JournalError::Damaged("it has no extents (an ext3 journal)"));
    }
    let mut found = Vec::new();
    let mut pending = vec![(inode[0x28..0x28 + 60].to_vec(), MAX_DEPTH)];
    let mut visited = 0;
    while let Some((node, depth_left)) = pending.pop() {
        visited += 1;
        let entries = usize::from(le16(&node, 2));
        let depth = usize::from(le16(&node, 6));
        let fits = 12 + entries * 12 <= node.len();
        if le16(&node, 0) != 0xf30a || !fits || depth > depth_left || visited > MAX_NODES {
            return Err(JournalError::Damaged("its extents are damaged"));
        }
        for entry in node[12..12 + entries * 12].chunks_exact(12) {
            if depth == 0 {
                found.push(Extent {
                    logical: le32(entry, 0),
                    length: u32::from(le16(entry, 4)),
                    physical: u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8)),
                });
            } else {
                let leaf = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
                let mut block = vec![0; block_size as usize];
                read(leaf.saturating_mul(block_size), &mut block)?;
                pending.push((block, depth - 1));
            }
        }
    }
    found.sort_by_key(|extent| extent.logical);
    Ok(found)
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
#[path = "journal_test.rs"]
mod tests;
