//! A simulated file system for tests: it loses what was not synced.
//!
//! Every write is kept sector by sector until its file is synced; a crash applies an arbitrary subset of
//! them, each sector whole or not at all, in the order in which they were written. Creations, renames and
//! removals take effect in order, and a crash keeps an arbitrary prefix of those that were not synced. A
//! fuse makes the process die within an operation: that one is applied or not, and all later ones fail.
//!
//! What it does not simulate: a device that loses what was synced, sectors torn within, and a file system
//! that reorders its own metadata.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::storage::{Access, Directory, Lock, Storage};
use crate::virtio::buffers::Buffers;

const SECTOR: u64 = 512;
type Sector = [u8; SECTOR as usize];

/// Name of the source in [`State::names`].
const SOURCE: &str = "source";

#[derive(Default, Clone)]
struct FileState {
    size: u64,
    durable_size: u64,
    current: BTreeMap<u64, Sector>,
    durable: BTreeMap<u64, Sector>,
    pending: Vec<(u64, Sector)>,
}

#[derive(Clone, PartialEq, Eq)]
enum NameChange {
    Link(String, usize),
    Unlink(String),
}

#[derive(Default)]
struct State {
    files: Vec<FileState>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    pending_names: Vec<NameChange>,
    /// Counts crashes: handles of an earlier life are dead.
    life: u64,
    /// Operations until the process dies.
    fuse: Option<u64>,
    /// Writes until the file system is full for one of them.
    full_in: Option<u64>,
    /// The file system is full.
    full: bool,
    random: u64,
}

impl State {
    fn random(&mut self) -> u64 {
        // xorshift64*: a test's choices are the same whenever it is run again.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33
    }

    /// Whether the operation that begins now is carried out, and whether the process lives on.
    fn spend(&mut self) -> (bool, io::Result<()>) {
        match self.fuse {
            Some(0) => (false, Err(dead())),
            Some(1) => {
                self.fuse = Some(0);
                (self.random().is_multiple_of(2), Err(dead()))
            }
            Some(left) => {
                self.fuse = Some(left - 1);
                (true, Ok(()))
            }
            None => (true, Ok(())),
        }
    }

    fn rename_now(names: &mut BTreeMap<String, usize>, change: &NameChange) {
        match change {
            NameChange::Link(name, file) => drop(names.insert(name.clone(), *file)),
            NameChange::Unlink(name) => drop(names.remove(name)),
        }
    }

    fn change(&mut self, change: NameChange) {
        Self::rename_now(&mut self.names, &change);
        self.pending_names.push(change);
    }
}

fn dead() -> io::Error {
    io::Error::other("the simulated process is dead")
}

/// The file system.
#[derive(Clone, Default)]
pub(super) struct Sim {
    state: Arc<Mutex<State>>,
}

struct SimFile {
    sim: Sim,
    file: usize,
    life: u64,
}

/// A directory as one life of the process sees it.
pub(super) struct SimDirectory {
    sim: Sim,
    life: u64,
}

impl Sim {
    /// A file system with a source of `size` bytes of zeros.
    pub(super) fn new(size: u64, seed: u64) -> Sim {
        let sim = Sim::default();
        {
            let mut state = sim.lock();
            state.random = seed | 1;
            state.files.push(FileState {
                size,
                durable_size: size,
                ..FileState::default()
            });
            state.names.insert(SOURCE.into(), 0);
            state.durable_names = state.names.clone();
        }
        sim
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn directory(&self) -> Box<dyn Directory> {
        Box::new(SimDirectory {
            sim: self.clone(),
            life: self.lock().life,
        })
    }

    /// Lets the process die after so many operations.
    pub(super) fn set_fuse(&self, operations: u64) {
        self.lock().fuse = Some(operations + 1);
    }

    /// Lets the write after so many others find the file system full.
    pub(super) fn set_full_in(&self, writes: u64) {
        self.lock().full_in = Some(writes);
    }

    /// Has every write find the file system full, or none any more.
    pub(super) fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// Runs `check` with nothing going wrong.
    pub(super) fn in_peace<T>(&self, check: impl FnOnce() -> T) -> T {
        let (fuse, full_in) = {
            let mut state = self.lock();
            (state.fuse.take(), state.full_in.take())
        };
        let result = check();
        let mut state = self.lock();
        (state.fuse, state.full_in) = (fuse, full_in);
        result
    }

    /// Whether the process has died by its fuse.
    pub(super) fn is_dead(&self) -> bool {
        self.lock().fuse == Some(0)
    }

    /// Loses power: what is left is what was synced and an arbitrary part of what was not.
    pub(super) fn crash(&self) {
        let mut state = self.lock();
        state.life += 1;
        state.fuse = None;
        state.full_in = None;
        let keep = match state.pending_names.len() as u64 {
            0 => 0,
            n => state.random() % (n + 1),
        };
        let pending: Vec<_> = state.pending_names.drain(..).collect();
        for change in &pending[..keep as usize] {
            State::rename_now(&mut state.durable_names, change);
        }
        state.names = state.durable_names.clone();
        // All, none or any of the writes: extremes are as likely as mixtures.
        let mode = state.random() % 3;
        for index in 0..state.files.len() {
            let pending = std::mem::take(&mut state.files[index].pending);
            for (sector, content) in pending {
                if mode == 0 || mode == 1 && state.random().is_multiple_of(2) {
                    state.files[index].durable.insert(sector, content);
                }
            }
            let lose_size = state.random().is_multiple_of(2);
            let file = &mut state.files[index];
            if lose_size {
                file.size = file.durable_size;
            } else {
                file.durable_size = file.size;
            }
            file.current = file.durable.clone();
        }
    }
}

impl SimFile {
    fn with<T>(&self, run: impl FnOnce(&mut FileState) -> T) -> io::Result<T> {
        let mut state = self.sim.lock();
        if state.life != self.life || state.fuse == Some(0) {
            return Err(dead());
        }
        Ok(run(&mut state.files[self.file]))
    }

    fn put(&self, sectors: Vec<(u64, Sector)>) -> io::Result<()> {
        let mut state = self.sim.lock();
        if state.life != self.life {
            return Err(dead());
        }
        if state.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match state.full_in {
            Some(0) => {
                state.full_in = None;
                // A part has been written, as it happens.
                let part = state.random() as usize % (sectors.len() + 1);
                let file = &mut state.files[self.file];
                for (sector, content) in sectors.into_iter().take(part) {
                    file.current.insert(sector, content);
                    file.pending.push((sector, content));
                }
                return Err(io::ErrorKind::StorageFull.into());
            }
            Some(left) => state.full_in = Some(left - 1),
            None => {}
        }
        let (apply, result) = state.spend();
        if apply {
            let file = &mut state.files[self.file];
            for (sector, content) in sectors {
                file.current.insert(sector, content);
                file.pending.push((sector, content));
            }
        }
        result
    }
}

impl Storage for SimFile {
    fn size(&self) -> io::Result<u64> {
        self.with(|file| file.size)
    }

    fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; buffers.len() as usize];
        self.with(|file| {
            if offset + bytes.len() as u64 > file.size {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            for (i, chunk) in bytes.chunks_mut(SECTOR as usize).enumerate() {
                assert!(offset.is_multiple_of(SECTOR), "reads are aligned to sectors");
                if let Some(sector) = file.current.get(&(offset / SECTOR + i as u64)) {
                    chunk.copy_from_slice(&sector[..chunk.len()]);
                }
            }
            Ok(())
        })??;
        buffers.copy_from(&bytes);
        Ok(())
    }

    fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(SECTOR) && buffers.len().is_multiple_of(SECTOR));
        let mut bytes = vec![0; buffers.len() as usize];
        buffers.copy_to(&mut bytes);
        let sectors = bytes
            .chunks(SECTOR as usize)
            .enumerate()
            .map(|(i, chunk)| (offset / SECTOR + i as u64, chunk.try_into().unwrap()))
            .collect();
        self.put(sectors)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = offset / SECTOR..(offset + len).div_ceil(SECTOR);
        let sectors = self.with(|file| {
            file.current
                .range(range)
                .map(|(&sector, _)| (sector, [0; 512]))
                .collect()
        })?;
        self.put(sectors)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.sim.lock();
        if state.life != self.life {
            return Err(dead());
        }
        let (apply, result) = state.spend();
        if apply {
            let file = &mut state.files[self.file];
            for (sector, content) in std::mem::take(&mut file.pending) {
                file.durable.insert(sector, content);
            }
            file.durable_size = file.size;
        }
        result
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.with(|file| {
            file.current
                .range(from / SECTOR..)
                .find(|(_, content)| **content != [0; 512])
                .map(|(&sector, _)| sector * SECTOR..(sector + 1) * SECTOR)
        })
    }

    fn lock(&self, _lock: Lock) -> io::Result<()> {
        Ok(())
    }
}

impl SimDirectory {
    fn change<T>(&self, run: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.sim.lock();
        if state.life != self.life {
            return Err(dead());
        }
        let (apply, result) = state.spend();
        if !apply {
            return Err(dead());
        }
        let done = run(&mut state)?;
        result.map(|()| done)
    }

    fn lookup(&self, name: &str) -> io::Result<Option<usize>> {
        let state = self.sim.lock();
        if state.life != self.life || state.fuse == Some(0) {
            return Err(dead());
        }
        Ok(state.names.get(name).copied())
    }

    fn handle(&self, file: usize) -> Arc<dyn Storage> {
        Arc::new(SimFile {
            sim: self.sim.clone(),
            file,
            life: self.life,
        })
    }
}

impl Directory for SimDirectory {
    fn open_source(&self, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.open(SOURCE, access)
    }

    fn make(&self) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, name: &str, _access: Access) -> io::Result<Arc<dyn Storage>> {
        match self.lookup(name)? {
            Some(file) => Ok(self.handle(file)),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn Storage>> {
        let file = self.change(|state| {
            if state.names.contains_key(name) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            state.files.push(FileState {
                size,
                ..FileState::default()
            });
            let file = state.files.len() - 1;
            state.change(NameChange::Link(name.into(), file));
            Ok(file)
        })?;
        Ok(self.handle(file))
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.lookup(name)? else {
            return Ok(None);
        };
        let mut bytes = vec![0; self.sim.lock().files[file].size as usize];
        let padded = bytes.len().next_multiple_of(SECTOR as usize);
        let mut whole = vec![0; padded];
        let state = self.sim.lock();
        for (i, chunk) in whole.chunks_mut(SECTOR as usize).enumerate() {
            if let Some(sector) = state.files[file].current.get(&(i as u64)) {
                chunk.copy_from_slice(sector);
            }
        }
        let len = bytes.len();
        bytes.copy_from_slice(&whole[..len]);
        Ok(Some(bytes))
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.change(|state| {
            let mut sectors = BTreeMap::new();
            for (i, chunk) in content.chunks(SECTOR as usize).enumerate() {
                let mut sector = [0; 512];
                sector[..chunk.len()].copy_from_slice(chunk);
                sectors.insert(i as u64, sector);
            }
            state.files.push(FileState {
                size: content.len() as u64,
                durable_size: content.len() as u64,
                current: sectors.clone(),
                durable: sectors,
                pending: Vec::new(),
            });
            let file = state.files.len() - 1;
            state.change(NameChange::Link(name.into(), file));
            // The directory is synced, and everything before with it.
            state.durable_names = state.names.clone();
            state.pending_names.clear();
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|state| {
            let file = *state.names.get(from).ok_or(io::ErrorKind::NotFound)?;
            state.change(NameChange::Link(to.into(), file));
            state.change(NameChange::Unlink(from.into()));
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(|state| {
            if state.names.contains_key(name) {
                state.change(NameChange::Unlink(name.into()));
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.change(|state| {
            state.durable_names = state.names.clone();
            state.pending_names.clear();
            Ok(())
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("sim").join(name)
    }

    fn source_path(&self) -> PathBuf {
        PathBuf::from("sim.raw")
    }
}
