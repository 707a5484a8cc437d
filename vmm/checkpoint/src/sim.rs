//! A directory that loses what was not synced, and what the tests of this crate share.
//!
//! Content is durable after the sync of its file, names after the sync of the directory. A crash keeps any
//! subset of the writes that were not synced, perhaps half of one, and any number of the first of the
//! changes of names.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use uuid::Uuid;

use crate::files::{Directory, Storage, Transfer};
use crate::{CHUNK, Description, Identity, Key, RamRange, Reader, RefusedCheckpoint, SavedDisk, Writer};

/// The smallest memory, 1 MiB, in chunks.
pub const CHUNKS: usize = 16;

#[derive(Clone, Debug)]
enum Change {
    Size(u64),
    Write(u64, Vec<u8>),
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(String, u64),
    Remove(String),
}

#[derive(Clone, Default)]
struct Inode {
    current: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone, Default)]
struct Content {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    pending_names: Vec<NameChange>,
    steps: u64,
    cut_at: Option<u64>,
    /// No change gets through, for want of room.
    full: bool,
}

/// The disk; clones are the same one.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<Content>>);

struct SimFile {
    disk: Disk,
    inode: u64,
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Size(size) => bytes.resize(*size as usize, 0),
        Change::Write(offset, data) => {
            let end = *offset as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset as usize..end].copy_from_slice(data);
        }
    }
}

fn apply_name(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Set(name, inode) => {
            names.retain(|_, other| other != inode);
            names.insert(name.clone(), *inode);
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

/// SplitMix64: a seed decides what a crash keeps.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

impl Disk {
    fn lock_content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap()
    }

    /// Changes made so far.
    pub fn steps(&self) -> u64 {
        self.lock_content().steps
    }

    /// Cuts the power at the change with this number: it and all later ones fail.
    pub fn cut_at(&self, step: u64) {
        self.lock_content().cut_at = Some(step);
    }

    /// Uses up all room, or gives some back.
    pub fn set_full(&self, full: bool) {
        self.lock_content().full = full;
    }

    /// What the disk holds after the power came back.
    pub fn crashed(&self, seed: u64) -> Disk {
        let mut random = Random(seed);
        let old = self.lock_content();
        let mut new = Content {
            names: old.durable_names.clone(),
            ..Content::default()
        };
        let kept = random.next(old.pending_names.len() as u64 + 1) as usize;
        for change in &old.pending_names[..kept] {
            apply_name(&mut new.names, change);
        }
        for (number, inode) in &old.inodes {
            let mut bytes = inode.durable.clone();
            for change in &inode.pending {
                match (random.next(3), change) {
                    (0, _) => {}
                    (1, Change::Write(offset, data)) => {
                        let torn = random.next(data.len() as u64 + 1) as usize;
                        apply(&mut bytes, &Change::Write(*offset, data[..torn].to_vec()));
                    }
                    _ => apply(&mut bytes, change),
                }
            }
            new.inodes.insert(
                *number,
                Inode {
                    current: bytes.clone(),
                    durable: bytes,
                    pending: Vec::new(),
                },
            );
        }
        new.durable_names = new.names.clone();
        Disk(Arc::new(Mutex::new(new)))
    }

    /// Another disk with the same content.
    pub fn copy(&self) -> Disk {
        let mut content = self.lock_content().clone();
        content.cut_at = None;
        Disk(Arc::new(Mutex::new(content)))
    }

    /// Content of a file.
    pub fn content(&self, name: &str) -> Vec<u8> {
        let content = self.lock_content();
        content.inodes[&content.names[name]].current.clone()
    }

    /// Replaces the content of a file behind everybody's back.
    pub fn replace(&self, name: &str, bytes: Vec<u8>) {
        let mut content = self.lock_content();
        let inode = content.names[name];
        content.inodes.get_mut(&inode).unwrap().current = bytes;
    }

    /// Names of all files.
    pub fn file_names(&self) -> Vec<String> {
        self.lock_content().names.keys().cloned().collect()
    }

    pub fn directory(&self) -> Arc<dyn Directory> {
        Arc::new(self.clone())
    }

    fn step(&self, change: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut content = self.lock_content();
        if content.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        content.steps += 1;
        let steps = content.steps;
        match content.cut_at {
            Some(cut) if steps > cut => Err(io::Error::other("no power")),
            // Begun, and perhaps kept; nobody hears of its success.
            Some(cut) if steps == cut => {
                change(&mut content);
                Err(io::Error::other("power cut"))
            }
            _ => {
                change(&mut content);
                Ok(())
            }
        }
    }

    /// A sync that is cut short has made nothing durable that it would have to.
    fn sync_step(&self, change: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut content = self.lock_content();
        content.steps += 1;
        if content.cut_at.is_some_and(|cut| content.steps >= cut) {
            return Err(io::Error::other("power cut"));
        }
        change(&mut content);
        Ok(())
    }

    fn file(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let inode = *self
            .lock_content()
            .names
            .get(name)
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            inode,
        }))
    }
}

impl Storage for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.lock_content().inodes[&self.inode].current.len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.change(Change::Size(size))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.size()
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.disk.lock_content();
        let bytes = &content.inodes[&self.inode].current;
        let start = offset as usize;
        let from = bytes
            .get(start..start + data.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        data.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write(offset, data.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync_step(|content| {
            let inode = content.inodes.get_mut(&self.inode).unwrap();
            inode.durable = inode.current.clone();
            inode.pending.clear();
        })
    }
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        self.disk.step(|content| {
            let inode = content.inodes.get_mut(&self.inode).unwrap();
            apply(&mut inode.current, &change);
            inode.pending.push(change);
        })
    }
}

impl Directory for Disk {
    fn lock(&self) -> io::Result<()> {
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<(String, bool)>> {
        Ok(self.file_names().into_iter().map(|name| (name, true)).collect())
    }

    fn create(&self, name: &str, _: Transfer) -> io::Result<Arc<dyn Storage>> {
        if self.lock_content().names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.step(|content| {
            let inode = content.inodes.keys().next_back().map_or(1, |last| last + 1);
            content.inodes.insert(inode, Inode::default());
            let change = NameChange::Set(name.to_owned(), inode);
            apply_name(&mut content.names, &change);
            content.pending_names.push(change);
        })?;
        self.file(name)
    }

    fn open(&self, name: &str, _: Transfer) -> io::Result<Arc<dyn Storage>> {
        self.file(name)
    }

    fn open_for_writing(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.file(name)
    }

    fn sync_files(&self, files: &[&dyn Storage]) -> io::Result<()> {
        files.iter().try_for_each(|file| file.sync())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step(|content| {
            let change = NameChange::Set(to.to_owned(), content.names[from]);
            apply_name(&mut content.names, &change);
            content.pending_names.push(change);
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let full = std::mem::take(&mut self.lock_content().full);
        let removed = self.step(|content| {
            let change = NameChange::Remove(name.to_owned());
            apply_name(&mut content.names, &change);
            content.pending_names.push(change);
        });
        self.set_full(full);
        removed
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_step(|content| {
            content.durable_names = content.names.clone();
            content.pending_names.clear();
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/checkpoint").join(name)
    }
}

pub fn key() -> Key {
    Key::new([0x42; 32])
}

pub fn saving_identity() -> Identity {
    Identity {
        checkpoint: Uuid::from_u128(0x1234),
        guest_uid: "0d5e9c1a".into(),
        machine_id: "machine".into(),
        host_boot_id: "saving boot".into(),
    }
}

pub fn resuming_identity() -> Identity {
    Identity {
        host_boot_id: "next boot".into(),
        ..saving_identity()
    }
}

pub fn description(chunks: usize) -> Description {
    let length = (chunks * CHUNK) as u64;
    Description {
        guest_name: "default/web".into(),
        incarnation: 3,
        owner_epoch: 7,
        vmm_version: "0.1.0".into(),
        saved_at_ms: 1_790_000_000_000,
        cpus: 2,
        memory_mib: length >> 20,
        ram: vec![RamRange {
            start: 0,
            offset: 0,
            length,
        }],
        disks: vec![SavedDisk {
            name: "root".into(),
            layers: vec![Uuid::from_u128(9)],
            write_session: 4,
        }],
        compatibility: serde_json::json!({ "cpuid": [1, 2, 3], "ratio": 0.1 }),
    }
}

/// Memory whose chunks are zero where `pattern` gives 0, else different from one another.
pub fn memory(pattern: impl Fn(usize) -> u8) -> Vec<u8> {
    let mut memory = vec![0; CHUNKS * CHUNK];
    for (number, chunk) in memory.chunks_exact_mut(CHUNK).enumerate() {
        let value = pattern(number);
        if value != 0 {
            chunk.fill(value);
            chunk[number] = value.wrapping_add(number as u8 + 1);
        }
    }
    memory
}

pub fn write(writer: &Writer, memory: &[u8], chunks: std::ops::Range<u64>) {
    writer
        .write(&[chunks], 1, |chunk, buffer| {
            let start = chunk as usize * CHUNK;
            buffer.copy_from_slice(&memory[start..start + buffer.len()]);
            Ok(())
        })
        .unwrap();
}

/// A disk with a finished checkpoint of `memory`.
pub fn saved(memory: &[u8], state: &[u8]) -> Disk {
    let disk = Disk::default();
    let bytes = memory.len() as u64;
    let mut writer = Writer::begin(disk.directory(), &key(), saving_identity(), bytes).unwrap();
    write(&writer, memory, 0..bytes / CHUNK as u64);
    writer.settle().unwrap();
    write(&writer, memory, 1..3);
    writer.finish(state, description(memory.len() / CHUNK)).unwrap();
    disk
}

pub fn open(disk: &Disk) -> Result<Reader, RefusedCheckpoint> {
    Reader::begin(disk.directory(), &key(), &resuming_identity())
}

/// All of memory, read chunk by chunk.
pub fn read_all(reader: &Reader) -> Vec<u8> {
    let mut buffer = crate::ChunkBuffer::new(1);
    (0..reader.chunks())
        .flat_map(|chunk| reader.read(chunk, 1, &mut buffer).unwrap().to_vec())
        .collect()
}
