//! Mounted file systems (`proc(5)`, mountinfo).

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device number of the file system, `major:minor`.
    pub device: String,
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Type.
    pub kind: String,
    /// Source, such as `/dev/vda1`.
    pub source: String,
    /// Whether mount or file system are read-only.
    pub read_only: bool,
    /// Options of the file system.
    pub options: String,
}

impl Mount {
    /// The value of a `key=value` option of the file system.
    pub fn option(&self, key: &str) -> Option<PathBuf> {
        self.options
            .split(',')
            .find_map(|o| o.strip_prefix(key)?.strip_prefix('='))
            .map(|v| PathBuf::from(unescape(v.as_bytes())))
    }
}

/// All mounts, in the order of mounting.
pub fn mounts() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// Writable file systems on local block devices, one mount of each: the one nearest to the file system's own
/// root. Ordered by mount point, so `/` comes first.
pub fn local_writable() -> io::Result<Vec<Mount>> {
    let disk_kinds = disk_kinds()?;
    let mut best: BTreeMap<String, Mount> = BTreeMap::new();
    for mount in mounts()? {
        if mount.read_only || !disk_kinds.contains(&mount.kind) {
            continue;
        }
        let rank = |m: &Mount| (m.root.as_os_str().len(), m.mount_point.as_os_str().len());
        // Subvolumes of btrfs are one device each in mountinfo, yet one file system: the source tells.
        let key = if mount.kind == "btrfs" {
            mount.source.clone()
        } else {
            mount.device.clone()
        };
        match best.get(&key) {
            Some(known) if rank(known) <= rank(&mount) => {}
            _ => {
                best.insert(key, mount);
            }
        }
    }
    let mut found: Vec<Mount> = best.into_values().collect();
    found.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
    Ok(found)
}

/// File system types that live on a block device.
fn disk_kinds() -> io::Result<HashSet<String>> {
    let text = std::fs::read_to_string("/proc/filesystems")?;
    Ok(text
        .lines()
        .filter(|l| !l.starts_with("nodev"))
        .map(|l| l.trim().to_owned())
        .collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let device = fields.nth(2)?;
    let root = fields.next()?;
    let mount_point = fields.next()?;
    let mount_options = fields.next()?;
    // Optional fields end with a dash.
    fields.find(|f| *f == b"-")?;
    let kind = fields.next()?;
    let source = fields.next()?;
    let options = String::from_utf8_lossy(fields.next().unwrap_or_default()).into_owned();
    let ro = |options: &[u8]| options.split(|&b| b == b',').any(|o| o == b"ro");
    Some(Mount {
        device: String::from_utf8_lossy(device).into_owned(),
        root: unescape(root).into(),
        mount_point: unescape(mount_point).into(),
        kind: String::from_utf8_lossy(kind).into_owned(),
        source: unescape(source).to_string_lossy().into_owned(),
        read_only: ro(mount_options) || ro(options.as_bytes()),
        options,
    })
}

/// Space, tab, newline and backslash are written as `\ooo`.
fn unescape(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = |b: &u8| (b'0'..=b'7').contains(b);
        if first == b'\\' && after.len() >= 3 && after[..3].iter().all(octal) {
            let value = after[..3].iter().fold(0u32, |n, b| n * 8 + u32::from(b - b'0'));
            bytes.push(value as u8);
            rest = &after[3..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    OsString::from_vec(bytes)
}

/// Joins a mount point and an absolute path within the mount.
pub fn join(mount_point: &Path, inner: &Path) -> PathBuf {
    let relative = inner.as_os_str().as_bytes();
    let relative = relative.strip_prefix(b"/").unwrap_or(relative);
    if relative.is_empty() {
        mount_point.to_owned()
    } else {
        mount_point.join(std::ffi::OsStr::from_bytes(relative))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_optional_fields_is_read() {
        let line = br"36 35 98:0 /mnt1 /mnt/with\040space rw,noatime master:1 shared:2 - ext4 /dev/root rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!(mount.mount_point, Path::new("/mnt/with space"));
        assert_eq!(mount.root, Path::new("/mnt1"));
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_str()),
            ("ext4", "/dev/root")
        );
        assert!(!mount.read_only);
        assert_eq!(mount.option("errors"), Some("continue".into()));
    }

    #[test]
    fn this_machine_has_a_root_mount_and_no_pseudo_file_system_counts_as_local() {
        assert!(mounts().unwrap().iter().any(|m| m.mount_point == Path::new("/")));
        assert!(
            local_writable()
                .unwrap()
                .iter()
                .all(|m| m.kind != "proc" && m.kind != "tmpfs")
        );
    }
}
