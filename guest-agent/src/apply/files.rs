//! Files: where their content goes, and what becomes of it at its end.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use understudy_channel::{Meta, OnConflict};

use super::{Applier, ApplyError, guest_handle};
use crate::filter::Spot;
use crate::place::Found;
use crate::rules::{Rule, is_text};
use crate::view::{self, is_kind, stat_fd};
use crate::{joined, journal, warning};

/// The file whose content is coming.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) spot: Spot,
    pub(super) meta: Meta,
    pub(super) size: u64,
    pub(super) target: Target,
}

impl Open {
    /// A file whose content is not wanted.
    pub(super) fn skipped(spot: Spot, size: u64) -> Self {
        Self {
            spot,
            meta: Meta::default(),
            size,
            target: Target::Skip,
        }
    }
}

#[derive(Debug)]
pub(super) enum Target {
    /// The content is not wanted.
    Skip,
    /// Into the inode that is at the path.
    InPlace(OwnedFd),
    /// Into a new inode, put in place at the end.
    Fresh(Spot, OwnedFd),
    /// Into the inode at the path, whose own tail is put back at the end: where the guest's version ended, and
    /// the tail.
    Tail(OwnedFd, u64, Vec<u8>),
    /// Into a new inode, whose content is joined with what is at the path at the end.
    Join(Spot, OwnedFd),
    /// Into a new inode that becomes an archived journal.
    Journal(Spot, OwnedFd),
    /// Into an archived journal that an earlier round made.
    JournalInPlace(Spot, OwnedFd),
    /// Into a file beside: the clone's version stays.
    Beside(OwnedFd),
}

impl Applier<'_> {
    /// Decides where the content of a file goes.
    pub(super) fn file(&mut self, spot: &Spot, meta: &Meta, whole: bool, rule: Rule) -> io::Result<Target> {
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
        if !same {
            if let Some(inode) = self.find(spot.0, &wanted, libc::S_IFREG)? {
                let linked = self.places.link(&inode, spot.0)?;
                self.places.put(&linked, spot)?;
            } else if whole {
                let (fresh, fd) = self.places.make_file(spot.0)?;
                return Ok(Target::Fresh(fresh, fd));
            } else {
                self.again = true;
                return Ok(Target::Skip);
            }
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
                Ok(Some(Target::Tail(fd, guest_size, tail)))
            }
            _ if whole => {
                let (fresh, fd) = self.places.make_file(spot.0)?;
                Ok(Some(Target::Join(fresh, fd)))
            }
            _ => Ok(None),
        }
    }

    /// Where the content of one of the guest's active journal files goes.
    pub(super) fn journal(&mut self, fs: usize, meta: &Meta, whole: bool) -> io::Result<Target> {
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

    pub(super) fn end_file(&mut self, open: Open) -> io::Result<()> {
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
            Target::Tail(fd, _, tail) => {
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

    pub(super) fn range(
        &self,
        offset: u64,
        length: u64,
        what: &'static str,
    ) -> Result<Option<&OwnedFd>, ApplyError> {
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
            | Target::Tail(fd, _, _)
            | Target::Join(_, fd)
            | Target::Journal(_, fd)
            | Target::JournalInPlace(_, fd)
            | Target::Beside(fd) => Some(fd),
        })
    }

    pub(super) fn zeros(&mut self, offset: u64, length: u64) -> Result<(), ApplyError> {
        let zeros = [0u8; 4096];
        let mut at = offset;
        while at < offset + length {
            let count = (offset + length - at).min(zeros.len() as u64) as usize;
            self.data(at, &zeros[..count])?;
            at += count as u64;
        }
        Ok(())
    }
}

impl Drop for Applier<'_> {
    /// A session that broke within a joined log leaves it as it was: the clone's own lines are in memory only.
    fn drop(&mut self) {
        if let Some(Open {
            target: Target::Tail(fd, guest_size, tail),
            spot,
            ..
        }) = &self.open
            && let Err(error) = joined::put_tail(fd, *guest_size, tail)
        {
            warning!("the clone's lines in {} are lost: {error}", self.outer(spot));
        }
    }
}
