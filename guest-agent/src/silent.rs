//! Changes that raise no events: stores into shared mappings, asynchronous writes through descriptors, loop
//! devices over files, and the upper directories of overlay mounts (DESIGN §5, "The filter").
//!
//! They cannot hide from the inode's own stamps: a store into a clean shared page faults, and the fault
//! renews the times. So a stamp is taken, *then* everything is written out (which cleans the pages), *then*
//! contents are read: whatever is stored later shows in the stamp.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Statx};

use crate::filter::{Spot, walk};
use crate::marks::Change;
use crate::sys::handle;
use crate::view::{View, is_kind, stat_fd};
use crate::{info, mounts};

/// The clock that stamps inodes may stand still this long (a jiffy at 100 Hz), in nanoseconds; a stamp so
/// young may hide a later change.
const CLOCK_STEP_NS: i128 = 20_000_000;

/// What changes with every change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    ino: u64,
    ctime: (i64, u32),
    mtime: (i64, u32),
    size: u64,
    racy: bool,
}

impl Stamp {
    fn of(stat: &Statx) -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        let age = (i128::from(now.tv_sec) - i128::from(stat.stx_ctime.tv_sec)) * 1_000_000_000
            + i128::from(now.tv_nsec)
            - i128::from(stat.stx_ctime.tv_nsec);
        Self {
            ino: stat.stx_ino,
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            size: stat.stx_size,
            racy: (0..CLOCK_STEP_NS).contains(&age),
        }
    }

    /// Whether a file that had this stamp surely has not changed since.
    fn still(&self, now: &Self) -> bool {
        !self.racy && self.equals(now)
    }

    fn equals(&self, now: &Self) -> bool {
        (self.ino, self.ctime, self.mtime, self.size) == (now.ino, now.ctime, now.mtime, now.size)
    }
}

/// A file that something writes to without having to say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Where the file is.
    pub spot: Spot,
    /// Its inode number.
    pub ino: u64,
    /// Process that holds it; 0 where it is the kernel.
    pub pid: i32,
}

/// Changed names by spot.
pub type Changes = std::collections::BTreeMap<Spot, Change>;

/// Watches for silent changes between one look and the next.
#[derive(Debug, Default)]
pub struct Silent {
    known: HashMap<Spot, Stamp>,
    upper: HashMap<Spot, Stamp>,
}

impl Silent {
    /// Notes the state as of now. The caller writes everything out afterwards.
    pub fn begin(views: &[Arc<View>]) -> io::Result<Self> {
        let mut silent = Self::default();
        silent.look(views)?;
        Ok(silent)
    }

    /// What may have changed since the last look, and what has the stamp it had then, but one too young to be
    /// trusted: of that the content decides. The caller writes everything out afterwards, before it
    /// reads contents.
    pub fn look(&mut self, views: &[Arc<View>]) -> io::Result<(Changes, Vec<Spot>)> {
        let spots = writers(views).into_iter().map(|writer| writer.spot).collect();
        self.look_at(views, spots)
    }

    /// The same without looking for those that write: user land is frozen, and who wrote at the last look is all
    /// there can be.
    pub fn look_again(&mut self, views: &[Arc<View>]) -> io::Result<(Changes, Vec<Spot>)> {
        let spots = self.known.keys().cloned().collect();
        self.look_at(views, spots)
    }

    fn look_at(&mut self, views: &[Arc<View>], spots: Vec<Spot>) -> io::Result<(Changes, Vec<Spot>)> {
        let mut changes = Changes::new();
        let mut doubtful = Vec::new();
        let mut known = HashMap::new();
        for spot in spots {
            let Some(stat) = views[spot.0].stat(&spot.1)? else {
                continue;
            };
            let stamp = Stamp::of(&stat);
            match self.known.get(&spot) {
                Some(before) if before.still(&stamp) => {}
                Some(before) if before.equals(&stamp) => doubtful.push(spot.clone()),
                _ => changes.entry(spot.clone()).or_default().merge(Change::default()),
            }
            known.insert(spot, stamp);
        }
        // One that is no longer open has told so when it was closed.
        self.known = known;
        self.look_at_upper_directories(views, &mut changes)?;
        Ok((changes, doubtful))
    }

    fn look_at_upper_directories(&mut self, views: &[Arc<View>], changes: &mut Changes) -> io::Result<()> {
        let mut upper = HashMap::new();
        for mount in mounts::mounts()?.iter().filter(|m| m.kind == "overlay") {
            let Some(top) = mount.option("upperdir").and_then(|p| locate(views, &p)) else {
                continue;
            };
            let (fs, path) = top;
            let mut found = vec![path.clone()];
            walk(&views[fs], &path, &mut |path, _| found.push(path.to_vec()))?;
            for path in found {
                if let Some(stat) = views[fs].stat(&path)? {
                    upper.insert((fs, path), Stamp::of(&stat));
                }
            }
        }
        for (spot, stamp) in &upper {
            match self.upper.get(spot) {
                Some(before) if before.still(stamp) => {}
                before => {
                    let structural = before.is_none_or(|b| b.ino != stamp.ino);
                    let change = Change {
                        structural,
                        tree: false,
                    };
                    changes.entry(spot.clone()).or_default().merge(change);
                }
            }
        }
        for spot in self.upper.keys().filter(|s| !upper.contains_key(*s)) {
            changes.entry(spot.clone()).or_default().merge(Change {
                structural: true,
                tree: false,
            });
        }
        self.upper = upper;
        Ok(())
    }
}

/// The file system and path within it of a path of the guest: that of the longest mount point before it.
pub fn locate(views: &[Arc<View>], path: &Path) -> Option<Spot> {
    let best = |(_, v): &(usize, &Arc<View>)| v.mount_point.as_os_str().len();
    let inside = |(_, v): &(usize, &Arc<View>)| path.starts_with(&v.mount_point);
    let (fs, view) = views.iter().enumerate().filter(inside).max_by_key(best)?;
    let inner = path.strip_prefix(&view.mount_point).ok()?;
    Some((fs, inner.as_os_str().as_bytes().to_vec()))
}

/// Files on these file systems that are open for writing, mapped shared and writable, or behind a loop device.
pub fn writers(views: &[Arc<View>]) -> Vec<Writer> {
    let mut found = Vec::new();
    let own = std::process::id() as i32;
    // Kernel threads have no program, and no files: most processes are told apart from ours by that alone.
    let has_program = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    for pid in processes().filter(|pid| *pid != own && has_program(pid)) {
        // Processes come and go while we look; what is gone has closed its files, which is an event.
        descriptors(views, pid, &mut found);
        mappings(views, pid, &mut found);
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if let Ok(path) = fs::read(entry.path().join("loop/backing_file")) {
            let path = path.strip_suffix(b"\n").unwrap_or(&path);
            add_path(views, Path::new(OsStr::from_bytes(path)), 0, &mut found);
        }
    }
    found.sort_by(|a, b| a.spot.cmp(&b.spot));
    found.dedup();
    found
}

/// All process ids.
pub fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn descriptors(views: &[Arc<View>], pid: i32, found: &mut Vec<Writer>) {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let Ok(open) = open_for_writing(&folder) else {
        return;
    };
    for name in open {
        let link = folder.join(name);
        let Ok(target) = fs::read_link(&link) else {
            continue;
        };
        let text = target.as_os_str().as_bytes();
        if text.starts_with(b"/") && !text.starts_with(b"/dev/") && !text.starts_with(b"/proc/") {
            add_open(views, &link, &target, pid, found);
        }
    }
}

/// Which descriptors in a `/proc/PID/fd` can write. The mode of each link tells so (`proc_pid_fd(5)`), at a
/// fraction of what reading `fdinfo` costs: programs are frozen while we look.
fn open_for_writing(folder: &Path) -> io::Result<Vec<OsString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(folder, flags, Mode::empty())?;
    let mut open = Vec::new();
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        let writes = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
            stat.st_mode & libc::S_IFMT == libc::S_IFLNK && stat.st_mode & libc::S_IWUSR != 0
        });
        if writes {
            open.push(OsStr::from_bytes(name.to_bytes()).to_owned());
        }
    }
    Ok(open)
}

fn mappings(views: &[Arc<View>], pid: i32, found: &mut Vec<Writer>) {
    let Ok(maps) = fs::read(format!("/proc/{pid}/maps")) else {
        return;
    };
    for line in maps.split(|&b| b == b'\n') {
        // start-end perms offset dev inode path
        let mut fields = line.splitn(2, |&b| b == b' ');
        let (Some(range), Some(rest)) = (fields.next(), fields.next()) else {
            continue;
        };
        if rest.len() < 4 || rest[1] != b'w' || rest[3] != b's' {
            continue;
        }
        let Some(at) = rest.iter().position(|&b| b == b'/') else {
            continue;
        };
        let path = PathBuf::from(OsString::from_vec(rest[at..].to_vec()));
        if path.starts_with("/dev") || path.starts_with("/proc") {
            continue;
        }
        let file = format!("/proc/{pid}/map_files/{}", String::from_utf8_lossy(range));
        add_open(views, Path::new(&file), &path, pid, found);
    }
}

/// Adds an open file, seen through a magic link below `/proc`; `told` is what the link reads as.
fn add_open(views: &[Arc<View>], link: &Path, told: &Path, pid: i32, found: &mut Vec<Writer>) {
    let Ok(fd) = rustix::fs::open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else {
        return;
    };
    let Ok(stat) = stat_fd(&fd) else { return };
    let dev = (stat.stx_dev_major, stat.stx_dev_minor);
    let Some(fs) = views.iter().position(|v| v.dev == dev) else {
        return;
    };
    if !is_kind(&stat, libc::S_IFREG) || stat.stx_nlink == 0 {
        return;
    }
    // The link reads as the process sees it, perhaps in a mount namespace of its own; believe it only where
    // the same inode is found there.
    let seen = locate(views, told).filter(|(at, path)| {
        *at == fs
            && views[fs]
                .stat(path)
                .is_ok_and(|s| s.is_some_and(|s| s.stx_ino == stat.stx_ino))
    });
    let spot = seen.or_else(|| {
        let handle = handle::handle_of(&fd, c"").ok()?;
        Some((fs, views[fs].some_path_of(&handle).ok()??))
    });
    match spot {
        Some(spot) => found.push(Writer {
            spot,
            ino: stat.stx_ino,
            pid,
        }),
        None => info!("no path is known for {} of process {pid}", told.display()),
    }
}

fn add_path(views: &[Arc<View>], path: &Path, pid: i32, found: &mut Vec<Writer>) {
    if let Some(spot) = locate(views, path)
        && let Ok(Some(stat)) = views[spot.0].stat(&spot.1)
        && is_kind(&stat, libc::S_IFREG)
    {
        found.push(Writer {
            spot,
            ino: stat.stx_ino,
            pid,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};

    use super::*;

    #[test]
    fn only_descriptors_that_write_count() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |flags: OFlags| rustix::fs::open(file.path(), flags, Mode::empty()).unwrap();
        let (read, write) = (open(OFlags::RDONLY), open(OFlags::WRONLY));
        let (both, path) = (open(OFlags::RDWR), open(OFlags::PATH));
        let found = open_for_writing(Path::new("/proc/self/fd")).unwrap();
        let is_found = |fd: &OwnedFd| found.contains(&OsString::from(fd.as_raw_fd().to_string()));
        assert!(is_found(&write) && is_found(&both));
        assert!(!is_found(&read));
        assert!(!is_found(&path), "O_PATH descriptors write nothing");
    }
}
