//! The root file system of a disk: an ext4 on the whole disk or in a partition (GPT or MBR).

use std::error::Error;
use std::io;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::journal::{JournalError, Overlay};
use crate::block::{Disk, SECTOR};

/// Why a disk has no root file system that we can read.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// The disk could not be read.
    #[error("disk {disk}: reading it at {offset}: {source}")]
    Read {
        /// Name of the disk.
        disk: String,
        /// Where.
        offset: u64,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing there.
    #[error(
        "disk {disk} has no ext4 root file system, neither on the whole disk nor in a partition{details}; boot.fromDisk needs one that holds /boot (no LVM, no encryption), else name kernel and initrd in boot.files"
    )]
    None {
        /// Name of the disk.
        disk: String,
        /// What was found instead, from `" ("` on, or empty.
        details: String,
    },
}

/// A root file system.
pub struct Root {
    /// Its content. What its journal holds counts as written.
    pub fs: Ext4,
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Partition {
    start: u64,
    size: u64,
    /// Whether its type says that it is a root file system.
    root: bool,
}

/// Finds the root file system: the whole disk, else the partition whose type says so, else the largest
/// with an ext4 that holds `/boot`.
pub fn find_root(disk: &Arc<Disk>) -> Result<Root, FilesystemError> {
    let mut details = Vec::new();
    let mut candidates = vec![Partition {
        start: 0,
        size: disk.size(),
        root: true,
    }];
    let mut partitions = partitions(disk)?;
    partitions.sort_by_key(|partition| std::cmp::Reverse((partition.root, partition.size)));
    candidates.extend(partitions);
    for candidate in candidates {
        if !has_ext4(disk, candidate)? {
            continue;
        }
        match open(disk, candidate) {
            Ok(fs) => match fs.exists("/boot") {
                Ok(true) => return Ok(Root { fs }),
                Ok(false) => details.push(format!("the ext4 at byte {} has no /boot", candidate.start)),
                Err(error) => details.push(format!("the ext4 at byte {}: {error}", candidate.start)),
            },
            Err(error) => details.push(format!("the ext4 at byte {}: {error}", candidate.start)),
        }
    }
    Err(FilesystemError::None {
        disk: disk.name().to_owned(),
        details: match details.is_empty() {
            true => String::new(),
            false => format!(" ({})", details.join("; ")),
        },
    })
}

fn open(disk: &Arc<Disk>, partition: Partition) -> Result<Ext4, Ext4Error> {
    let window = Window::new(disk.clone(), partition).map_err(|error| Ext4Error::Io(Box::new(error)))?;
    Ext4::load(Box::new(window))
}

fn read(disk: &Disk, offset: u64, buffer: &mut [u8]) -> Result<(), FilesystemError> {
    disk.read_at(buffer, offset)
        .map_err(|source| FilesystemError::Read {
            disk: disk.name().to_owned(),
            offset,
            source,
        })
}

fn has_ext4(disk: &Disk, partition: Partition) -> Result<bool, FilesystemError> {
    const SUPERBLOCK: u64 = 1024;
    const MAGIC_OFFSET: u64 = 0x38;
    if partition.size < 4096 {
        return Ok(false);
    }
    let mut magic = [0; 2];
    read(disk, partition.start + SUPERBLOCK + MAGIC_OFFSET, &mut magic)?;
    Ok(u16::from_le_bytes(magic) == 0xef53)
}

/// Partitions of the disk by its GPT or MBR; none when it has neither.
fn partitions(disk: &Disk) -> Result<Vec<Partition>, FilesystemError> {
    if disk.size() < 4 * SECTOR {
        return Ok(Vec::new());
    }
    let mut head = [0u8; 2 * SECTOR as usize];
    read(disk, 0, &mut head)?;
    let (mbr, gpt) = head.split_at(SECTOR as usize);
    if mbr[510..512] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let found = if &gpt[0..8] == b"EFI PART" {
        gpt_partitions(disk, gpt)?
    } else {
        mbr_partitions(mbr)
    };
    let fits = |partition: &Partition| {
        partition.size > 0
            && partition
                .start
                .checked_add(partition.size)
                .is_some_and(|end| end <= disk.size())
    };
    Ok(found.into_iter().filter(fits).collect())
}

/// Type GUID of a root file system for x86-64 (Discoverable Partitions Specification), as on disk.
const ROOT_X86_64: [u8; 16] = [
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
];

fn gpt_partitions(disk: &Disk, header: &[u8]) -> Result<Vec<Partition>, FilesystemError> {
    const MAX_ENTRIES: u32 = 1024;
    let table = le64(header, 72).saturating_mul(SECTOR);
    let count = le32(header, 80).min(MAX_ENTRIES);
    let entry_size = le32(header, 84);
    if !(128..=4096).contains(&entry_size) {
        return Ok(Vec::new());
    }
    let size = u64::from(count) * u64::from(entry_size);
    if table.checked_add(size).is_none_or(|end| end > disk.size()) {
        return Ok(Vec::new());
    }
    let mut entries = vec![0; size as usize];
    read(disk, table, &mut entries)?;
    Ok(entries
        .chunks_exact(entry_size as usize)
        .filter(|entry| entry[0..16] != [0; 16])
        .map(|entry| {
            let (first, last) = (le64(entry, 32), le64(entry, 40));
            Partition {
                start: first.saturating_mul(SECTOR),
                size: last
                    .saturating_sub(first)
                    .saturating_add(1)
                    .saturating_mul(SECTOR),
                root: entry[0..16] == ROOT_X86_64,
            }
        })
        .collect())
}

/// The four primary partitions.
fn mbr_partitions(mbr: &[u8]) -> Vec<Partition> {
    mbr[446..510]
        .chunks_exact(16)
        .filter(|entry| entry[4] != 0)
        .map(|entry| Partition {
            start: u64::from(le32(entry, 8)) * SECTOR,
            size: u64::from(le32(entry, 12)) * SECTOR,
            root: false,
        })
        .collect()
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// Bytes that are read from the disk at a time.
const WINDOW: usize = 128 << 10;

/// Reads a partition through a small window, because files are read block by block.
struct Window {
    disk: Arc<Disk>,
    partition: Partition,
    overlay: Overlay,
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn new(disk: Arc<Disk>, partition: Partition) -> Result<Window, JournalError> {
        let overlay = Overlay::load(&mut |at, buffer| read_partition(&disk, partition, at, buffer))?;
        Ok(Window {
            disk,
            partition,
            overlay,
            start: 0,
            bytes: Vec::new(),
        })
    }

    fn fill(&mut self, at: u64) -> io::Result<()> {
        let length = (self.partition.size - at).min(WINDOW as u64);
        self.bytes.resize(length as usize, 0);
        let (disk, partition) = (&self.disk, self.partition);
        let result = self.overlay.read(
            &mut |at, buffer| read_partition(disk, partition, at, buffer),
            at,
            &mut self.bytes,
        );
        if result.is_err() {
            self.bytes.clear();
        }
        self.start = at;
        result
    }
}

/// Reads within a partition: what a damaged file system names beyond its end is not there.
fn read_partition(disk: &Disk, partition: Partition, at: u64, buffer: &mut [u8]) -> io::Result<()> {
    let within = at
        .checked_add(buffer.len() as u64)
        .is_some_and(|end| end <= partition.size);
    if !within {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the file system goes on beyond the end of its partition or disk, at byte {at}"),
        ));
    }
    disk.read_at(buffer, partition.start + at)
}

impl Ext4Read for Window {
    fn read(&mut self, start: u64, mut wanted: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut at = start;
        while !wanted.is_empty() {
            if at >= self.partition.size {
                return Err(format!(
                    "the file system goes on beyond the end of its partition or disk, at byte {at}"
                )
                .into());
            }
            let held = self.start..self.start + self.bytes.len() as u64;
            if !held.contains(&at) {
                self.fill(at)?;
            }
            let from = (at - self.start) as usize;
            let length = wanted.len().min(self.bytes.len() - from);
            wanted[..length].copy_from_slice(&self.bytes[from..from + length]);
            wanted = &mut wanted[length..];
            at += length as u64;
        }
        Ok(())
    }
}
