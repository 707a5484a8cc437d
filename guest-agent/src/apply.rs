//! Applies the guest's changes to the clone, path by path (DESIGN §5, "Merge").

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use understudy_channel::{Applied, Entry, Meta, Node, OnConflict, RoundEnd};

use crate::conflict::{self, Keeper};
use crate::filter::{Filter, Spot};
use crate::joined;
use crate::journal;
use crate::memory::Memory;
use crate::meta::{self, Named};
use crate::place::{Found, Places};
use crate::rules::{Rule, is_text, rule};
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
    /// A unit whose files the guest changed goes on running.
    #[error("{0}")]
    Unit(String),
    /// The end of the round failed.
    #[error("the round could not be completed on the clone: {0}")]
    Finish(io::Error),
}

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
    /// The clone changed files of which only parts came: the round has to be sent again.
    again: bool,
}

/// The file whose content is coming.
#[derive(Debug)]
struct Open {
    spot: Spot,
    meta: Meta,
    size: u64,
    target: Target,
}

#[derive(Debug)]
enum Target {
    /// The content is not wanted.
    Skip,
    /// Into the inode that is at the path.
    InPlace(OwnedFd),
    /// Into a new inode, put in place at the end.
    Fresh(Spot, OwnedFd),
    /// Into the inode at the path, whose own tail is put back at the end.
    Tail(OwnedFd, Vec<u8>),
    /// Into a new inode, whose content is joined with what is at the path at the end.
    Join(Spot, OwnedFd),
    /// Into a new inode that becomes an archived journal.
    Journal(Spot, OwnedFd),
    /// Into an archived journal that an earlier round made.
    JournalInPlace(Spot, OwnedFd),
    /// Into a file beside: the clone's version stays.
    Beside(OwnedFd),
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
        let result = self.begin(spot, &entry.path, entry.node);
        result.map_err(|error| match error {
            Failure::Io(source) => ApplyError::Path { path, source },
            Failure::Unit(text) => ApplyError::Unit(text),
        })
    }

    /// Content of the open file.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ApplyError> {
        let length = bytes.len() as u64;
        let Some(fd) = self.range(offset, length, "data")? else {
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
        let Some(fd) = self.range(offset, length, "hole")? else {
            return Ok(());
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(fd, flags, offset, length) {
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
        self.end_file(open)
            .map_err(|source| ApplyError::Path { path, source })
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
            return Err(ApplyError::Conflicts(self.refused));
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
        Ok(self.applied)
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
            if let Node::File { meta, size, .. } = node {
                self.open = Some(Open {
                    spot,
                    meta,
                    size,
                    target: Target::Skip,
                });
            }
            return Ok(());
        }
        if rule == Rule::Merge && !matches!(node, Node::Directory { .. }) {
            let ino = self.places.look(&spot)?.map(|f| f.stat.stx_ino);
            let dev = self.places.views[spot.0].dev;
            let stopped = self
                .owners
                .stop_owner(path, ino.map(|i| (dev, i)))
                .map_err(Failure::Unit)?;
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

    fn directory(&mut self, spot: &Spot, meta: &Meta) -> io::Result<()> {
        let wanted = guest_handle(meta);
        let found = self.places.look(spot)?;
        let same = found.as_ref().is_some_and(|f| self.is_same(spot.0, &wanted, f));
        if !same && !spot.1.is_empty() {
            match self.find(spot.0, &wanted, libc::S_IFDIR)? {
                Some(inode) => {
                    let from = (spot.0, view::path_of(&inode)?);
                    if spot.1.starts_with(&[&from.1[..], b"/"].concat()) {
                        // Read while it was on the move in the guest: dirty again, so a later round tells.
                        return self.stand_in(spot, found);
                    }
                    self.places.set_aside(spot)?;
                    self.places.parent(spot)?;
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

    /// A directory at `spot` for now.
    fn stand_in(&mut self, spot: &Spot, found: Option<Found>) -> io::Result<()> {
        if found.is_some_and(|f| is_kind(&f.stat, libc::S_IFDIR)) {
            return Ok(());
        }
        self.places.set_aside(spot)?;
        self.places.make_directory(spot)
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

    /// Decides where the content of a file goes.
    fn file(&mut self, spot: &Spot, meta: &Meta, whole: bool, rule: Rule) -> io::Result<Target> {
        let wanted = guest_handle(meta);
        let found = self.places.look(spot)?;
        let same = found
            .as_ref()
            .is_some_and(|f| is_kind(&f.stat, libc::S_IFREG) && self.is_same(spot.0, &wanted, f));
        let changed = found
            .as_ref()
            .filter(|f| is_kind(&f.stat, libc::S_IFREG) && self.clone_changed(spot, f));
        let clone_changed = changed.is_some();
        // A log that was joined has the clone's tail, also when nothing was appended since.
        let log = found.as_ref().filter(|f| {
            rule == Rule::Log && is_kind(&f.stat, libc::S_IFREG) && (clone_changed || self.has_tail(spot, f))
        });
        if let Some(found) = log
            && let Some(target) = self.log(spot, found, same, whole)?
        {
            if clone_changed {
                self.conflict(spot, "joined", None);
            }
            return Ok(target);
        }
        if clone_changed {
            if !whole {
                // Only parts came, and what they are parts of is gone.
                self.again = true;
                return Ok(Target::Skip);
            }
            match self.settings.on_conflict {
                OnConflict::PreferClone => {
                    let (kept, fd) = self.keeper.beside(&self.outer(spot))?;
                    self.conflict(spot, "clone", Some(kept));
                    return Ok(Target::Beside(fd));
                }
                OnConflict::Fail => {
                    self.refused.push(self.outer(spot));
                    return Ok(Target::Skip);
                }
                OnConflict::PreferGuest => {
                    let kept = self.keeper.keep(&self.places.views[spot.0], &spot.1)?;
                    self.conflict(spot, "guest", kept);
                }
            }
        }
        if !same && !whole {
            self.again = true;
            return Ok(Target::Skip);
        }
        if !same && let Some(inode) = self.find(spot.0, &wanted, libc::S_IFREG)? {
            let linked = self.places.link(&inode, spot.0)?;
            self.places.put(&linked, spot)?;
        } else if !same {
            let (fresh, fd) = self.places.make_file(spot.0)?;
            return Ok(Target::Fresh(fresh, fd));
        }
        match self.places.views[spot.0].open_at(&spot.1, OFlags::RDWR | OFlags::NOFOLLOW) {
            Ok(fd) => Ok(Target::InPlace(fd)),
            // It is being executed: a new inode takes its name, the running one stays what it is.
            Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) && whole => {
                let (fresh, fd) = self.places.make_file(spot.0)?;
                Ok(Target::Fresh(fresh, fd))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a log is longer than the guest's version of it.
    fn has_tail(&self, spot: &Spot, found: &Found) -> bool {
        let guest_size = self.memory.sizes.get(&(spot.0, found.handle.clone()));
        guest_size.is_some_and(|size| found.stat.stx_size > *size)
    }

    /// Where the content of a log goes to which the clone has appended; `None`: it cannot be joined.
    fn log(&mut self, spot: &Spot, found: &Found, same: bool, whole: bool) -> io::Result<Option<Target>> {
        match self.memory.sizes.get(&(spot.0, found.handle.clone())).copied() {
            Some(guest_size) if same && found.stat.stx_size >= guest_size => {
                let fd = self.places.views[spot.0].open_at(&spot.1, OFlags::RDWR | OFlags::NOFOLLOW)?;
                let Some(tail) = joined::take_tail(&fd, guest_size)? else {
                    return Ok(None);
                };
                Ok(Some(Target::Tail(fd, tail)))
            }
            _ if whole => {
                let (fresh, fd) = self.places.make_file(spot.0)?;
                Ok(Some(Target::Join(fresh, fd)))
            }
            _ => Ok(None),
        }
    }

    /// Where the content of one of the guest's active journal files goes.
    fn journal(&mut self, fs: usize, meta: &Meta, whole: bool) -> io::Result<Target> {
        let key = (fs, guest_handle(meta));
        if let Some(path) = self.memory.journals.get(&key).cloned()
            && self.places.look(&(fs, path.clone()))?.is_some()
        {
            let fd = self.places.views[fs].open_at(&path, OFlags::RDWR | OFlags::NOFOLLOW)?;
            return Ok(Target::JournalInPlace((fs, path), fd));
        }
        if !whole {
            self.again = true;
            return Ok(Target::Skip);
        }
        let (fresh, fd) = self.places.make_file(fs)?;
        Ok(Target::Journal(fresh, fd))
    }

    fn end_file(&mut self, open: Open) -> io::Result<()> {
        let Open {
            spot,
            meta,
            size,
            target,
        } = open;
        match target {
            Target::Skip => return Ok(()),
            Target::Beside(fd) => return rustix::fs::ftruncate(fd, size).map_err(Into::into),
            Target::InPlace(fd) => rustix::fs::ftruncate(fd, size)?,
            Target::Fresh(fresh, fd) => {
                rustix::fs::ftruncate(&fd, size)?;
                let handle = crate::sys::handle::handle_of(&fd, c"")?;
                self.memory.identify(spot.0, guest_handle(&meta), handle);
                // Metadata first: under its own name it is complete or not there.
                self.apply_meta(&fresh, &meta)?;
                self.places.put(&fresh, &spot)?;
            }
            Target::Tail(fd, tail) => {
                joined::put_tail(&fd, size, &tail)?;
            }
            Target::Join(fresh, fd) => {
                rustix::fs::ftruncate(&fd, size)?;
                self.join(&spot, &meta, &fd)?;
                self.places.set_aside(&fresh)?;
            }
            Target::Journal(fresh, fd) => {
                rustix::fs::ftruncate(&fd, size)?;
                return self.new_journal(&spot, &meta, &fresh, &fd);
            }
            Target::JournalInPlace(at, fd) => {
                rustix::fs::ftruncate(&fd, size)?;
                journal::archive(&fd)?;
                return self.apply_meta(&at, &meta);
            }
        }
        self.finish_meta(&spot, &meta, size)
    }

    fn join(&mut self, spot: &Spot, meta: &Meta, guest: &OwnedFd) -> io::Result<()> {
        let view = &self.places.views[spot.0];
        let mut path = self.places.views[spot.0].outer(&spot.1);
        let text = is_text(&path);
        path.clear();
        let own = view.open_at(&spot.1, OFlags::RDWR | OFlags::NOFOLLOW)?;
        let stat = stat_fd(&own)?;
        let at_start = self
            .settings
            .log_sizes
            .get(spot)
            .filter(|s| s.0 == stat.stx_ino)
            .map(|s| s.1);
        joined::join(&own, guest, at_start, text)?;
        let handle = crate::sys::handle::handle_of(&own, c"")?;
        self.memory.identify(spot.0, guest_handle(meta), handle);
        Ok(())
    }

    fn new_journal(&mut self, spot: &Spot, meta: &Meta, fresh: &Spot, fd: &OwnedFd) -> io::Result<()> {
        let (folder, name) = view::split(&spot.1);
        let Some(name) = journal::archived_name(fd, name)? else {
            // Nothing was logged into it yet.
            return self.places.set_aside(fresh);
        };
        journal::archive(fd)?;
        let key = (spot.0, guest_handle(meta));
        let handle = crate::sys::handle::handle_of(fd, c"")?;
        let at = (spot.0, view::child(folder, &name));
        self.apply_meta(fresh, meta)?;
        self.places.put(fresh, &at)?;
        // The clone's journald found the file of the split unclosed and renamed it: ours has all of it.
        if let Some(old) = self.find(spot.0, &key.1, libc::S_IFREG)? {
            let path = view::path_of(&old)?;
            if path.ends_with(b".journal~") && view::split(&path).0 == folder {
                self.places.set_aside(&(spot.0, path))?;
            }
        }
        self.memory.identify(key.0, key.1.clone(), handle);
        self.memory.journals.insert(key, at.1);
        Ok(())
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
            if is_kind(&found.stat, libc::S_IFREG) {
                self.memory.sizes.insert((spot.0, found.handle), size);
            }
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
        let ctime = (found.stat.stx_ctime.tv_sec, found.stat.stx_ctime.tv_nsec);
        let this_boot = ctime >= self.settings.since;
        match self.touched.is_touched(spot.0, &found.handle) {
            Some(true) => true,
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

    fn range(&self, offset: u64, length: u64, what: &'static str) -> Result<Option<&OwnedFd>, ApplyError> {
        let Some(open) = &self.open else {
            return Err(ApplyError::Stream {
                path: String::new(),
                what,
            });
        };
        if offset.checked_add(length).is_none_or(|end| end > open.size) {
            let path = self.outer(&open.spot);
            return Err(ApplyError::Stream {
                path,
                what: "a range beyond the file's size",
            });
        }
        Ok(match &open.target {
            Target::Skip => None,
            Target::InPlace(fd)
            | Target::Fresh(_, fd)
            | Target::Tail(fd, _)
            | Target::Join(_, fd)
            | Target::Journal(_, fd)
            | Target::JournalInPlace(_, fd)
            | Target::Beside(fd) => Some(fd),
        })
    }

    fn zeros(&mut self, offset: u64, length: u64) -> Result<(), ApplyError> {
        let zeros = [0u8; 4096];
        let mut at = offset;
        while at < offset + length {
            let count = (offset + length - at).min(zeros.len() as u64) as usize;
            self.data(at, &zeros[..count])?;
            at += count as u64;
        }
        Ok(())
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

enum Failure {
    Io(io::Error),
    Unit(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn guest_handle(meta: &Meta) -> Handle {
    Handle {
        kind: meta.handle.0,
        bytes: meta.handle.1.clone(),
    }
}
