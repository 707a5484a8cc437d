//! A canonical listing of a tree: two trees are equal when their listings are (DESIGN §5, "Merge": names,
//! types, contents, modes, owners, extended attributes with ACLs, modification times, links and holes; not
//! change times, birth times or inode numbers).

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;

use crate::content::Segments;
use crate::filter::{open_quietly, walk};
use crate::meta::{self, Named};
use crate::rules::{Rule, rule};
use crate::view::{View, is_kind, stat_fd};

/// The listing of the file system that is mounted at `mount_point`: a line a path, sorted. `as_root` names
/// paths as if it were the root file system, so that rules apply that know absolute paths; exempt ones and
/// active journals are left out.
pub fn listing(mount_point: &Path, as_root: bool) -> io::Result<Vec<String>> {
    let view = View::open(mount_point)?;
    let mut paths = vec![Vec::new()];
    walk(&view, b"", &mut |path, _| paths.push(path.to_vec()))?;
    paths.sort();
    // Names of the same inode, told by the first of them.
    let mut first: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut lines = Vec::new();
    for path in paths {
        let named = if as_root {
            [b"/", &path[..]].concat()
        } else {
            view.outer(&path)
        };
        if matches!(rule(&named), Rule::Exempt | Rule::Journal) {
            continue;
        }
        if let Some(line) = line(&view, &path, &mut first)? {
            lines.push(line);
        }
    }
    Ok(lines)
}

/// One digest of a whole listing.
pub fn digest(lines: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    for line in lines {
        hasher.update(line.as_bytes());
        hasher.update(b"\n");
    }
    hasher.finalize().to_hex().to_string()
}

fn line(view: &View, path: &[u8], first: &mut HashMap<u64, Vec<u8>>) -> io::Result<Option<String>> {
    let fd = match view.open_at(path, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(fd) => fd,
        Err(error) if crate::view::is_absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let stat = stat_fd(&fd)?;
    let (folder, name) = view.parent(path)?;
    let mut line = format!(
        "{} mode={:o} owner={}:{} mtime={}.{:09}",
        escape(path),
        stat.stx_mode,
        stat.stx_uid,
        stat.stx_gid,
        stat.stx_mtime.tv_sec,
        stat.stx_mtime.tv_nsec,
    );
    for (attribute, value) in meta::xattrs(Named {
        folder: folder.as_fd(),
        name,
    })? {
        // Writing to a string cannot fail.
        let _ = write!(line, " {}={}", escape(&attribute), escape(&value));
    }
    if stat.stx_nlink > 1 && !is_kind(&stat, libc::S_IFDIR) {
        let known = first.entry(stat.stx_ino).or_insert_with(|| path.to_vec());
        let _ = write!(line, " links={} of={}", stat.stx_nlink, escape(known));
    }
    if is_kind(&stat, libc::S_IFREG) {
        let file = open_quietly(view, path)?;
        let _ = write!(line, " size={} {}", stat.stx_size, content(&file, stat.stx_size)?);
    } else if is_kind(&stat, libc::S_IFLNK) {
        let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
        let _ = write!(line, " -> {}", escape(target.as_bytes()));
    } else if is_kind(&stat, libc::S_IFBLK) || is_kind(&stat, libc::S_IFCHR) {
        let _ = write!(line, " device={}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
    }
    Ok(Some(line))
}

/// Digest of content and holes.
fn content(file: &OwnedFd, size: u64) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; 64 * 1024];
    let mut holes = String::new();
    let mut segments = Segments::new(file, size);
    while let Some(segment) = segments.advance()? {
        if !segment.data {
            let _ = write!(holes, " hole={}-{}", segment.start, segment.end);
            continue;
        }
        let mut at = segment.start;
        while at < segment.end {
            let length = (segment.end - at).min(buffer.len() as u64) as usize;
            match rustix::io::pread(file, &mut buffer[..length], at)? {
                0 => break,
                read => {
                    hasher.update(&buffer[..read]);
                    at += read as u64;
                }
            }
        }
    }
    Ok(format!("blake3={}{holes}", &hasher.finalize().to_hex()[..32]))
}

/// Printable ASCII as it is, all else as `\xNN`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &b in bytes {
        if b.is_ascii_graphic() && b != b'\\' {
            text.push(b.into());
        } else {
            let _ = write!(text, "\\x{b:02x}");
        }
    }
    if text.is_empty() { ".".to_owned() } else { text }
}
