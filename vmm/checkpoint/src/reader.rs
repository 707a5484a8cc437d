//! Reading a checkpoint.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use understudy_vmm_control::session::{CONSUMED, MANIFEST, Refusal};

use crate::CHUNK;
use crate::buffer::ChunkBuffer;
use crate::files::{
    self, CHANGES, Directory, HostDirectory, INDEX, MEMORY, STATE, Storage, Transfer, read_small,
};
use crate::index::{Entry, Index};
use crate::manifest::{Identity, MAX_MANIFEST, Manifest, Sealed};
use crate::refused::RefusedCheckpoint;
use crate::seal::{Key, Part, Place, Sealer, TAG};

/// Why a chunk of memory could not be had: `CheckpointDamaged`, found late.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The fields are what the messages say.
pub enum ChunkError {
    /// Its bytes are not what was written.
    #[error("chunk {chunk} of {path} is not what was written; its guest cannot go on")]
    Damaged { chunk: u64, path: PathBuf },
    /// It cannot be read.
    #[error("reading {path} at chunk {chunk}: {source}")]
    Io {
        chunk: u64,
        path: PathBuf,
        source: io::Error,
    },
}

/// A checkpoint whose manifest, index and state are verified. Memory is verified chunk by chunk as it is read,
/// from any number of threads.
pub struct Reader {
    directory: Arc<dyn Directory>,
    memory: Arc<dyn Storage>,
    manifest: Manifest,
    sealer: Sealer,
    index: Index,
    state: Vec<u8>,
}

impl Reader {
    /// Opens the checkpoint in `directory` that `expected` names. Nothing is changed. The directory stays
    /// locked until the reader is dropped.
    ///
    /// # Errors
    /// Refused when it is not complete, damaged in anything but memory, sealed with another key, of another
    /// checkpoint, guest or machine, saved in this boot, consumed, or in use by another process.
    pub fn open(directory: &Path, key: &Key, expected: &Identity) -> Result<Reader, RefusedCheckpoint> {
        let opened = HostDirectory::open(directory).map_err(|error| {
            let refusal = match error.kind() {
                io::ErrorKind::NotFound => Refusal::CheckpointMissing,
                _ => Refusal::CheckpointDamaged,
            };
            RefusedCheckpoint::new(refusal, format!("opening {}: {error}", directory.display()))
        })?;
        Reader::begin(Arc::new(opened), key, expected)
    }

    pub(crate) fn begin(
        directory: Arc<dyn Directory>,
        key: &Key,
        expected: &Identity,
    ) -> Result<Reader, RefusedCheckpoint> {
        let path = directory.path(MANIFEST);
        lock(directory.as_ref())?;
        let text = read_small(directory.as_ref(), MANIFEST, MAX_MANIFEST)
            .map_err(|error| unreadable(&path, &error))?
            .ok_or_else(|| {
                RefusedCheckpoint::new(
                    Refusal::CheckpointMissing,
                    format!("there is no {}: no save was completed here", path.display()),
                )
            })?;
        let (manifest, sealer) = Manifest::decode(&text, &path, key, expected)?;
        refuse_consumed(directory.as_ref())?;

        let parts = Parts {
            directory: directory.as_ref(),
            sealer: &sealer,
        };
        let index = read_index(&parts, &manifest)?;
        let state = parts.open(STATE, Part::State, manifest.state)?;
        let memory = directory
            .open(MEMORY, Transfer::Direct)
            .map_err(|error| unreadable(&directory.path(MEMORY), &error))?;
        let size = memory
            .size()
            .map_err(|error| unreadable(&directory.path(MEMORY), &error))?;
        let wanted = manifest.chunks * CHUNK as u64;
        if size != wanted {
            return Err(wrong_size(&directory.path(MEMORY), size, wanted));
        }
        Ok(Reader {
            memory,
            manifest,
            index,
            state,
            sealer,
            directory,
        })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The state that was given to [`crate::Writer::finish`].
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Chunks of memory.
    pub fn chunks(&self) -> u64 {
        self.index.chunks()
    }

    /// Whether a chunk is all zero; known without reading. A chunk beyond the end is not.
    pub fn is_zero(&self, chunk: u64) -> bool {
        matches!(self.index.get(chunk), Some(Entry::Zero))
    }

    /// Reads `count` chunks from number `first` on; zero chunks cost no read.
    ///
    /// # Errors
    /// Names a chunk that is damaged or cannot be read; the others of the call may be good, and can be read
    /// by themselves. No byte that was not verified is handed out.
    ///
    /// # Panics
    /// When the buffer is too small or a chunk lies beyond the end.
    pub fn read<'a>(
        &self,
        first: u64,
        count: usize,
        buffer: &'a mut ChunkBuffer,
    ) -> Result<&'a [u8], ChunkError> {
        assert!(count <= buffer.chunks() && first + count as u64 <= self.chunks());
        let entries: Vec<Entry> = (first..)
            .take(count)
            .filter_map(|chunk| self.index.get(chunk))
            .collect();
        let bytes = &mut buffer[..count * CHUNK];
        let result = self.read_runs(first, &entries, bytes);
        if let Err(error) = result {
            bytes.fill(0);
            return Err(error);
        }
        Ok(bytes)
    }

    fn read_runs(&self, first: u64, entries: &[Entry], bytes: &mut [u8]) -> Result<(), ChunkError> {
        let mut position = 0;
        while position < entries.len() {
            let is_zero = |entry: &Entry| *entry == Entry::Zero;
            let zero = is_zero(&entries[position]);
            let length = entries[position..]
                .iter()
                .take_while(|entry| is_zero(entry) == zero)
                .count();
            let run = &mut bytes[position * CHUNK..][..length * CHUNK];
            let chunk = first + position as u64;
            if zero {
                run.fill(0);
            } else {
                self.memory
                    .read(run, chunk * CHUNK as u64)
                    .map_err(|source| ChunkError::Io {
                        chunk,
                        path: self.directory.path(MEMORY),
                        source,
                    })?;
                for (offset, bytes) in run.chunks_exact_mut(CHUNK).enumerate() {
                    self.unseal(chunk + offset as u64, entries[position + offset], bytes)?;
                }
            }
            position += length;
        }
        Ok(())
    }

    fn unseal(&self, chunk: u64, entry: Entry, bytes: &mut [u8]) -> Result<(), ChunkError> {
        let Entry::Data { counter, tag } = entry else {
            return Ok(());
        };
        let place = Place {
            part: Part::Memory,
            number: chunk,
            total: self.chunks() * CHUNK as u64,
        };
        self.sealer
            .open(place, counter, tag, bytes)
            .map_err(|_| ChunkError::Damaged {
                chunk,
                path: self.directory.path(MEMORY),
            })
    }

    /// Notes, durably, that the checkpoint is used now: from here on every other [`Reader::open`] refuses it.
    /// Before the guest's first instruction.
    ///
    /// # Errors
    /// Refused when it was consumed meanwhile, or cannot be marked.
    pub fn mark_consumed(&self) -> Result<(), RefusedCheckpoint> {
        let path = self.directory.path(CONSUMED);
        let mark = || {
            let file = self.directory.create(CONSUMED, Transfer::Cached)?;
            file.write(format!("{}\n", self.manifest.checkpoint).as_bytes(), 0)?;
            file.sync()?;
            self.directory.sync()
        };
        mark().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => consumed(&path),
            _ => RefusedCheckpoint::new(
                Refusal::CheckpointDamaged,
                format!(
                    "{} cannot be written ({error}), so that nothing would stop a second resume from this \
                     checkpoint; make the file system writable, with some room",
                    path.display()
                ),
            ),
        })
    }

    /// Removes the checkpoint, once all memory was read.
    ///
    /// # Errors
    /// Names the file that cannot be removed. A checkpoint that is not consumed is refused from then on all
    /// the same, unless it is the manifest.
    pub fn remove(self) -> io::Result<()> {
        files::dismantle(self.directory.as_ref()).map_err(|(name, source)| {
            let path = self.directory.path(name);
            io::Error::new(source.kind(), format!("removing {}: {source}", path.display()))
        })
    }
}

fn lock(directory: &dyn Directory) -> Result<(), RefusedCheckpoint> {
    let path = directory.path("");
    directory.lock().map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => RefusedCheckpoint::new(
            Refusal::CheckpointSameBoot,
            format!(
                "{} is in use by another process of this boot: the VMM that saved it is still there, or one \
                 that resumes from it",
                path.display()
            ),
        ),
        _ => unreadable(&path, &error),
    })
}

fn refuse_consumed(directory: &dyn Directory) -> Result<(), RefusedCheckpoint> {
    let path = directory.path(CONSUMED);
    let names = directory
        .names()
        .map_err(|error| unreadable(&directory.path(""), &error))?;
    if names.iter().any(|(name, _)| name == CONSUMED) {
        return Err(consumed(&path));
    }
    Ok(())
}

fn consumed(path: &Path) -> RefusedCheckpoint {
    RefusedCheckpoint::new(
        Refusal::CheckpointStale,
        format!(
            "{} says that the guest was resumed from this checkpoint before; its disks have gone on since",
            path.display()
        ),
    )
}

fn unreadable(path: &Path, error: &io::Error) -> RefusedCheckpoint {
    RefusedCheckpoint::new(
        Refusal::CheckpointDamaged,
        format!("{} cannot be read: {error}", path.display()),
    )
}

fn wrong_size(path: &Path, size: u64, wanted: u64) -> RefusedCheckpoint {
    RefusedCheckpoint::new(
        Refusal::CheckpointDamaged,
        format!(
            "{} is {size} bytes long, where {wanted} were written; the checkpoint cannot be used",
            path.display()
        ),
    )
}

/// Opens sealed parts.
struct Parts<'a> {
    directory: &'a dyn Directory,
    sealer: &'a Sealer,
}

impl Parts<'_> {
    /// Reads and verifies a whole part. Its length is authenticated and bounded, and the file's length is
    /// compared before memory is taken for it.
    fn open(&self, name: &str, part: Part, sealed: Sealed) -> Result<Vec<u8>, RefusedCheckpoint> {
        let path = self.directory.path(name);
        let unreadable = |error| unreadable(&path, &error);
        let file = self.directory.open(name, Transfer::Cached).map_err(unreadable)?;
        let size = file.size().map_err(unreadable)?;
        let frames = sealed.length.div_ceil(CHUNK as u64);
        let wanted = sealed.length + frames * TAG as u64;
        if size != wanted {
            return Err(wrong_size(&path, size, wanted));
        }
        let mut bytes = vec![0; size as usize];
        file.read(&mut bytes, 0).map_err(unreadable)?;
        // Frames are opened where they lie and moved over the tags before them.
        let mut end = 0;
        for number in 0..frames {
            let start = number as usize * (CHUNK + TAG);
            let frame = &mut bytes[start..(start + CHUNK + TAG).min(size as usize)];
            let length = frame.len() - TAG;
            let (data, tag) = frame.split_at_mut(length);
            let mut code = [0; TAG];
            code.copy_from_slice(tag);
            let place = Place {
                part,
                number,
                total: sealed.length,
            };
            let counter = sealed.first_counter.wrapping_add(number);
            self.sealer.open(place, counter, code, data).map_err(|_| {
                RefusedCheckpoint::new(
                    Refusal::CheckpointDamaged,
                    format!(
                        "{} is not what was written (frame {number}); the checkpoint cannot be used",
                        path.display()
                    ),
                )
            })?;
            bytes.copy_within(start..start + length, end);
            end += length;
        }
        bytes.truncate(end);
        Ok(bytes)
    }
}

fn read_index(parts: &Parts<'_>, manifest: &Manifest) -> Result<Index, RefusedCheckpoint> {
    let bytes = parts.open(INDEX, Part::Index, manifest.index)?;
    let changes = parts.open(CHANGES, Part::Changes, manifest.changes)?;
    Index::decode(bytes, &changes).ok_or_else(|| {
        RefusedCheckpoint::new(
            Refusal::CheckpointDamaged,
            format!(
                "{} or the changes beside it hold what no save writes",
                parts.directory.path(INDEX).display()
            ),
        )
    })
}
