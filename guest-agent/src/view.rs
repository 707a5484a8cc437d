//! A view of one file system, bare of whatever is mounted on top of it.
//!
//! Paths come from handles, or from the other side; both are walked from the file system's own root, never
//! through a symbolic link and never out of it, so that a path means the same in the guest and in its clone.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::mount::OpenTreeFlags;

use crate::sys::handle::{self, Handle};

/// What is asked of `statx`.
pub const STAT: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// A file system, seen from its root.
#[derive(Debug)]
pub struct View {
    /// Where the guest has it mounted.
    pub mount_point: PathBuf,
    /// Identity in fanotify events.
    pub fsid: [u8; 8],
    /// Device number.
    pub dev: (u32, u32),
    root: OwnedFd,
    mounted: OwnedFd,
    marked_at: OnceLock<(i64, u32)>,
}

impl View {
    /// Opens the file system that is mounted at `mount_point`.
    pub fn open(mount_point: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mounted = rustix::fs::open(mount_point, flags, Mode::empty())?;
        // A mount of its own, attached nowhere: nothing can be mounted on top of what is in it.
        let tree = rustix::mount::open_tree(
            &mounted,
            c"",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH,
        )?;
        let root = rustix::fs::openat(&tree, c".", flags, Mode::empty())?;
        let stat = rustix::fs::statx(&root, c"", AtFlags::EMPTY_PATH, STAT)?;
        let fsid = handle::fsid_of(&root)?;
        let dev = (stat.stx_dev_major, stat.stx_dev_minor);
        Ok(Self {
            mount_point: mount_point.to_owned(),
            fsid,
            dev,
            root,
            mounted,
            marked_at: OnceLock::new(),
        })
    }

    /// The root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// A descriptor on the mount as the guest has it, for marks and freezing.
    pub fn mounted(&self) -> BorrowedFd<'_> {
        self.mounted.as_fd()
    }

    /// Notes that changes are seen from now on.
    pub fn mark_now(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        let _first_time_counts = self.marked_at.set((now.tv_sec, now.tv_nsec as u32));
    }

    /// Since when changes are seen.
    pub fn marked_at(&self) -> Option<(i64, u32)> {
        self.marked_at.get().copied()
    }

    /// Opens `path` (relative to the root, without a leading slash; empty: the root itself).
    pub fn open_at(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() {
            c_string(b".")?
        } else {
            c_string(path)?
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.root, &path, flags, Mode::empty(), resolve) {
                // A rename elsewhere raced with the walk.
                Err(rustix::io::Errno::AGAIN) if tries < 100 => tries += 1,
                other => return other.map_err(Into::into),
            }
        }
    }

    /// Opens the directory of `path` and returns it with the last component.
    pub fn parent<'p>(&self, path: &'p [u8]) -> io::Result<(OwnedFd, &'p [u8])> {
        let (folder, name) = split(path);
        Ok((self.open_at(folder, OFlags::PATH | OFlags::DIRECTORY)?, name))
    }

    /// State of `path`; `None` where nothing is there.
    pub fn stat(&self, path: &[u8]) -> io::Result<Option<Statx>> {
        match self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(fd) => stat_fd(&fd).map(Some),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The present path of a directory; `None` where it is no more.
    pub fn directory_of(&self, handle: &Handle) -> io::Result<Option<Vec<u8>>> {
        let fd = match self.open_handle(handle)? {
            Some(fd) => fd,
            None => return Ok(None),
        };
        let stat = stat_fd(&fd)?;
        if stat.stx_nlink == 0 || !is_kind(&stat, libc::S_IFDIR) {
            return Ok(None);
        }
        path_of(&fd).map(Some)
    }

    /// A path of the inode, where the kernel knows one that leads to it.
    pub fn some_path_of(&self, handle: &Handle) -> io::Result<Option<Vec<u8>>> {
        let Some(fd) = self.open_handle(handle)? else {
            return Ok(None);
        };
        let stat = stat_fd(&fd)?;
        let path = path_of(&fd)?;
        let there = self.stat(&path)?;
        Ok(there.filter(|t| t.stx_ino == stat.stx_ino).map(|_| path))
    }

    /// Opens an inode (`O_PATH`); `None` where it is no more.
    pub fn open_handle(&self, handle: &Handle) -> io::Result<Option<OwnedFd>> {
        let mut tries = 0;
        loop {
            match handle::open_by_handle(&self.root, handle, libc::O_PATH | libc::O_NOFOLLOW) {
                Ok(fd) => return Ok(Some(fd)),
                Err(error) if error.raw_os_error() == Some(libc::ESTALE) => return Ok(None),
                // Said, too, while the number of a deleted inode is being given to a new one (`iget_locked`
                // meets `I_CREATING`): over in a moment, and then it is stale.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && tries < 200 => {
                    tries += 1;
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes everything out (`syncfs`).
    pub fn sync(&self) -> io::Result<()> {
        rustix::fs::syncfs(&self.root).map_err(Into::into)
    }

    /// The path that a user of the guest sees.
    pub fn outer(&self, path: &[u8]) -> Vec<u8> {
        let inner = std::ffi::OsString::from_vec(path.to_vec());
        crate::mounts::join(&self.mount_point, Path::new(&inner))
            .into_os_string()
            .into_vec()
    }
}

/// State of an open file or of an `O_PATH` descriptor.
pub fn stat_fd(fd: impl AsFd) -> io::Result<Statx> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, STAT).map_err(Into::into)
}

/// Whether the state is of this file type (`S_IFREG`, …).
pub fn is_kind(stat: &Statx, kind: libc::mode_t) -> bool {
    libc::mode_t::from(stat.stx_mode) & libc::S_IFMT == kind
}

/// Whether an error means that nothing is at the path.
pub fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
    )
}

/// Splits off the last component.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// `folder/name`.
pub fn child(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        name.to_vec()
    } else {
        [folder, b"/", name].concat()
    }
}

/// A path for the kernel; one with a NUL is refused.
pub fn c_string(path: &[u8]) -> io::Result<CString> {
    CString::new(path).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// The way to an inode that is open, for calls that take paths only.
pub fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// The present path of what is open, below the root of its view; of a directory, or of a name that the kernel knows.
pub fn path_of(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let link = std::fs::read_link(proc_path(fd))?.into_os_string().into_vec();
    Ok(link.strip_prefix(b"/").map(<[u8]>::to_vec).unwrap_or(link))
}
