//! Names on the clone: finding, moving aside, linking and making them, without ever following a link out of
//! the file system.
//!
//! What is deleted or replaced goes to a directory at the root of its file system first (`.understudy`), and
//! away at the end of the round: a rename in the guest is a deletion here and a new name there, and its inode
//! is found again in between.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx};

use crate::filter::Spot;
use crate::meta::{self, Named};
use crate::sys::handle::Handle;
use crate::view::{self, View, c_string, is_absent, is_kind, stat_fd};

/// Directory for what is under way, at the root of each file system.
pub const WORK: &[u8] = b".understudy";

type Times = ((i64, u32), (i64, u32));

/// Names on the clone's file systems.
#[derive(Debug)]
pub struct Places {
    /// The file systems.
    pub views: Vec<Arc<View>>,
    counter: u64,
    /// Times of directories in which names were changed: put back at the end of the round.
    folders: BTreeMap<Spot, Times>,
}

/// Something at a path of the clone.
#[derive(Debug)]
pub struct Found {
    /// Its state.
    pub stat: Statx,
    /// Its handle.
    pub handle: Handle,
}

impl Places {
    /// Places on these file systems.
    pub fn new(views: Vec<Arc<View>>) -> Self {
        Self {
            views,
            counter: 0,
            folders: BTreeMap::new(),
        }
    }

    /// What is at `spot`.
    pub fn look(&self, spot: &Spot) -> io::Result<Option<Found>> {
        let view = &self.views[spot.0];
        let fd = match view.open_at(&spot.1, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let (folder, name) = view.parent(&spot.1)?;
        let handle = Named {
            folder: folder.as_fd(),
            name,
        }
        .handle()?;
        Ok(Some(Found {
            stat: stat_fd(&fd)?,
            handle,
        }))
    }

    /// The directory of `spot` and its name there; directories that are missing on the way are made.
    pub fn parent<'s>(&mut self, spot: &'s Spot) -> io::Result<(OwnedFd, &'s [u8])> {
        let (folder, name) = view::split(&spot.1);
        match self.views[spot.0].open_at(folder, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => return Ok((fd, name)),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
        let mut path = Vec::new();
        for component in folder.split(|&b| b == b'/') {
            path = view::child(&path, component);
            let here = (spot.0, path.clone());
            match self.look(&here)? {
                Some(found) if is_kind(&found.stat, libc::S_IFDIR) => continue,
                Some(_) => self.set_aside(&here)?,
                None => {}
            }
            self.note_folder(&here)?;
            let (fd, name) = self.views[spot.0].parent(&path)?;
            rustix::fs::mkdirat(fd, c_string(name)?, Mode::from_raw_mode(0o755))?;
        }
        Ok((
            self.views[spot.0].open_at(folder, OFlags::PATH | OFlags::DIRECTORY)?,
            name,
        ))
    }

    /// Remembers the times of the directory of `spot`, in which a name is about to change.
    pub fn note_folder(&mut self, spot: &Spot) -> io::Result<()> {
        let folder = (spot.0, view::split(&spot.1).0.to_vec());
        if self.folders.contains_key(&folder) {
            return Ok(());
        }
        if let Some(stat) = self.views[spot.0].stat(&folder.1)? {
            self.folders.insert(folder, times(&stat));
        }
        Ok(())
    }

    /// The times that a directory is to have at the end of the round.
    pub fn set_folder_times(&mut self, spot: &Spot, atime: (i64, u32), mtime: (i64, u32)) {
        self.folders.insert(spot.clone(), (atime, mtime));
    }

    /// A new name in the work directory of a file system.
    pub fn fresh_name(&mut self, fs: usize) -> io::Result<Spot> {
        let work = (fs, WORK.to_vec());
        match self.look(&work)? {
            Some(found) if is_kind(&found.stat, libc::S_IFDIR) => {}
            Some(_) => {
                return Err(io::Error::other(
                    "/.understudy is in the way: it is not a directory; remove it",
                ));
            }
            None => {
                self.note_folder(&work)?;
                rustix::fs::mkdirat(self.views[fs].root(), c_string(WORK)?, Mode::RWXU)?;
            }
        }
        self.counter += 1;
        Ok((fs, view::child(WORK, format!("{:08}", self.counter).as_bytes())))
    }

    /// Moves what is at `spot` out of the way; nothing there is fine.
    pub fn set_aside(&mut self, spot: &Spot) -> io::Result<()> {
        if self.look(spot)?.is_none() {
            return Ok(());
        }
        loop {
            let aside = self.fresh_name(spot.0)?;
            if self.look(&aside)?.is_none() {
                return self.rename(spot, &aside);
            }
        }
    }

    /// Renames within a file system, over whatever is at `to` unless one is a directory and the other is not.
    pub fn rename(&mut self, from: &Spot, to: &Spot) -> io::Result<()> {
        self.note_folder(from)?;
        self.note_folder(to)?;
        let (from_folder, from_name) = self.views[from.0].parent(&from.1)?;
        let (to_folder, to_name) = self.parent(to)?;
        rustix::fs::renameat(from_folder, c_string(from_name)?, to_folder, c_string(to_name)?)?;
        self.rename_folders(from, to);
        Ok(())
    }

    /// Directories that moved along are found under their new paths at the end of the round.
    fn rename_folders(&mut self, from: &Spot, to: &Spot) {
        let moved: Vec<Spot> = self
            .folders
            .keys()
            .filter(|s| s.0 == from.0 && (s.1 == from.1 || below(&s.1, &from.1).is_some()))
            .cloned()
            .collect();
        for spot in moved {
            if let Some(times) = self.folders.remove(&spot) {
                let rest = below(&spot.1, &from.1).unwrap_or_default();
                self.folders.insert((to.0, [&to.1[..], rest].concat()), times);
            }
        }
    }

    /// Puts what was made at `fresh` in the place of whatever is at `spot`.
    pub fn put(&mut self, fresh: &Spot, spot: &Spot) -> io::Result<()> {
        self.parent(spot)?;
        if self.look(spot)?.is_some_and(|f| is_kind(&f.stat, libc::S_IFDIR)) {
            self.set_aside(spot)?;
        }
        self.rename(fresh, spot)
    }

    /// A new name in the work directory for an inode that is already there.
    pub fn link(&mut self, inode: &OwnedFd, fs: usize) -> io::Result<Spot> {
        let spot = self.fresh_name(fs)?;
        let (folder, name) = self.views[fs].parent(&spot.1)?;
        rustix::fs::linkat(inode, c"", folder, c_string(name)?, AtFlags::EMPTY_PATH)?;
        Ok(spot)
    }

    /// A new regular file in the work directory, open for writing.
    pub fn make_file(&mut self, fs: usize) -> io::Result<(Spot, OwnedFd)> {
        let spot = self.fresh_name(fs)?;
        let (folder, name) = self.views[fs].parent(&spot.1)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(folder, c_string(name)?, flags, Mode::RUSR | Mode::WUSR)?;
        Ok((spot, fd))
    }

    /// A new symbolic link in the work directory.
    pub fn make_symlink(&mut self, fs: usize, target: &[u8]) -> io::Result<Spot> {
        let spot = self.fresh_name(fs)?;
        let (folder, name) = self.views[fs].parent(&spot.1)?;
        rustix::fs::symlinkat(c_string(target)?, folder, c_string(name)?)?;
        Ok(spot)
    }

    /// A new FIFO, socket or device in the work directory.
    pub fn make_special(&mut self, fs: usize, mode: u32, rdev: u64) -> io::Result<Spot> {
        let spot = self.fresh_name(fs)?;
        let (folder, name) = self.views[fs].parent(&spot.1)?;
        let kind = FileType::from_raw_mode(mode);
        rustix::fs::mknodat(
            folder,
            c_string(name)?,
            kind,
            Mode::from_raw_mode(mode & 0o7777),
            rdev,
        )?;
        Ok(spot)
    }

    /// A new directory at `spot`, where nothing is.
    pub fn make_directory(&mut self, spot: &Spot) -> io::Result<()> {
        self.note_folder(spot)?;
        let (folder, name) = self.parent(spot)?;
        rustix::fs::mkdirat(folder, c_string(name)?, Mode::RWXU)?;
        Ok(())
    }

    /// Ends a round: what was set aside goes away, and directories get their times.
    pub fn finish(&mut self) -> io::Result<()> {
        for (fs, view) in self.views.iter().enumerate() {
            let work = (fs, WORK.to_vec());
            if self.look(&work)?.is_some() {
                remove_tree(view, WORK)?;
            }
        }
        // Below first: nothing is changed in a directory after it got its times.
        for (spot, (atime, mtime)) in std::mem::take(&mut self.folders).into_iter().rev() {
            let view = &self.views[spot.0];
            let Some(stat) = view.stat(&spot.1)? else { continue };
            if is_kind(&stat, libc::S_IFDIR) {
                let fd = view.open_at(&spot.1, OFlags::PATH | OFlags::DIRECTORY)?;
                meta::set_times(
                    Named {
                        folder: fd.as_fd(),
                        name: b"",
                    },
                    atime,
                    mtime,
                )?;
            }
        }
        Ok(())
    }
}

/// Access and modification time.
pub fn times(stat: &Statx) -> Times {
    (
        (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
        (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
    )
}

/// The rest of `path` below `folder`, beginning with a slash.
fn below<'p>(path: &'p [u8], folder: &[u8]) -> Option<&'p [u8]> {
    path.strip_prefix(folder)
        .filter(|rest| rest.first() == Some(&b'/'))
}

/// Removes a directory with all that is in it.
fn remove_tree(view: &View, top: &[u8]) -> io::Result<()> {
    let mut pending = vec![(top.to_vec(), false)];
    while let Some((folder, emptied)) = pending.pop() {
        if emptied {
            let (parent, name) = view.parent(&folder)?;
            rustix::fs::unlinkat(parent, c_string(name)?, AtFlags::REMOVEDIR)?;
            continue;
        }
        pending.push((folder.clone(), true));
        let fd = view.open_at(&folder, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut children: HashMap<Vec<u8>, bool> = HashMap::new();
        for entry in rustix::fs::Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                children.insert(name.to_vec(), entry.file_type() == FileType::Directory);
            }
        }
        for (name, is_directory) in children {
            if is_directory {
                pending.push((view::child(&folder, &name), false));
            } else {
                rustix::fs::unlinkat(&fd, c_string(&name)?, AtFlags::empty())?;
            }
        }
    }
    Ok(())
}
