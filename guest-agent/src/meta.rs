//! Metadata of a path: read on the guest, applied on the clone.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Statx, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use understudy_channel::Meta;

use crate::sys::handle::{self, Handle};
use crate::view::{c_string, proc_path};

/// A name in an open directory. The empty name is the directory itself.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    /// The directory, `O_PATH` is enough.
    pub folder: BorrowedFd<'a>,
    /// The last component.
    pub name: &'a [u8],
}

impl Named<'_> {
    /// The name for the kernel; `.` for the directory itself.
    pub fn c_name(&self) -> io::Result<CString> {
        c_string(if self.name.is_empty() { b"." } else { self.name })
    }

    /// A path for calls that know no directory descriptors.
    fn path(&self) -> io::Result<CString> {
        let mut path = format!("/proc/self/fd/{}/", self.folder.as_raw_fd()).into_bytes();
        path.extend_from_slice(self.c_name()?.as_bytes());
        c_string(&path)
    }

    /// Its file handle.
    pub fn handle(&self) -> io::Result<Handle> {
        handle::handle_of(self.folder, &self.c_name()?)
    }
}

/// Metadata of an inode that is open (`O_PATH` is enough), whose state is `stat`.
pub fn read(inode: impl AsFd, stat: &Statx) -> io::Result<Meta> {
    let handle = handle::handle_of(&inode, c"")?;
    // The link leads to the inode itself, also where that is a symbolic link.
    let path = c_string(proc_path(&inode).as_os_str().as_bytes())?;
    Ok(Meta {
        mode: stat.stx_mode.into(),
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        atime: (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
        nlink: stat.stx_nlink,
        ino: stat.stx_ino,
        handle: (handle.kind, handle.bytes),
        xattrs: possible(stat.stx_mode.into(), list(&path, Links::Follow)?),
    })
}

/// Attributes that a node of this mode can have: only files and directories can have `user.` ones (xattr(7)),
/// and setting them elsewhere fails.
fn possible(mode: u32, mut attributes: Attributes) -> Attributes {
    if !matches!(mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) {
        attributes.retain(|(name, _)| !name.starts_with(b"user."));
    }
    attributes
}

/// Extended attributes by name.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// All extended attributes, sorted by name; none where the file system has none.
pub fn xattrs(named: Named<'_>) -> io::Result<Attributes> {
    list(&named.path()?, Links::Stay)
}

/// Whether a link at the end of a path is followed.
#[derive(Clone, Copy)]
enum Links {
    Follow,
    Stay,
}

fn list(path: &CStr, links: Links) -> io::Result<Attributes> {
    let listed = sized(|buffer| match links {
        Links::Follow => rustix::fs::listxattr(path, buffer),
        Links::Stay => rustix::fs::llistxattr(path, buffer),
    });
    let list = match listed {
        Ok(list) => list,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in list.split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let c_name = c_string(name)?;
        let value = sized(|buffer| match links {
            Links::Follow => rustix::fs::getxattr(path, &c_name, buffer),
            Links::Stay => rustix::fs::lgetxattr(path, &c_name, buffer),
        });
        match value {
            Ok(value) => found.push((name.to_vec(), value)),
            // It went away in between.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort();
    Ok(found)
}

/// Calls with a buffer that is large enough for any attribute (64 KiB).
fn sized(call: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0u8; 64 * 1024];
    let length = call(&mut buffer[..])?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Gives `named` this metadata. Owner first, because a change of owner takes set-user-id bits and
/// capabilities away; times last, because all else renews them.
pub fn apply(named: Named<'_>, meta: &Meta) -> io::Result<()> {
    let name = named.c_name()?;
    let owner = rustix::process::Uid::from_raw(meta.uid);
    let group = rustix::process::Gid::from_raw(meta.gid);
    rustix::fs::chownat(
        named.folder,
        &name,
        Some(owner),
        Some(group),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if meta.mode & libc::S_IFMT != libc::S_IFLNK {
        let mode = rustix::fs::Mode::from_raw_mode(meta.mode & 0o7777);
        rustix::fs::chmodat(named.folder, &name, mode, AtFlags::empty())?;
    }
    apply_xattrs(named, &meta.xattrs)?;
    set_times(named, meta.atime, meta.mtime)
}

/// Sets access and modification time.
pub fn set_times(named: Named<'_>, atime: (i64, u32), mtime: (i64, u32)) -> io::Result<()> {
    let spec = |(seconds, nanoseconds): (i64, u32)| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    };
    rustix::fs::utimensat(named.folder, &named.c_name()?, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

fn apply_xattrs(named: Named<'_>, wanted: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
    let present = xattrs(named)?;
    let path = named.path()?;
    for (name, _) in present
        .iter()
        .filter(|(name, _)| !wanted.iter().any(|(w, _)| w == name))
    {
        match rustix::fs::lremovexattr(&path, &c_string(name)?) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for attribute in wanted.iter().filter(|w| !present.contains(w)) {
        rustix::fs::lsetxattr(&path, &c_string(&attribute.0)?, &attribute.1, XattrFlags::empty())?;
    }
    Ok(())
}
