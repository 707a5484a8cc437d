//! Reads one name of the guest, consistently: all that is told of it is of one inode, to which the name led
//! when all was read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use understudy_channel::Meta;

use crate::meta;
use crate::plan::Item;
use crate::sys::handle::{Handle, handle_of};
use crate::view::{View, c_string, is_absent, path_of, proc_path, split, stat_fd};

/// What was found under a name.
#[derive(Debug)]
pub enum Found {
    /// Nothing, in a directory that is there.
    Nothing,
    /// An inode.
    Inode(Inode),
    /// The name came to mean something else while it was read, or its directory is gone: nothing can be
    /// said of it now.
    Raced,
}

/// An inode.
#[derive(Debug)]
pub struct Inode {
    /// Its handle.
    pub handle: Handle,
    /// Its metadata.
    pub meta: Meta,
    /// What it is.
    pub what: What,
}

/// What an inode is.
#[derive(Debug)]
pub enum What {
    /// A directory.
    Directory,
    /// A regular file, open for reading, with its size.
    File(OwnedFd, u64),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// FIFO, socket or device, with its device number.
    Special(u64),
}

/// Reads what `item` names. `midway` is called when everything was read, before the name is looked at again.
pub fn read(view: &View, item: &Item, midway: impl FnOnce()) -> io::Result<Found> {
    if item.name.is_empty() {
        let inode = inode(view.root())?;
        return Ok(Found::Inode(inode));
    }
    let Some(folder) = view.open_handle(&item.folder)? else {
        return Ok(Found::Raced);
    };
    let name = c_string(&item.name)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::openat(&folder, &name, flags, Mode::empty()) {
        Ok(fd) => Some(inode(fd.as_fd())?),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(error.into()),
    };
    midway();
    let now = match handle_of(&folder, &name) {
        Ok(handle) => Some(handle),
        Err(error) if is_absent(&error) => None,
        Err(error) => return Err(error),
    };
    // A directory that moves during the round has no place on the clone before its own turn comes again. What
    // is gone from it is gone wherever it is.
    let is_in_place = || Ok::<_, io::Error>(path_of(&folder)? == split(&item.spot.1).0);
    Ok(match found {
        Some(inode) if now.as_ref() == Some(&inode.handle) && is_in_place()? => Found::Inode(inode),
        None if now.is_none() && stat_fd(&folder)?.stx_nlink > 0 => Found::Nothing,
        _ => Found::Raced,
    })
}

fn inode(fd: impl AsFd) -> io::Result<Inode> {
    let stat = stat_fd(&fd)?;
    let meta = meta::read(&fd, &stat)?;
    let what = match libc::mode_t::from(stat.stx_mode) & libc::S_IFMT {
        libc::S_IFDIR => What::Directory,
        libc::S_IFLNK => What::Symlink(rustix::fs::readlinkat(&fd, c"", Vec::new())?.into_bytes()),
        libc::S_IFREG => {
            // Without a trace in its access time.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
            let file = rustix::fs::open(proc_path(&fd), flags, Mode::empty())?;
            What::File(file, stat.stx_size)
        }
        _ => What::Special(rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor)),
    };
    let handle = Handle {
        kind: meta.handle.0,
        bytes: meta.handle.1.clone(),
    };
    Ok(Inode { handle, meta, what })
}
