//! Keeps the losing version of a conflict, so that nobody's work is lost.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

use crate::filter::{Spot, open_quietly};
use crate::view::{View, is_kind, stat_fd};

/// Keeps versions below `<state>/conflicts/<operation>/`, under their own paths.
#[derive(Debug)]
pub struct Keeper {
    folder: PathBuf,
}

impl Keeper {
    /// A keeper for an operation.
    pub fn new(state_dir: &Path, operation: &str) -> Self {
        // The operation comes from the host; it must be one component here.
        let name: String = operation
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '-' {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        Self {
            folder: state_dir.join("conflicts").join(name),
        }
    }

    /// Keeps a copy of what the clone has at `path`; returns where. Only files and symbolic links have
    /// anything to keep.
    pub fn keep(&self, view: &View, path: &[u8]) -> io::Result<Option<String>> {
        let outer = PathBuf::from(std::ffi::OsStr::from_bytes(&view.outer(path)));
        let fd = view.open_at(path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let stat = stat_fd(&fd)?;
        let kept = self.place(&outer)?;
        if is_kind(&stat, libc::S_IFLNK) {
            let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
            std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target.as_bytes()), &kept)?;
        } else if is_kind(&stat, libc::S_IFREG) {
            let mut from = fs::File::from(open_quietly(view, path)?);
            let mut to = fs::File::from(create(&kept)?);
            io::copy(&mut from, &mut to)?;
            let mode = rustix::fs::Mode::from_raw_mode(u32::from(stat.stx_mode) & 0o777);
            rustix::fs::fchmod(to.as_fd(), mode)?;
            let owner = rustix::process::Uid::from_raw(stat.stx_uid);
            let group = rustix::process::Gid::from_raw(stat.stx_gid);
            rustix::fs::fchown(to.as_fd(), Some(owner), Some(group))?;
        } else {
            return Ok(None);
        }
        Ok(Some(kept.to_string_lossy().into_owned()))
    }

    /// Opens a file for the guest's version, where the clone's stays; returns where with it.
    pub fn beside(&self, outer: &str) -> io::Result<(String, OwnedFd)> {
        let kept = self.place(Path::new(outer))?;
        let fd = create(&kept)?;
        Ok((kept.to_string_lossy().into_owned(), fd))
    }

    /// A free name for a version of `outer`.
    fn place(&self, outer: &Path) -> io::Result<PathBuf> {
        let mut place = self.folder.clone();
        place.extend(outer.components().filter(|c| matches!(c, Component::Normal(_))));
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut free = place.clone();
        let mut number = 1;
        while fs::symlink_metadata(&free).is_ok() {
            number += 1;
            let mut name = place.as_os_str().to_owned();
            name.push(format!(".{number}"));
            free = name.into();
        }
        Ok(free)
    }
}

fn create(path: &Path) -> io::Result<OwnedFd> {
    let file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    Ok(file.into())
}

/// Whether a symbolic link to `target` is at `spot`.
pub fn links_to(view: &View, spot: &Spot, target: &[u8]) -> bool {
    let fd = view.open_at(&spot.1, OFlags::PATH | OFlags::NOFOLLOW);
    let link = fd.and_then(|fd| rustix::fs::readlinkat(&fd, c"", Vec::new()).map_err(Into::into));
    link.is_ok_and(|l| l.as_bytes() == target)
}
