//! Writing a checkpoint.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use understudy_vmm_control::session::MANIFEST;

use crate::files::{
    self, CHANGES, Directory, HostDirectory, INDEX, MEMORY, NAMES, NEW_MANIFEST, STATE, Storage, Transfer,
};
use crate::flusher::Flusher;
use crate::index::{COUNTER_LIMIT, Entry, LiveIndex};
use crate::lane::Lane;
use crate::manifest::{Description, Identity, Manifest, Sealed};
use crate::seal::{self, KEY, Key, Part, Place, Sealer, TAG};
use crate::{CHUNK, MAX_MEMORY, MAX_STATE};

/// So many bytes of memory are written between two syncs in the background: the final sync has no more than
/// this to make durable, and what runs beside it.
const SYNC_INTERVAL: u64 = 256 << 20;

/// Why a session could not be saved. The guest is unharmed and can run on, but see
/// [`SaveError::Unsettled`].
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The fields are what the messages say.
pub enum SaveError {
    /// A file operation failed.
    #[error("{action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The file system is full, or the quota used up.
    #[error(
        "{action} {path}: {source}; make room on that file system, or save to a directory on another one"
    )]
    Full {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Another process works in the directory.
    #[error(
        "{path} is in use by another process: a save that goes on, a saved guest that is still there, or a resumed one that needs it"
    )]
    Locked { path: PathBuf },
    /// The directory holds what no checkpoint has.
    #[error("{path} holds {name:?}, which is no part of a checkpoint; save to an empty directory")]
    NotEmpty { path: PathBuf, name: String },
    /// The directory holds a whole checkpoint.
    #[error("{path} holds a complete checkpoint; remove it first, or save to another directory")]
    Complete { path: PathBuf },
    /// Memory was left out.
    #[error(
        "chunk {chunk} of memory was not written, or its last write failed: the checkpoint would be incomplete"
    )]
    Absent { chunk: u64 },
    /// The caller could not read guest memory.
    #[error("reading guest memory at chunk {chunk}: {source}")]
    Fill { chunk: u64, source: io::Error },
    /// The cipher refused, or the counters are used up.
    #[error("sealing {part} failed")]
    Sealing { part: &'static str },
    /// The caller's numbers do not fit.
    #[error("a session that cannot be saved: {reason}")]
    Invalid { reason: String },
    /// [`Writer::finish`] failed with the manifest perhaps in its place, and could not take it back. Before
    /// the guest runs on, the checkpoint must be made stale by other means: the write sessions of its disks.
    #[error("{path} may be durable although the save failed, and could not be removed: {source}")]
    Unsettled { path: PathBuf, source: io::Error },
}

impl SaveError {
    fn io(action: &'static str, path: PathBuf, source: io::Error) -> SaveError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SaveError::Full { action, path, source }
            }
            _ => SaveError::Io { action, path, source },
        }
    }
}

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The round that is being written, from 1.
    pub round: u32,
    /// Bytes of memory written to disk so far, all rounds together.
    pub written_bytes: u64,
}

/// What a finished save has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Rounds, the final one included.
    pub rounds: u32,
    /// Chunks that hold data in the end.
    pub data_chunks: u64,
    /// Chunks that are zero in the end.
    pub zero_chunks: u64,
    /// Bytes of memory written to disk, all rounds together.
    pub written_bytes: u64,
    /// Bytes that all files take on disk.
    pub disk_bytes: u64,
}

/// A checkpoint that is being written. Dropped before [`Writer::finish`] it leaves files that are no
/// checkpoint; another save in the directory removes them.
pub struct Writer {
    directory: Arc<dyn Directory>,
    memory: Arc<dyn Storage>,
    flusher: Flusher,
    identity: Identity,
    salt: [u8; KEY],
    pub(crate) sealer: Sealer,
    pub(crate) index: LiveIndex,
    /// Where the index was written.
    settled: Option<Settled>,
    next_counter: AtomicU64,
    round: AtomicU32,
    written_bytes: AtomicU64,
}

/// An index that is durable.
struct Settled {
    sealed: Sealed,
    file: Arc<dyn Storage>,
}

impl Writer {
    /// Begins a checkpoint of `memory_bytes` of guest RAM in `directory`, which exists and is empty, or holds
    /// what a failed save left. The directory stays locked until the writer, and the [`Saved`] that comes of
    /// it, are dropped. At first all chunks are absent.
    ///
    /// # Errors
    /// When the directory holds anything else, is in use, or cannot be written.
    pub fn open(
        directory: &Path,
        key: &Key,
        identity: Identity,
        memory_bytes: u64,
    ) -> Result<Writer, SaveError> {
        let opened = HostDirectory::open(directory)
            .map_err(|source| SaveError::io("opening", directory.to_owned(), source))?;
        Writer::begin(Arc::new(opened), key, identity, memory_bytes)
    }

    pub(crate) fn begin(
        directory: Arc<dyn Directory>,
        key: &Key,
        identity: Identity,
        memory_bytes: u64,
    ) -> Result<Writer, SaveError> {
        if memory_bytes == 0 || memory_bytes > MAX_MEMORY || !memory_bytes.is_multiple_of(CHUNK as u64) {
            return Err(SaveError::Invalid {
                reason: format!("{memory_bytes} bytes of memory"),
            });
        }
        clear(directory.as_ref())?;
        let failed = |action, name| {
            let path = directory.path(name);
            move |source| SaveError::io(action, path, source)
        };
        // All names are durable before anybody waits for the end of the save.
        let memory = directory
            .create(MEMORY, Transfer::Direct)
            .map_err(failed("creating", MEMORY))?;
        memory
            .set_size(memory_bytes)
            .map_err(failed("extending", MEMORY))?;
        for name in [STATE, INDEX, CHANGES, NEW_MANIFEST] {
            directory
                .create(name, Transfer::Cached)
                .map_err(failed("creating", name))?;
        }
        directory.sync().map_err(failed("syncing", ""))?;
        let flusher = Flusher::start(memory.clone()).map_err(failed("starting a thread to sync", MEMORY))?;

        let sealing = |_| SaveError::Sealing { part: "keys" };
        let salt = seal::fresh_salt().map_err(sealing)?;
        let sealer = Sealer::derive(key, &salt, identity.checkpoint, &identity.guest_uid).map_err(sealing)?;
        Ok(Writer {
            memory,
            flusher,
            identity,
            salt,
            sealer,
            index: LiveIndex::new(memory_bytes / CHUNK as u64),
            settled: None,
            next_counter: AtomicU64::new(1),
            round: AtomicU32::new(1),
            written_bytes: AtomicU64::new(0),
            directory,
        })
    }

    /// Guest RAM in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.index.chunks() * CHUNK as u64
    }

    /// A lane for one thread.
    pub fn lane(&self) -> Lane<'_> {
        Lane::new(self)
    }

    /// Writes all chunks of `ranges` (numbers of chunks; ranges that do not overlap) with `threads` threads.
    /// `fill` copies the chunk with this number into a buffer; it is called from all threads. With one thread no
    /// thread is started.
    ///
    /// # Errors
    /// The first failure of any thread; the others stop at their next chunks.
    ///
    /// # Panics
    /// When a range reaches beyond the end of memory.
    pub fn write(
        &self,
        ranges: &[Range<u64>],
        threads: usize,
        fill: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
    ) -> Result<(), SaveError> {
        let pieces = Mutex::new(ranges.iter().flat_map(pieces));
        let stop = AtomicBool::new(false);
        let work = || {
            let mut lane = self.lane();
            while !stop.load(Ordering::Relaxed) {
                let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((first, count)) = next else { break };
                let result = lane.write(first, count, &fill);
                if let Err(error) = result {
                    stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        if threads <= 1 {
            return work();
        }
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    thread::Builder::new()
                        .name("save-memory".into())
                        .spawn_scoped(scope, work)
                })
                .collect();
            let mut result = Ok(());
            for worker in workers {
                let own = match worker {
                    Ok(worker) => worker
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    Err(source) => Err(SaveError::io(
                        "starting a thread to write",
                        self.directory.path(MEMORY),
                        source,
                    )),
                };
                result = result.and(own);
            }
            result
        })
    }

    /// Notes that these chunks are zero, for memory that the guest never touched: nobody reads it.
    ///
    /// # Panics
    /// When the range reaches beyond the end of memory.
    pub fn zero(&self, chunks: Range<u64>) {
        chunks.for_each(|chunk| self.index.set(chunk, Entry::Zero));
    }

    /// Begins the next round, in which chunks are written again that have changed. What was written so far is
    /// made durable in the background.
    pub fn begin_round(&self) {
        self.round.fetch_add(1, Ordering::Relaxed);
        self.flusher.request();
    }

    /// Makes the index durable as it is now, so that [`Writer::finish`] has to write only what changes after
    /// this: the guest need not be paused for what grows with its memory. May be done again.
    ///
    /// # Errors
    /// When a chunk is absent, or the disk fails.
    pub fn settle(&mut self) -> Result<(), SaveError> {
        self.settled = Some(self.write_index()?);
        Ok(())
    }

    fn write_index(&mut self) -> Result<Settled, SaveError> {
        let index = self.index.settle().map_err(|chunk| SaveError::Absent { chunk })?;
        let (sealed, bytes) = self.frames(Part::Index, index)?;
        let file = self.put(INDEX, &bytes)?;
        file.sync()
            .map_err(|source| SaveError::io("syncing", self.directory.path(INDEX), source))?;
        Ok(Settled { sealed, file })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            round: self.round.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
        }
    }

    /// Makes everything durable and then gives the manifest its name: when this returns, the checkpoint
    /// outlives a power cut; cut short at any point there is no checkpoint, or a whole one.
    ///
    /// # Errors
    /// When a chunk is absent, the disk fails, or what is described does not fit memory. What was written is
    /// removed then, as far as the disk lets us; see [`SaveError::Unsettled`].
    pub fn finish(self, state: &[u8], description: Description) -> Result<Saved, SaveError> {
        let directory = self.directory.clone();
        let prepared = match self.prepare(state, description) {
            Ok(report) => report,
            Err(error) => {
                // What cannot be removed is no checkpoint: it was never given its name. The next save in
                // the directory tries again and reports.
                let _ = files::dismantle(directory.as_ref());
                return Err(error);
            }
        };
        let named = directory
            .rename(NEW_MANIFEST, MANIFEST)
            .and_then(|()| directory.sync());
        match named {
            Ok(()) => Ok(Saved {
                directory,
                report: prepared,
            }),
            Err(source) => Err(match files::dismantle(directory.as_ref()) {
                Err((name, source)) if name == MANIFEST => SaveError::Unsettled {
                    path: directory.path(name),
                    source,
                },
                _ => SaveError::io("giving its name to", directory.path(MANIFEST), source),
            }),
        }
    }

    /// Makes everything durable, the manifest under its temporary name.
    fn prepare(mut self, state: &[u8], description: Description) -> Result<Report, SaveError> {
        if state.len() as u64 > MAX_STATE {
            return Err(SaveError::Invalid {
                reason: format!("a state of {} bytes, where {MAX_STATE} are possible", state.len()),
            });
        }
        let settled = match self.settled.take() {
            Some(settled) => settled,
            None => self.write_index()?,
        };
        let changes = self
            .index
            .changes()
            .map_err(|chunk| SaveError::Absent { chunk })?;
        let data_chunks = self.index.data_chunks();
        let progress = self.progress();
        let (sealed_changes, changes_bytes) = self.frames(Part::Changes, changes)?;
        let (sealed_state, state_bytes) = self.frames(Part::State, state.to_vec())?;
        let manifest = self.manifest(
            description,
            progress.round,
            [settled.sealed, sealed_changes, sealed_state],
        )?;
        let failed = |action, name| {
            let path = self.directory.path(name);
            move |source| SaveError::io(action, path, source)
        };
        // The manifest is synced beside the rest: one wait for the disk, not two.
        let mut all = vec![self.memory.clone()];
        for (name, bytes) in [
            (CHANGES, changes_bytes),
            (STATE, state_bytes),
            (NEW_MANIFEST, manifest),
        ] {
            all.push(self.put(name, &bytes)?);
        }
        let files: Vec<&dyn Storage> = all.iter().map(|file| file.as_ref()).collect();
        self.directory
            .sync_files(&files)
            .map_err(failed("syncing the files of", ""))?;
        let mut disk_bytes = 0;
        for file in std::iter::once(&settled.file).chain(&all) {
            disk_bytes += file
                .allocated()
                .map_err(failed("asking for the size of files of", ""))?;
        }
        self.flusher.stop().map_err(failed("syncing", MEMORY))?;
        Ok(Report {
            rounds: progress.round,
            data_chunks,
            zero_chunks: self.index.chunks() - data_chunks,
            written_bytes: progress.written_bytes,
            disk_bytes,
        })
    }

    /// Gives up, and removes what was written.
    ///
    /// # Errors
    /// When files cannot be removed. They are no checkpoint.
    pub fn abort(self) -> Result<(), SaveError> {
        let directory = self.directory.clone();
        drop(self);
        dismantle(directory.as_ref())
    }

    /// Writes the whole content of a small file; not durable yet.
    fn put(&self, name: &'static str, bytes: &[u8]) -> Result<Arc<dyn Storage>, SaveError> {
        let failed = |action| move |source| SaveError::io(action, self.directory.path(name), source);
        let file = self.directory.open_for_writing(name).map_err(failed("opening"))?;
        file.write(bytes, 0).map_err(failed("writing"))?;
        Ok(file)
    }

    fn manifest(
        &self,
        description: Description,
        rounds: u32,
        [index, changes, state]: [Sealed; 3],
    ) -> Result<Vec<u8>, SaveError> {
        let invalid = |reason| SaveError::Invalid { reason };
        let identity = self.identity.clone();
        let manifest = Manifest {
            checkpoint: identity.checkpoint,
            guest_uid: identity.guest_uid,
            guest_name: description.guest_name,
            incarnation: description.incarnation,
            owner_epoch: description.owner_epoch,
            machine_id: identity.machine_id,
            host_boot_id: identity.host_boot_id,
            vmm_version: description.vmm_version,
            saved_at_ms: description.saved_at_ms,
            cpus: description.cpus,
            memory_mib: description.memory_mib,
            ram: description.ram,
            disks: description.disks,
            chunk_bytes: CHUNK as u64,
            chunks: self.index.chunks(),
            rounds,
            index,
            changes,
            state,
            compatibility: description.compatibility,
        };
        manifest.check().map_err(invalid)?;
        let text = manifest
            .encode(&self.sealer, &self.salt)
            .map_err(|e| invalid(e.to_string()))?;
        if text.len() as u64 > crate::manifest::MAX_MANIFEST {
            return Err(invalid(format!("a manifest of {} bytes", text.len())));
        }
        Ok(text)
    }

    /// Seals a part as frames, each followed by its tag.
    fn frames(&self, part: Part, mut bytes: Vec<u8>) -> Result<(Sealed, Vec<u8>), SaveError> {
        let total = bytes.len() as u64;
        let count = bytes.len().div_ceil(CHUNK);
        let first_counter = self.counters(count as u64)?;
        let mut sealed = Vec::with_capacity(bytes.len() + count * TAG);
        for (number, frame) in (0..).zip(bytes.chunks_mut(CHUNK)) {
            let place = Place { part, number, total };
            let tag = self
                .sealer
                .seal(place, first_counter + number, frame)
                .map_err(|_| SaveError::Sealing {
                    part: match part {
                        Part::Memory => MEMORY,
                        Part::Index => INDEX,
                        Part::Changes => CHANGES,
                        Part::State => STATE,
                    },
                })?;
            sealed.extend_from_slice(frame);
            sealed.extend_from_slice(&tag);
        }
        let part = Sealed {
            length: total,
            first_counter,
        };
        Ok((part, sealed))
    }

    /// Takes `count` counters that nothing else of this save has; the first of them.
    pub(crate) fn counters(&self, count: u64) -> Result<u64, SaveError> {
        let first = self.next_counter.fetch_add(count, Ordering::Relaxed);
        if first + count > COUNTER_LIMIT {
            return Err(SaveError::Sealing { part: MEMORY });
        }
        Ok(first)
    }

    /// Writes sealed chunks to their place.
    pub(crate) fn write_memory(&self, bytes: &[u8], first: u64) -> Result<(), SaveError> {
        self.memory
            .write(bytes, first * CHUNK as u64)
            .map_err(|source| SaveError::io("writing", self.directory.path(MEMORY), source))?;
        let length = bytes.len() as u64;
        let before = self.written_bytes.fetch_add(length, Ordering::Relaxed);
        if before / SYNC_INTERVAL != (before + length) / SYNC_INTERVAL {
            self.flusher.request();
        }
        Ok(())
    }
}

/// A range in pieces that fit a lane, none across a multiple of a lane's size: (first, count).
fn pieces(range: &Range<u64>) -> impl Iterator<Item = (u64, usize)> + use<> {
    const CHUNKS: u64 = Lane::CHUNKS as u64;
    let mut next = range.start;
    let end = range.end;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let first = next;
        next = end.min((first / CHUNKS + 1) * CHUNKS);
        Some((first, (next - first) as usize))
    })
}

/// Takes the directory's lock and removes what a failed save left in it.
fn clear(directory: &dyn Directory) -> Result<(), SaveError> {
    let path = || directory.path("");
    directory.lock().map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => SaveError::Locked { path: path() },
        _ => SaveError::io("locking", path(), source),
    })?;
    let names = directory
        .names()
        .map_err(|source| SaveError::io("listing", path(), source))?;
    for (name, is_file) in &names {
        if !NAMES.contains(&name.as_str()) || !is_file {
            return Err(SaveError::NotEmpty {
                path: path(),
                name: name.clone(),
            });
        }
        if name == MANIFEST {
            return Err(SaveError::Complete { path: path() });
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    dismantle(directory)
}

fn dismantle(directory: &dyn Directory) -> Result<(), SaveError> {
    files::dismantle(directory)
        .map_err(|(name, source)| SaveError::io("removing", directory.path(name), source))
}

/// A checkpoint that is durable, in the hands of the VMM that saved it. Its directory stays locked as long as
/// this lives, so that nobody resumes from it while the saved guest might run on.
pub struct Saved {
    directory: Arc<dyn Directory>,
    report: Report,
}

impl Saved {
    /// What it has cost.
    pub fn report(&self) -> Report {
        self.report
    }

    /// Makes the checkpoint void, durably, and removes it: the guest runs on after this.
    ///
    /// # Errors
    /// When files cannot be removed. With [`SaveError::Unsettled`] the checkpoint may still be whole; else
    /// it is void and some of its files are left.
    pub fn void(self) -> Result<(), SaveError> {
        files::dismantle(self.directory.as_ref()).map_err(|(name, source)| {
            let path = self.directory.path(name);
            if name == MANIFEST {
                SaveError::Unsettled { path, source }
            } else {
                SaveError::io("removing", path, source)
            }
        })
    }
}
