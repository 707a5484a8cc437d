//! What a round consists of: the dirty set, looked up in the guest as of now (DESIGN §5, step 6).
//!
//! The guest runs on meanwhile. So nothing here is taken by its path: directories are opened by handle, and
//! an [`Item`] is a name in a directory, wherever that is. Paths only order the items, and tell people.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::filter::{Spot, walk};
use crate::marks::{Change, Mark, Marks};
use crate::rules::{Rule, rule};
use crate::sys::handle::{self, Handle};
use crate::view::{self, View, c_string, is_absent, is_kind, stat_fd};

/// A name that a round tells about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where it is, as far as anybody can say while directories move.
    pub spot: Spot,
    /// The directory that the name is in. The file system's root is in none: empty.
    pub folder: Handle,
    /// The directory was made since the capture began: the clone knows it only if it is told.
    pub young_folder: bool,
    /// The name; empty for the file system's root.
    pub name: Vec<u8>,
    /// What happened.
    pub change: Change,
    /// Whether anything has the name.
    pub present: bool,
}

/// A round.
#[derive(Debug, Default)]
pub struct Plan {
    /// By path: directories before what is in them.
    pub items: Vec<Item>,
    /// What moved away while it was looked up, to be looked up again.
    pub raced: Marks,
}

/// Whether what moved takes along what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trees {
    /// Only the names that changed are of interest.
    Leave,
    /// Everything below a directory that moved belongs to the round: on the clone it may be gone.
    Expand,
}

/// Looks up what changed. Paths that rules exempt are left out, and so is what is in `skip`.
pub fn plan(views: &[Arc<View>], marks: &Marks, trees: Trees, skip: &[Spot]) -> io::Result<Plan> {
    let mut planner = Planner {
        views,
        skip,
        items: HashMap::new(),
        reached: HashSet::new(),
        walked: HashSet::new(),
        introduced: HashSet::new(),
        trees,
        raced: Marks::default(),
    };
    let mut inodes = marks.inodes.clone();
    for ((fs, handle), names) in &marks.names {
        planner.names(*fs, handle, names)?;
        let told = names.values().flat_map(|mark| &mark.inodes);
        inodes.extend(told.map(|inode| (*fs, inode.clone())));
    }
    planner.inodes(inodes)?;
    let mut items: Vec<Item> = planner.items.into_values().collect();
    items.sort_by(|a, b| a.spot.cmp(&b.spot).then_with(|| a.folder.cmp(&b.folder)));
    Ok(Plan {
        items,
        raced: planner.raced,
    })
}

/// A directory that is open.
struct Folder {
    fs: usize,
    fd: OwnedFd,
    handle: Handle,
    path: Vec<u8>,
    young: bool,
}

/// The path of a directory that is open; `None` where it lies outside of the part of its file system that is
/// mounted: then nobody in the guest sees it, and no path leads there on the clone.
fn reachable_path(view: &View, fd: &OwnedFd, handle: &Handle) -> io::Result<Option<Vec<u8>>> {
    let mut path = view::path_of(fd)?;
    let mut misses = 0;
    for _ in 0..100 {
        match view.open_at(&path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(found) if handle::handle_of(&found, c"")? == *handle => return Ok(Some(path)),
            Ok(_) => {}
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
        // It may be moving, and even have come back in between.
        let now = view::path_of(fd)?;
        misses = if now == path { misses + 1 } else { 0 };
        if misses == 3 {
            return Ok(None);
        }
        path = now;
    }
    Ok(Some(path))
}

struct Planner<'a> {
    views: &'a [Arc<View>],
    skip: &'a [Spot],
    items: HashMap<(usize, Handle, Vec<u8>), Item>,
    /// Inodes that items lead to.
    reached: HashSet<(usize, Handle)>,
    walked: HashSet<(usize, Handle)>,
    /// Young directories that are items themselves.
    introduced: HashSet<(usize, Handle)>,
    trees: Trees,
    raced: Marks,
}

impl Planner<'_> {
    /// Names that changed in a directory. Of one that is gone its own parent tells.
    fn names(&mut self, fs: usize, handle: &Handle, names: &HashMap<Vec<u8>, Mark>) -> io::Result<()> {
        let Some(folder) = self.folder(fs, handle)? else {
            return Ok(());
        };
        let its_own = names.get(&b""[..]).map(|mark| mark.change);
        let renewed = names.values().any(|mark| mark.change.structural);
        if let Some(change) = its_own.or(renewed.then(Change::default)) {
            self.directory(&folder, change)?;
        }
        for (name, mark) in names.iter().filter(|(name, _)| !name.is_empty()) {
            self.name(&folder, name, mark.change)?;
        }
        Ok(())
    }

    /// Opens a directory by its handle; `None` where it is no more.
    fn folder(&self, fs: usize, handle: &Handle) -> io::Result<Option<Folder>> {
        let view = &self.views[fs];
        let Some(fd) = view.open_handle(handle)? else {
            return Ok(None);
        };
        let stat = stat_fd(&fd)?;
        if stat.stx_nlink == 0 || !is_kind(&stat, libc::S_IFDIR) {
            return Ok(None);
        }
        let born = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec);
        let Some(path) = reachable_path(view, &fd, handle)? else {
            return Ok(None);
        };
        Ok(Some(Folder {
            fs,
            handle: handle.clone(),
            young: !path.is_empty() && view.marked_at().is_some_and(|marked| born >= marked),
            path,
            fd,
        }))
    }

    /// A name in a directory, and what moved along with it.
    fn name(&mut self, folder: &Folder, name: &[u8], change: Change) -> io::Result<()> {
        if folder.young && self.introduced.insert((folder.fs, folder.handle.clone())) {
            // The clone has no such directory until it is told where it is.
            self.directory(folder, Change::default())?;
        }
        let path = view::child(&folder.path, name);
        let present = match handle::handle_of(&folder.fd, &c_string(name)?) {
            Ok(inode) => {
                self.reached.insert((folder.fs, inode));
                true
            }
            Err(error) if is_absent(&error) => false,
            Err(error) => return Err(error),
        };
        let tree = present && change.tree && self.trees == Trees::Expand;
        self.insert(Item {
            spot: (folder.fs, path.clone()),
            folder: folder.handle.clone(),
            young_folder: folder.young,
            name: name.to_vec(),
            change,
            present,
        });
        if tree {
            self.tree(folder, name)?;
        }
        Ok(())
    }

    /// A directory itself: a name in its parent.
    fn directory(&mut self, folder: &Folder, change: Change) -> io::Result<()> {
        if folder.path.is_empty() {
            self.insert(Item {
                spot: (folder.fs, Vec::new()),
                folder: Handle::default(),
                young_folder: false,
                name: Vec::new(),
                change,
                present: true,
            });
            return Ok(());
        }
        match self.parent(folder.fs, &folder.path, &folder.handle)? {
            Some((parent, name)) => self.name(&parent, &name, change),
            None => {
                self.raced
                    .mark(folder.fs, folder.handle.clone(), Vec::new(), change);
                Ok(())
            }
        }
    }

    /// The directory in which `path` is, and its name there; `None` where it does not lead to `inode` any more.
    fn parent(&self, fs: usize, path: &[u8], inode: &Handle) -> io::Result<Option<(Folder, Vec<u8>)>> {
        let (above, name) = view::split(path);
        let fd = match self.views[fs].open_at(above, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let handle = handle::handle_of(&fd, c"")?;
        match handle::handle_of(&fd, &c_string(name)?) {
            Ok(found) if found == *inode => {}
            Ok(_) => return Ok(None),
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        Ok(self.folder(fs, &handle)?.map(|folder| (folder, name.to_vec())))
    }

    /// Everything below a directory. What comes, goes or moves meanwhile tells so itself.
    fn tree(&mut self, folder: &Folder, name: &[u8]) -> io::Result<()> {
        let Ok(top) = handle::handle_of(&folder.fd, &c_string(name)?) else {
            return Ok(());
        };
        let moved = Change {
            structural: false,
            tree: true,
        };
        let mut pending = vec![top];
        while let Some(handle) = pending.pop() {
            let Some(here) = self.folder(folder.fs, &handle)? else {
                continue;
            };
            if !self.walked.insert((folder.fs, handle)) {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME | OFlags::CLOEXEC;
            let fd = match rustix::fs::openat(&here.fd, c".", flags, rustix::fs::Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            for entry in rustix::fs::Dir::new(fd)? {
                let entry = match entry {
                    Ok(entry) => entry,
                    // Deleted while it was being read.
                    Err(Errno::NOENT) => break,
                    Err(error) => return Err(error.into()),
                };
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                self.add(&here, name.to_bytes(), moved)?;
                let may_hold_more = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
                if may_hold_more && let Ok(inode) = handle::handle_of(&here.fd, name) {
                    pending.push(inode);
                }
            }
        }
        Ok(())
    }

    /// As [`Planner::name`], for a tree that is being walked.
    fn add(&mut self, folder: &Folder, name: &[u8], change: Change) -> io::Result<()> {
        let trees = std::mem::replace(&mut self.trees, Trees::Leave);
        let result = self.name(folder, name, change);
        self.trees = trees;
        result
    }

    fn insert(&mut self, item: Item) {
        let outer = self.views[item.spot.0].outer(&item.spot.1);
        if rule(&outer) == Rule::Exempt || self.skip.contains(&item.spot) {
            return;
        }
        let key = (item.spot.0, item.folder.clone(), item.name.clone());
        let known = self.items.entry(key).or_insert_with(|| item.clone());
        known.change.merge(item.change);
    }

    /// Inodes to which no name led so far: through the names that they have now.
    fn inodes(&mut self, inodes: HashSet<(usize, Handle)>) -> io::Result<()> {
        let mut nameless: HashMap<usize, HashMap<u64, Handle>> = HashMap::new();
        for (fs, inode) in inodes {
            if self.reached.contains(&(fs, inode.clone())) {
                continue;
            }
            let Some(fd) = self.views[fs].open_handle(&inode)? else {
                continue;
            };
            let stat = stat_fd(&fd)?;
            if stat.stx_nlink == 0 {
                continue;
            }
            if let Some(folder) = self.folder(fs, &inode)? {
                self.directory(&folder, Change::default())?;
                continue;
            }
            match self.views[fs].some_path_of(&inode)? {
                Some(path) => self.path(fs, &path, &inode)?,
                None => {
                    nameless.entry(fs).or_default().insert(stat.stx_ino, inode);
                }
            }
        }
        // Rare, since most events carry a name that still is one: it walks the whole file system.
        for (fs, wanted) in nameless {
            let mut found = Vec::new();
            walk(&self.views[fs], b"", &mut |path, ino| {
                if let Some(inode) = wanted.get(&ino) {
                    found.push((path.to_vec(), inode.clone()));
                }
            })?;
            for (path, inode) in found {
                self.path(fs, &path, &inode)?;
            }
        }
        Ok(())
    }

    fn path(&mut self, fs: usize, path: &[u8], inode: &Handle) -> io::Result<()> {
        match self.parent(fs, path, inode)? {
            Some((folder, name)) => self.name(&folder, &name, Change::default()),
            None => {
                self.raced.inodes.insert((fs, inode.clone()));
                Ok(())
            }
        }
    }
}
