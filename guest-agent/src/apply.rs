//! Applies the guest's changes to the clone, path by path (DESIGN §5, "Merge").

mod failure;
mod files;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use understudy_channel::{Applied, Entry, Meta, Node, OnConflict, RoundEnd};

use self::failure::{Failure, is_misfit};
use self::files::Open;
use crate::conflict::{self, Keeper};
use crate::filter::{Filter, Spot};
use crate::info;
use crate::journal;
use crate::memory::Memory;
use crate::meta::{self, Named};
use crate::place::{Found, Places, WORK};
use crate::rules::{Rule, rule};
use crate::silent::locate;
use crate::sys::handle::Handle;
use crate::units::Owners;
use crate::view::{self, is_kind, stat_fd};

/// Why the guest's changes could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A path failed.
    #[error("{path} could not be applied on the clone: {source}")]
    Path {
        /// Path in the guest.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The stream is not what an export sends.
    #[error("the stream of changes is malformed at {path}: {what}")]
    Stream {
        /// Path in the guest.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Both sides changed these, and the operation asks to fail then.
    #[error("both the guest and the clone changed {}", .0.join(", "))]
    Conflicts(Vec<String>),
    /// Nothing was on the move in the guest any more, and still these do not fit.
    #[error("what the guest has does not fit on the clone: {}", .0.join("; "))]
    Misfits(Vec<String>),
    /// A unit whose files the guest changed goes on running.
    #[error("{0}")]
    Unit(String),
    /// The end of the round failed.
    #[error("the round could not be completed on the clone: {0}")]
    Finish(io::Error),
}

/// No file system has larger blocks (bytes).
const MAX_FS_BLOCK: u64 = 64 * 1024;

/// Most entries that a refusal names.
const MAX_MISFITS: usize = 20;

/// How an import behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What becomes of files that both sides changed.
    pub on_conflict: OnConflict,
    /// Where losing versions are kept (`/var/lib/understudy`).
    pub state_dir: PathBuf,
    /// Since when changes are the clone's own: the time of its boot.
    pub since: (i64, u32),
    /// Sizes that logs had when the clone's agent started: where the clone's own tail begins.
    pub log_sizes: HashMap<Spot, (u64, u64)>,
}

/// Applies one round.
#[derive(Debug)]
pub struct Applier<'a> {
    settings: &'a Settings,
    memory: &'a mut Memory,
    touched: &'a Filter,
    places: Places,
    owners: Owners,
    keeper: Keeper,
    applied: Applied,
    open: Option<Open>,
    refused: Vec<String>,
    /// Entries that could not be applied to what is here, with the reason; the first of them.
    misfits: Vec<String>,
    /// The clone changed files of which only parts came, or there were misfits: the round has to be sent again.
    again: bool,
}

impl<'a> Applier<'a> {
    /// An applier for one round.
    pub fn new(settings: &'a Settings, memory: &'a mut Memory, touched: &'a Filter, owners: Owners) -> Self {
        let places = Places::new(touched.views());
        let keeper = Keeper::new(&settings.state_dir, &memory.operation);
        Self {
            settings,
            memory,
            touched,
            places,
            owners,
            keeper,
            applied: Applied::default(),
            open: None,
            refused: Vec::new(),
            misfits: Vec::new(),
            again: false,
        }
    }

    /// An entry; for a file its content follows.
    pub fn entry(&mut self, entry: Entry) -> Result<(), ApplyError> {
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        if self.open.is_some() {
            return Err(ApplyError::Stream {
                path,
                what: "an entry within another",
            });
        }
        let Some(spot) = self.locate(&entry) else {
            return Err(ApplyError::Path {
                path,
                source: io::Error::other("the clone has no such file system mounted"),
            });
        };
        self.applied.entries += 1;
        let size = match &entry.node {
            Node::File { size, .. } => Some(*size),
            _ => None,
        };
        let begun = self
            .place(spot.clone(), &entry)
            .and_then(|placed| self.begin(placed, &entry.path, entry.node));
        match begun {
            Ok(()) => Ok(()),
            Err(Failure::Unit(text)) => Err(ApplyError::Unit(text)),
            Err(Failure::Io(source)) if !is_misfit(&source) => Err(ApplyError::Path { path, source }),
            Err(failure) => {
                if matches!(failure, Failure::Stranger) {
                    self.again = true;
                } else {
                    self.put_off(&path, &failure);
                }
                self.open = size.map(|size| Open::skipped(spot, size));
                Ok(())
            }
        }
    }

    /// Leaves an entry to a later round: it was read while things moved in the guest, or others before it were,
    /// and what it builds on is not here. A round with such entries is not acknowledged, so that all of it is
    /// sent again.
    fn put_off(&mut self, path: &str, why: &impl std::fmt::Display) {
        info!("{path} does not fit yet: {why}");
        self.again = true;
        if self.misfits.len() < MAX_MISFITS {
            self.misfits.push(format!("{path}: {why}"));
        }
    }

    /// Where an entry belongs: under its name in the clone's copy of the guest's directory, wherever that is.
    fn place(&mut self, spot: Spot, entry: &Entry) -> Result<Spot, Failure> {
        let folder = Handle {
            kind: entry.folder.0,
            bytes: entry.folder.1.clone(),
        };
        if folder.bytes.is_empty() || spot.1.is_empty() {
            return Ok(spot);
        }
        let (path, name) = view::split(&spot.1);
        if let Some(inode) = self.find(spot.0, &folder, libc::S_IFDIR)? {
            let ours = view::path_of(&inode)?;
            let under_way = ours.split(|&b| b == b'/').next() == Some(WORK);
            if under_way && !matches!(entry.node, Node::Gone) {
                return Err(Failure::Misfit("its directory has no place yet"));
            }
            return Ok((spot.0, view::child(&ours, name)));
        }
        // The clone has no copy of the directory. One that the clone made itself at the same path is meant to
        // be shared; any other is not to be touched, unless the guest insists: then the clone removed its copy.
        let here = self.places.look(&(spot.0, path.to_vec()))?;
        let is_own = here.is_some_and(|f| self.born_here(&f) && !self.memory.is_taken(spot.0, &f.handle));
        if is_own || !self.memory.strangers.insert((spot.0, folder)) {
            return Ok(spot);
        }
        Err(Failure::Stranger)
    }

    /// Content of the open file.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ApplyError> {
        let length = bytes.len() as u64;
        let Some(fd) = self.range(offset, length, "data without a file")? else {
            return Ok(());
        };
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(fd, &bytes[done..], offset + done as u64) {
                Ok(0) => return Err(self.failed(io::ErrorKind::WriteZero.into())),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        self.applied.bytes += length;
        Ok(())
    }

    /// A hole in the open file.
    pub fn hole(&mut self, offset: u64, length: u64) -> Result<(), ApplyError> {
        let Some(fd) = self.range(offset, length, "a hole without a file")? else {
            return Ok(());
        };
        // Only whole blocks become holes: one that ends with the file has to take the rest of its block along.
        let ends_file = self.open.as_ref().is_some_and(|o| offset + length == o.size);
        let punched = if ends_file {
            (offset + length).next_multiple_of(MAX_FS_BLOCK) - offset
        } else {
            length
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(fd, flags, offset, punched) {
            Ok(()) => Ok(()),
            // No holes here: zeros are the same content.
            Err(Errno::OPNOTSUPP) => self.zeros(offset, length),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// The end of an entry.
    pub fn entry_end(&mut self) -> Result<(), ApplyError> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let path = self.outer(&open.spot);
        match self.end_file(open) {
            Err(source) if is_misfit(&source) => {
                self.put_off(&path, &source);
                Ok(())
            }
            other => other.map_err(|source| ApplyError::Path { path, source }),
        }
    }

    /// The end of the round.
    pub fn round_end(mut self, end: &RoundEnd) -> Result<Applied, ApplyError> {
        if self.open.is_some() {
            let path = String::new();
            return Err(ApplyError::Stream {
                path,
                what: "the round ends within an entry",
            });
        }
        if !self.refused.is_empty() {
            return Err(ApplyError::Conflicts(std::mem::take(&mut self.refused)));
        }
        if end.last && !self.misfits.is_empty() {
            return Err(ApplyError::Misfits(std::mem::take(&mut self.misfits)));
        }
        self.places.finish().map_err(ApplyError::Finish)?;
        for view in &self.places.views {
            view.sync().map_err(ApplyError::Finish)?;
        }
        if !self.again {
            self.memory.round = end.round;
        }
        self.applied.round = self.memory.round;
        self.applied.stopped_units = self.memory.stopped_units.clone();
        Ok(std::mem::take(&mut self.applied))
    }

    fn locate(&self, entry: &Entry) -> Option<Spot> {
        let path = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(
            &entry.path,
        ));
        if entry.filesystem.is_empty() {
            return locate(&self.places.views, path);
        }
        let mount_point: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.filesystem);
        let fs = self
            .places
            .views
            .iter()
            .position(|v| v.mount_point == Path::new(mount_point))?;
        locate(std::slice::from_ref(&self.places.views[fs]), path).map(|(_, inner)| (fs, inner))
    }

    fn begin(&mut self, spot: Spot, path: &[u8], node: Node) -> Result<(), Failure> {
        let rule = rule(path);
        let active_journal = rule == Rule::Journal && journal::is_active(path);
        if rule == Rule::Exempt || (active_journal && matches!(node, Node::Gone)) {
            self.applied.exempt += 1;
            if let Node::File { size, .. } = node {
                self.open = Some(Open::skipped(spot, size));
            }
            return Ok(());
        }
        if rule == Rule::Merge && !matches!(node, Node::Directory { .. }) {
            let found = self.places.look(&spot)?;
            let there = found.as_ref().map(|found| (&spot, &found.stat));
            let stopped = self.owners.stop_owner(path, there).map_err(Failure::Unit)?;
            if let Some(unit) = stopped {
                self.memory.stopped_units.push(unit);
            }
        }
        match node {
            Node::Gone => self.gone(&spot)?,
            Node::Directory { meta } => self.directory(&spot, &meta)?,
            Node::Symlink { meta, target } => self.small(&spot, &meta, Small::Symlink(target))?,
            Node::Special { meta, rdev } => self.small(&spot, &meta, Small::Special(rdev))?,
            Node::File { meta, size, whole } => {
                let target = if active_journal {
                    self.journal(spot.0, &meta, whole)?
                } else {
                    self.file(&spot, &meta, whole, rule)?
                };
                self.open = Some(Open {
                    spot,
                    meta,
                    size,
                    target,
                });
            }
        }
        Ok(())
    }

    /// Deletes.
    fn gone(&mut self, spot: &Spot) -> io::Result<()> {
        let Some(found) = self.places.look(spot)? else {
            return Ok(());
        };
        if !is_kind(&found.stat, libc::S_IFDIR) && self.clone_changed(spot, &found) {
            match self.settings.on_conflict {
                OnConflict::PreferClone => {
                    self.conflict(spot, "clone", None);
                    return Ok(());
                }
                OnConflict::Fail => {
                    self.refused.push(self.outer(spot));
                    return Ok(());
                }
                OnConflict::PreferGuest => {
                    let kept = self.keeper.keep(&self.places.views[spot.0], &spot.1)?;
                    self.conflict(spot, "guest", kept);
                }
            }
        }
        self.places.set_aside(spot)
    }

    fn directory(&mut self, spot: &Spot, meta: &Meta) -> Result<(), Failure> {
        let wanted = guest_handle(meta);
        let found = self.places.look(spot)?;
        let same = found.as_ref().is_some_and(|f| self.is_same(spot.0, &wanted, f));
        if !same && !spot.1.is_empty() {
            match self.find(spot.0, &wanted, libc::S_IFDIR)? {
                Some(inode) => {
                    let from = view::path_of(&inode)?;
                    if spot.1.starts_with(&[&from[..], b"/"].concat()) {
                        return Err(Failure::Misfit("it would have to be within itself"));
                    }
                    self.places.set_aside(spot)?;
                    // It may have been within what was in its way.
                    let from = (spot.0, view::path_of(&inode)?);
                    self.places.rename(&from, spot)?;
                }
                None => self.new_directory(spot, found, &wanted)?,
            }
        }
        let view = &self.places.views[spot.0];
        let fd = view.open_at(&spot.1, OFlags::PATH | OFlags::DIRECTORY)?;
        meta::apply(
            Named {
                folder: fd.as_fd(),
                name: b"",
            },
            meta,
        )?;
        self.places.set_folder_times(spot, meta.atime, meta.mtime);
        Ok(())
    }

    fn new_directory(&mut self, spot: &Spot, found: Option<Found>, wanted: &Handle) -> io::Result<()> {
        // One that the clone made by itself is shared from now on; one that both had at the split was
        // replaced in the guest.
        let shared = found.as_ref().is_some_and(|f| {
            is_kind(&f.stat, libc::S_IFDIR) && self.born_here(f) && !self.memory.is_taken(spot.0, &f.handle)
        });
        if !shared {
            self.places.set_aside(spot)?;
            self.places.make_directory(spot)?;
        }
        if let Some(made) = self.places.look(spot)? {
            self.memory.identify(spot.0, wanted.clone(), made.handle);
        }
        Ok(())
    }

    /// A node without content.
    fn small(&mut self, spot: &Spot, meta: &Meta, small: Small) -> io::Result<()> {
        let wanted = guest_handle(meta);
        let found = self.places.look(spot)?;
        if !found.as_ref().is_some_and(|f| self.is_same(spot.0, &wanted, f)) {
            if let Some(found) = found.filter(|f| self.clone_changed(spot, f)) {
                let same_content = match &small {
                    Small::Symlink(target) => conflict::links_to(&self.places.views[spot.0], spot, target),
                    Small::Special(_) => false,
                };
                if !same_content && !is_kind(&found.stat, libc::S_IFDIR) && !self.guest_wins(spot)? {
                    return Ok(());
                }
            }
            let fresh = match self.find(spot.0, &wanted, meta.mode & libc::S_IFMT)? {
                Some(inode) => self.places.link(&inode, spot.0)?,
                None => match &small {
                    Small::Symlink(target) => self.places.make_symlink(spot.0, target)?,
                    Small::Special(rdev) => self.places.make_special(spot.0, meta.mode, *rdev)?,
                },
            };
            self.places.put(&fresh, spot)?;
            if let Some(made) = self.places.look(spot)? {
                self.memory.identify(spot.0, wanted, made.handle);
            }
        }
        self.finish_meta(spot, meta, 0)
    }

    fn apply_meta(&self, spot: &Spot, meta: &Meta) -> io::Result<()> {
        let (folder, name) = self.places.views[spot.0].parent(&spot.1)?;
        meta::apply(
            Named {
                folder: folder.as_fd(),
                name,
            },
            meta,
        )
    }

    /// Applies metadata and remembers the state in which the guest's version is now.
    fn finish_meta(&mut self, spot: &Spot, meta: &Meta, size: u64) -> io::Result<()> {
        self.apply_meta(spot, meta)?;
        if let Some(found) = self.places.look(spot)? {
            // What the clone did to it before is settled.
            self.touched.forget(spot.0, &found.handle);
            let key = (spot.0, found.handle);
            if is_kind(&found.stat, libc::S_IFREG) {
                self.memory.sizes.insert(key.clone(), size);
            }
            self.memory.settled.insert(key, changed_at(&found.stat));
        }
        Ok(())
    }

    /// For nodes without content: whether the guest's version goes in, after the clone's was kept.
    fn guest_wins(&mut self, spot: &Spot) -> io::Result<bool> {
        match self.settings.on_conflict {
            OnConflict::PreferGuest => {
                let kept = self.keeper.keep(&self.places.views[spot.0], &spot.1)?;
                self.conflict(spot, "guest", kept);
                Ok(true)
            }
            OnConflict::PreferClone => {
                self.conflict(spot, "clone", None);
                Ok(false)
            }
            OnConflict::Fail => {
                self.refused.push(self.outer(spot));
                Ok(false)
            }
        }
    }

    fn conflict(&mut self, spot: &Spot, resolution: &str, kept: Option<String>) {
        let path = self.outer(spot);
        self.applied.conflicts.push(understudy_channel::Conflict {
            path,
            resolution: resolution.to_owned(),
            kept,
        });
    }

    /// Whether the clone itself changed what is at `spot`, since its boot and since we wrote it.
    fn clone_changed(&self, spot: &Spot, found: &Found) -> bool {
        let ctime = changed_at(&found.stat);
        let this_boot = ctime >= self.settings.since;
        match self.touched.is_touched(spot.0, &found.handle) {
            // A descriptor that is only closed changes nothing; it may even be ours, closed by a child.
            Some(true) => {
                let key = (spot.0, found.handle.clone());
                self.memory.settled.get(&key) != Some(&ctime)
            }
            // Early in the boot nobody watched yet.
            Some(false) => {
                this_boot
                    && self.places.views[spot.0]
                        .marked_at()
                        .is_none_or(|marked| ctime < marked)
            }
            None => this_boot && !self.memory.sizes.contains_key(&(spot.0, found.handle.clone())),
        }
    }

    /// Whether an inode was made after the split, by the clone or by the import.
    fn born_here(&self, found: &Found) -> bool {
        (found.stat.stx_btime.tv_sec, found.stat.stx_btime.tv_nsec) >= self.settings.since
    }

    /// Whether an inode with the handle of one of the guest's is another one: made later, or standing for
    /// another already.
    fn is_other(&self, fs: usize, found: &Found) -> bool {
        self.born_here(found) || self.memory.is_taken(fs, &found.handle)
    }

    /// Whether what was found is the clone's copy of the guest's inode.
    fn is_same(&self, fs: usize, guest: &Handle, found: &Found) -> bool {
        match self.memory.identity(fs, guest) {
            Some(ours) => *ours == found.handle,
            None => found.handle == *guest && !self.is_other(fs, found),
        }
    }

    /// The clone's copy of the guest's inode, wherever it is.
    fn find(&self, fs: usize, guest: &Handle, kind: u32) -> io::Result<Option<OwnedFd>> {
        let known = self.memory.identity(fs, guest);
        let handle = known.unwrap_or(guest);
        let Some(fd) = self.places.views[fs].open_handle(handle)? else {
            return Ok(None);
        };
        let stat = stat_fd(&fd)?;
        let found = Found {
            stat,
            handle: handle.clone(),
        };
        let usable =
            stat.stx_nlink > 0 && is_kind(&stat, kind) && (known.is_some() || !self.is_other(fs, &found));
        Ok(usable.then_some(fd))
    }

    fn outer(&self, spot: &Spot) -> String {
        String::from_utf8_lossy(&self.places.views[spot.0].outer(&spot.1)).into_owned()
    }

    fn failed(&self, source: io::Error) -> ApplyError {
        let path = self
            .open
            .as_ref()
            .map(|o| self.outer(&o.spot))
            .unwrap_or_default();
        ApplyError::Path { path, source }
    }
}

enum Small {
    Symlink(Vec<u8>),
    Special(u64),
}

fn changed_at(stat: &rustix::fs::Statx) -> (i64, u32) {
    (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec)
}

fn guest_handle(meta: &Meta) -> Handle {
    Handle {
        kind: meta.handle.0,
        bytes: meta.handle.1.clone(),
    }
}
