//! The filter: which names changed (DESIGN §5, "The filter").
//!
//! Its events are a dirty set, never a log: they coalesce and reorder, and say only "look here again".
//! Directories are kept by handle, so that what happened in one is found wherever it was moved since.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;

use crate::marks::{Change, Marks};
use crate::service::{lock, spawn};
use crate::sys::fanotify::{Event, Group, Place};
use crate::sys::handle::Handle;
use crate::view::View;
use crate::{mounts, view, warning};

/// Where something changed: index of the file system, and path below its root.
pub type Spot = (usize, Vec<u8>);

/// Why capturing could not begin.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// fanotify is not there.
    #[error("fanotify is not available ({0}); it needs root and Linux 5.17 or newer")]
    Unavailable(io::Error),
    /// A file system could not be watched.
    #[error("the file system at {mount_point} cannot be watched: {source}")]
    Mark {
        /// Mount point.
        mount_point: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mounts could not be read.
    #[error("the list of mounts could not be read: {0}")]
    Mounts(io::Error),
    /// Changes were lost: all that was captured is in doubt.
    #[error("the capture is incomplete: {0}")]
    Lost(String),
}

/// What a filter collects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collect {
    /// Changed names, to be drained: the guest's side.
    Names,
    /// Changed inodes, to be asked for: the clone's side.
    Inodes,
}

#[derive(Debug, Default)]
struct Dirty {
    marks: Marks,
    lost: Option<String>,
}

/// A running filter.
#[derive(Debug)]
pub struct Filter {
    group: Group,
    views: Mutex<Vec<Arc<View>>>,
    dirty: Mutex<(Dirty, Vec<u8>)>,
    /// Fixed list of file systems (tests); else all local ones, those that are mounted later among them.
    fixed: bool,
    collect: Collect,
    ended: AtomicBool,
    on_lost: Mutex<Option<LostHook>>,
}

struct LostHook(Box<dyn Fn(&str) + Send>);

impl std::fmt::Debug for LostHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LostHook")
    }
}

impl Filter {
    /// Begins to capture: every change that begins after this returns is seen. `only` are the file
    /// systems to watch; absent, they are all writable local ones.
    pub fn begin(only: Option<Vec<View>>, collect: Collect) -> Result<Arc<Self>, FilterError> {
        let group = Group::new().map_err(FilterError::Unavailable)?;
        let filter = Arc::new(Self {
            group,
            views: Mutex::new(Vec::new()),
            // Events are of at most a name and a few handles: this holds about a thousand.
            dirty: Mutex::new((Dirty::default(), vec![0; 128 * 1024])),
            fixed: only.is_some(),
            collect,
            ended: AtomicBool::new(false),
            on_lost: Mutex::new(None),
        });
        match only {
            Some(list) => {
                for view in list {
                    filter.add(view)?;
                }
            }
            None => filter.add_mounted()?,
        }
        let weak = Arc::downgrade(&filter);
        spawn("filter", move || {
            let mountinfo = std::fs::File::open("/proc/self/mountinfo").ok();
            // The strong reference is given up while waiting, so that dropping the filter ends it.
            while let Some(filter) = weak.upgrade() {
                if filter.ended.load(Ordering::SeqCst) {
                    return;
                }
                filter.wait_and_read(mountinfo.as_ref());
            }
        });
        Ok(filter)
    }

    /// Calls `hook` when changes were lost.
    pub fn on_lost(&self, hook: impl Fn(&str) + Send + 'static) {
        *lock(&self.on_lost) = Some(LostHook(Box::new(hook)));
    }

    /// Ends the capture.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// The file systems, in the order of their indices.
    pub fn views(&self) -> Vec<Arc<View>> {
        lock(&self.views).clone()
    }

    /// Takes what changed since the last drain.
    pub fn drain(&self) -> Result<Marks, FilterError> {
        let mut guard = lock(&self.dirty);
        self.read_all(&mut guard);
        match &guard.0.lost {
            Some(reason) => Err(FilterError::Lost(reason.clone())),
            None => Ok(std::mem::take(&mut guard.0.marks)),
        }
    }

    /// Whether an inode changed since the filter began or it was last forgotten; `None`: changes were lost.
    pub fn is_touched(&self, fs: usize, handle: &Handle) -> Option<bool> {
        let mut guard = lock(&self.dirty);
        self.read_all(&mut guard);
        if guard.0.lost.is_some() {
            return None;
        }
        Some(guard.0.marks.inodes.contains(&(fs, handle.clone())))
    }

    /// Forgets that an inode changed.
    pub fn forget(&self, fs: usize, handle: &Handle) {
        lock(&self.dirty).0.marks.inodes.remove(&(fs, handle.clone()));
    }

    /// Watches what was mounted since, too.
    pub fn catch_up(&self) -> Result<(), FilterError> {
        if self.fixed { Ok(()) } else { self.add_mounted() }
    }

    /// About how many names changed since the last drain.
    pub fn pending(&self) -> u64 {
        let mut guard = lock(&self.dirty);
        self.read_all(&mut guard);
        guard.0.marks.len() as u64
    }

    fn add(&self, view: View) -> Result<(), FilterError> {
        let mut views = lock(&self.views);
        if views.iter().any(|known| known.dev == view.dev) {
            return Ok(());
        }
        self.group.mark(view.mounted()).map_err(|source| {
            let mount_point = view.mount_point.clone();
            FilterError::Mark { mount_point, source }
        })?;
        view.mark_now();
        views.push(Arc::new(view));
        Ok(())
    }

    fn add_mounted(&self) -> Result<(), FilterError> {
        for mount in mounts::local_writable().map_err(FilterError::Mounts)? {
            let mount_point = mount.mount_point;
            let view =
                View::open(&mount_point).map_err(|source| FilterError::Mark { mount_point, source })?;
            self.add(view)?;
        }
        Ok(())
    }

    fn wait_and_read(&self, mountinfo: Option<&std::fs::File>) {
        let mut fds = vec![PollFd::new(&self.group, PollFlags::IN)];
        if let Some(file) = mountinfo.filter(|_| !self.fixed) {
            fds.push(PollFd::new(file, PollFlags::PRI));
        }
        // Waking now and then is for the end of the capture only.
        let timeout = rustix::time::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        if let Err(error) = poll(&mut fds, Some(&timeout)) {
            if error != rustix::io::Errno::INTR {
                self.lose(
                    &mut lock(&self.dirty).0,
                    &format!("waiting for events failed: {error}"),
                );
            }
            return;
        }
        let mounted = fds.get(1).is_some_and(|f| !f.revents().is_empty());
        if !fds[0].revents().is_empty() {
            self.read_all(&mut lock(&self.dirty));
        }
        if mounted && let Err(error) = self.add_mounted() {
            // What was mounted before is captured still; the new one is not, and must not seem to be.
            self.lose(&mut lock(&self.dirty).0, &error.to_string());
        }
    }

    fn read_all(&self, guard: &mut (Dirty, Vec<u8>)) {
        let (dirty, buffer) = guard;
        let own = std::process::id() as i32;
        loop {
            match self.group.read(buffer) {
                Ok(events) if events.is_empty() => return,
                Ok(events) => {
                    for event in events.iter().filter(|e| e.pid != own) {
                        self.note(dirty, event);
                    }
                }
                Err(error) => return self.lose(dirty, &format!("reading events failed: {error}")),
            }
        }
    }

    fn note(&self, dirty: &mut Dirty, event: &Event) {
        if event.overflow {
            return self.lose(dirty, "the kernel dropped events for lack of memory");
        }
        let change = Change {
            structural: event.structural,
            tree: event.renamed,
        };
        for place in event.names.iter().filter(|_| self.collect == Collect::Names) {
            if let Some(fs) = self.index(place) {
                let name = place.name.clone().unwrap_or_default();
                let is_name = !name.is_empty();
                let mark = dirty.marks.mark(fs, place.handle.clone(), name, change);
                if let Some(inode) = event.inode.as_ref().filter(|i| is_name && i.fsid == place.fsid) {
                    mark.inodes.insert(inode.handle.clone());
                }
            }
        }
        // Where there is a name, it is enough for the guest's side.
        let wanted = self.collect == Collect::Inodes || event.names.is_empty();
        if let Some(place) = event.inode.as_ref().filter(|_| wanted)
            && let Some(fs) = self.index(place)
        {
            dirty.marks.inodes.insert((fs, place.handle.clone()));
        }
    }

    fn index(&self, place: &Place) -> Option<usize> {
        lock(&self.views).iter().position(|v| v.fsid == place.fsid)
    }

    fn lose(&self, dirty: &mut Dirty, reason: &str) {
        if dirty.lost.is_none() {
            warning!("the capture is incomplete: {reason}");
            dirty.lost = Some(reason.to_owned());
            if let Some(hook) = lock(&self.on_lost).as_ref() {
                (hook.0)(reason);
            }
        }
    }
}

/// Calls `each` with path and inode number of everything below the directory `top`. What goes away
/// meanwhile is left out.
pub fn walk(view: &View, top: &[u8], each: &mut impl FnMut(&[u8], u64)) -> io::Result<()> {
    let mut folders = vec![top.to_vec()];
    while let Some(folder) = folders.pop() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
        let fd = match view.open_at(&folder, flags) {
            Ok(fd) => fd,
            Err(error) if view::is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        for entry in rustix::fs::Dir::new(fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let path = view::child(&folder, name);
            each(&path, entry.ino());
            let is_directory = match entry.file_type() {
                rustix::fs::FileType::Directory => true,
                rustix::fs::FileType::Unknown => view
                    .stat(&path)?
                    .is_some_and(|s| view::is_kind(&s, libc::S_IFDIR)),
                _ => false,
            };
            if is_directory {
                folders.push(path);
            }
        }
    }
    Ok(())
}

/// Opens a file for reading without leaving a trace in its access time where that is allowed.
pub fn open_quietly(view: &View, path: &[u8]) -> io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    view.open_at(path, flags | OFlags::NOATIME)
}
