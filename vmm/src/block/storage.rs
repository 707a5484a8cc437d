//! The files beneath a disk, behind traits: the real ones, and in tests a simulated file system that
//! loses what was not synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::virtio::buffers::Buffers;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Who else may hold the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Other readers.
    Shared,
    /// Nobody.
    Exclusive,
}

/// One open file of a fixed size.
pub(crate) trait Storage: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills `buffers` from `offset`.
    fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()>;
    /// Writes `buffers` at `offset`.
    fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()>;
    /// Makes the range read as zeros and gives its space back where the file system can.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes completed writes durable.
    fn sync(&self) -> io::Result<()>;
    /// The next range at or after `from` that is not a hole.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
    /// Takes or converts this file's lock; `WouldBlock` when somebody else is in the way.
    fn lock(&self, lock: Lock) -> io::Result<()>;
}

/// A disk's source file and its state directory.
pub(crate) trait Directory: Send + Sync {
    /// Opens the source file.
    fn open_source(&self, access: Access) -> io::Result<Arc<dyn Storage>>;
    /// Makes the state directory where it is missing.
    fn make(&self) -> io::Result<()>;
    /// Opens a file of the state directory.
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>>;
    /// Creates a sparse file of `size` bytes; one that exists already fails.
    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn Storage>>;
    /// Reads a small file whole; `None` when there is none.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Replaces a small file atomically and durably.
    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()>;
    /// Renames a file; durable after [`Directory::sync`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file if it is there; durable after [`Directory::sync`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;
    /// Path of a file of the state directory, for messages.
    fn path(&self, name: &str) -> PathBuf;
    /// Path of the source, for messages.
    fn source_path(&self) -> PathBuf;
}

/// A file of the host.
pub(crate) struct HostFile(File);

/// The real directory.
pub(crate) struct HostDirectory {
    source: PathBuf,
    state: PathBuf,
}

impl HostDirectory {
    pub(crate) fn new(source: &Path) -> HostDirectory {
        HostDirectory {
            source: source.to_owned(),
            state: understudy_vmm_control::owner::state_dir(source),
        }
    }
}

fn check_int(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs `transfer` on what is left of `buffers` until every piece is done.
fn all(
    buffers: &Buffers<'_>,
    offset: u64,
    transfer: impl Fn(&Buffers<'_>, libc::off_t) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < buffers.len() {
        let rest = buffers.part(done, buffers.len() - done);
        match transfer(&rest, (offset + done) as libc::off_t)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n as u64,
        }
    }
    Ok(())
}

impl HostFile {
    fn seek(&self, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        // SAFETY: lseek takes no pointers; the descriptor is open as long as `self` lives. Nobody relies on
        // the file's position, all transfers are positioned.
        let result = unsafe { libc::lseek(self.0.as_raw_fd(), from as libc::off_t, whence) };
        match u64::try_from(result) {
            Ok(offset) => Ok(Some(offset)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    }
}

impl Storage for HostFile {
    fn size(&self) -> io::Result<u64> {
        // By seeking, because block devices report no length in their metadata.
        Ok(self.seek(0, libc::SEEK_END)?.unwrap_or(0))
    }

    fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        all(buffers, offset, |rest, at| {
            rest.fill_with(|vectors| {
                let count = vectors.len() as libc::c_int;
                // SAFETY: each vector covers a volatile slice that `buffers` keeps mapped for this call, and
                // there are at most IOV_MAX of them.
                unsafe { libc::preadv(self.0.as_raw_fd(), vectors.as_ptr(), count, at) }
            })
        })
    }

    fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        all(buffers, offset, |rest, at| {
            rest.take_with(|vectors| {
                let count = vectors.len() as libc::c_int;
                // SAFETY: as in `read`; the kernel only reads from the vectors.
                unsafe { libc::pwritev(self.0.as_raw_fd(), vectors.as_ptr(), count, at) }
            })
        })
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: fallocate takes no pointers; the descriptor is open.
        let punched = check_int(unsafe {
            libc::fallocate(
                self.0.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset as libc::off_t,
                len as libc::off_t,
            )
        });
        match punched {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let zeros = vec![0; len.min(1 << 20) as usize];
                let mut done = 0;
                while done < len {
                    let take = zeros.len().min((len - done) as usize);
                    self.0.write_all_at(&zeros[..take], offset + done)?;
                    done += take as u64;
                }
                Ok(())
            }
            other => other,
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let Some(start) = self.seek(from, libc::SEEK_DATA)? else {
            return Ok(None);
        };
        let end = self.seek(start, libc::SEEK_HOLE)?;
        Ok(end.map(|end| start..end))
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        let operation = match lock {
            Lock::Shared => libc::LOCK_SH,
            Lock::Exclusive => libc::LOCK_EX,
        };
        // SAFETY: flock takes no pointers; the descriptor is open.
        check_int(unsafe { libc::flock(self.0.as_raw_fd(), operation | libc::LOCK_NB) })
    }
}

fn open(path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
    let file = OpenOptions::new()
        .read(true)
        .write(access == Access::Write)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)?;
    Ok(Arc::new(HostFile(file)))
}

impl Directory for HostDirectory {
    fn open_source(&self, access: Access) -> io::Result<Arc<dyn Storage>> {
        open(&self.source, access)
    }

    fn make(&self) -> io::Result<()> {
        match fs::create_dir(&self.state) {
            Ok(()) => match self.state.parent() {
                // A bare file name has an empty parent, which means the working directory.
                Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
                _ => File::open(".")?.sync_all(),
            },
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        open(&self.path(name), access)
    }

    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn Storage>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path(name))?;
        file.set_len(size)?;
        Ok(Arc::new(HostFile(file)))
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path(name)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = self.path(&format!("{name}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path(name))?;
        self.sync()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.state)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.state.join(name)
    }

    fn source_path(&self) -> PathBuf {
        self.source.clone()
    }
}
