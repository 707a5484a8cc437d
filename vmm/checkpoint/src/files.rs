//! The files of a checkpoint, behind traits: the real ones, and in tests a simulated directory that loses
//! what was not synced.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use rustix::fs::{FlockOperation, OFlags};
use understudy_vmm_control::session::{CONSUMED, MANIFEST};

/// Sealed chunks, at the offsets of guest RAM.
pub(crate) const MEMORY: &str = "memory";
/// Sealed state of vCPUs and devices.
pub(crate) const STATE: &str = "state";
/// Sealed index of the chunks.
pub(crate) const INDEX: &str = "index";
/// Sealed changes of the index since it was written.
pub(crate) const CHANGES: &str = "changes";
/// The manifest before it gets its name.
pub(crate) const NEW_MANIFEST: &str = "manifest.json.new";

/// All names that a checkpoint's directory may hold.
pub(crate) const NAMES: [&str; 7] = [MEMORY, STATE, INDEX, CHANGES, NEW_MANIFEST, MANIFEST, CONSUMED];

/// An open file.
pub(crate) trait Storage: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Makes it this long; what is new is a hole.
    fn set_size(&self, size: u64) -> io::Result<()>;
    /// Bytes that it takes on disk.
    fn allocated(&self) -> io::Result<u64>;
    /// Fills `data` from `offset`.
    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Makes completed writes durable.
    fn sync(&self) -> io::Result<()>;
}

/// How a file's content is transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Past the page cache where the file system can: offsets, lengths and addresses are aligned.
    Direct,
    /// Through it.
    Cached,
}

/// A checkpoint's directory.
pub(crate) trait Directory: Send + Sync {
    /// Takes its lock, until `self` is dropped; `WouldBlock` when somebody else has it.
    fn lock(&self) -> io::Result<()>;
    /// Names of all that is in it; the flag tells regular files.
    fn names(&self) -> io::Result<Vec<(String, bool)>>;
    /// Creates a file; one that exists already fails.
    fn create(&self, name: &str, transfer: Transfer) -> io::Result<Arc<dyn Storage>>;
    /// Opens a file for reading.
    fn open(&self, name: &str, transfer: Transfer) -> io::Result<Arc<dyn Storage>>;
    /// Opens a file for writing.
    fn open_for_writing(&self, name: &str) -> io::Result<Arc<dyn Storage>>;
    /// Makes completed writes to several files durable, with one wait for the disk where it can.
    fn sync_files(&self, files: &[&dyn Storage]) -> io::Result<()>;
    /// Renames a file; durable after [`Directory::sync`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file if it is there; durable after [`Directory::sync`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;
    /// Path of a file, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// Removes what belongs to a checkpoint. First the manifest, durably: cut short at any point this leaves
/// either the checkpoint as it was or one that is refused. The mark that it was consumed goes last.
pub(crate) fn dismantle(directory: &dyn Directory) -> Result<(), (&'static str, io::Error)> {
    directory.remove(MANIFEST).map_err(|e| (MANIFEST, e))?;
    directory.sync().map_err(|e| (MANIFEST, e))?;
    for name in [NEW_MANIFEST, MEMORY, INDEX, CHANGES, STATE, CONSUMED] {
        directory.remove(name).map_err(|e| (name, e))?;
    }
    directory.sync().map_err(|e| (CONSUMED, e))
}

/// Bytes that are free for ordinary users on the file system that holds `directory`.
///
/// # Errors
/// Those of `statvfs(3)`.
pub fn free_bytes(directory: &Path) -> io::Result<u64> {
    let free = rustix::fs::statvfs(directory)?;
    Ok(free.f_bavail.saturating_mul(free.f_frsize))
}

/// The real directory.
pub(crate) struct HostDirectory {
    path: PathBuf,
    handle: File,
}

impl HostDirectory {
    pub fn open(path: &Path) -> io::Result<HostDirectory> {
        let handle = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::DIRECTORY.bits() as i32)
            .open(path)?;
        Ok(HostDirectory {
            path: path.to_owned(),
            handle,
        })
    }

    fn open_file(&self, name: &str, transfer: Transfer, access: Access) -> io::Result<Arc<dyn Storage>> {
        let path = self.path.join(name);
        let open = |flags: OFlags, access: Access| {
            let mut options = OpenOptions::new();
            match access {
                Access::Read => options.read(true),
                Access::Write => options.write(true),
                Access::Create => options.read(true).write(true).create_new(true),
            };
            options
                .mode(0o600)
                .custom_flags((flags | OFlags::NOFOLLOW).bits() as i32)
                .open(&path)
        };
        let file = match transfer {
            Transfer::Cached => open(OFlags::empty(), access)?,
            Transfer::Direct => match open(OFlags::DIRECT, access) {
                // The file system has no direct I/O. It says so after it has created the file.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    if access == Access::Create {
                        self.remove(name)?;
                    }
                    open(OFlags::empty(), access)?
                }
                other => other?,
            },
        };
        Ok(Arc::new(HostFile(file)))
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Create,
}

impl Directory for HostDirectory {
    fn lock(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(
            &self.handle,
            FlockOperation::NonBlockingLockExclusive,
        )?)
    }

    fn names(&self) -> io::Result<Vec<(String, bool)>> {
        fs::read_dir(&self.path)?
            .map(|entry| {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                Ok((name, entry.file_type()?.is_file()))
            })
            .collect()
    }

    fn create(&self, name: &str, transfer: Transfer) -> io::Result<Arc<dyn Storage>> {
        self.open_file(name, transfer, Access::Create)
    }

    fn open(&self, name: &str, transfer: Transfer) -> io::Result<Arc<dyn Storage>> {
        self.open_file(name, transfer, Access::Read)
    }

    fn open_for_writing(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.open_file(name, Transfer::Cached, Access::Write)
    }

    fn sync_files(&self, files: &[&dyn Storage]) -> io::Result<()> {
        // Syncs that come at a time share a commit of the file system's journal and a flush of the disk.
        thread::scope(|scope| {
            let syncs: Vec<_> = files
                .iter()
                .map(|file| thread::Builder::new().spawn_scoped(scope, || file.sync()))
                .collect();
            let mut result = Ok(());
            for sync in syncs {
                let own = match sync {
                    Ok(sync) => sync
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("a syncing thread panicked"))),
                    Err(error) => Err(error),
                };
                result = result.and(own);
            }
            result
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

struct HostFile(File);

impl HostFile {
    /// Runs a transfer, through the page cache from now on where the file system accepts a file for direct
    /// I/O and then none of its transfers.
    fn transfer<T>(&self, mut transfer: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match transfer() {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                let flags = rustix::fs::fcntl_getfl(&self.0)?;
                if !flags.contains(OFlags::DIRECT) {
                    return Err(error);
                }
                rustix::fs::fcntl_setfl(&self.0, flags - OFlags::DIRECT)?;
                transfer()
            }
            other => other,
        }
    }
}

impl Storage for HostFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_len(size)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.transfer(|| self.0.read_exact_at(data, offset))
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.transfer(|| self.0.write_all_at(data, offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Reads a small file whole; `None` when there is none. One that is longer than `limit` fails.
pub(crate) fn read_small(directory: &dyn Directory, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match directory.open(name, Transfer::Cached) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let size = file.size()?;
    if size > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it is {size} bytes long, where {limit} are possible"),
        ));
    }
    let mut text = vec![0; size as usize];
    file.read(&mut text, 0)?;
    Ok(Some(text))
}
