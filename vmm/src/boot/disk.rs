//! Finding kernel, initrd and command line on the guest's own root disk, as Debian's GRUB does by default.

use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error};

use super::Payload;
use super::filesystem::{self, FilesystemError, Root};
use super::grub;
use super::version;
use crate::block::Disk;

/// Largest kernel or initrd that is read.
const MAX_FILE: u64 = 512 << 20;

/// Why nothing to boot was found on a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskBootError {
    /// No file system.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// A file or directory of the guest.
    #[error("disk {disk}: reading {path} on its root file system: {source}")]
    Read {
        /// Name of the disk.
        disk: String,
        /// Path within the guest.
        path: String,
        /// Why it failed.
        source: Ext4Error,
    },
    /// No kernel.
    #[error(
        "disk {disk} has no kernel: no file /boot/vmlinuz-* on its root file system; install one in the image (on Debian: linux-image-cloud-amd64), or name kernel and initrd in boot.files"
    )]
    NoKernel {
        /// Name of the disk.
        disk: String,
    },
    /// Kernels without initrd.
    #[error(
        "disk {disk}: no kernel in /boot has its initrd (the newest is {kernel}, which wants {initrd}); run update-initramfs -c -k all in the image"
    )]
    NoInitrd {
        /// Name of the disk.
        disk: String,
        /// Newest kernel.
        kernel: String,
        /// The initrd that it lacks.
        initrd: String,
    },
    /// Absurd size.
    #[error(
        "disk {disk}: {path} has {size} bytes, more than any kernel or initrd; reinstall it in the image"
    )]
    TooLarge {
        /// Name of the disk.
        disk: String,
        /// Path within the guest.
        path: String,
        /// Its size.
        size: u64,
    },
}

/// Reads the newest kernel that has its initrd, and makes its command line.
pub fn find(disk: &Arc<Disk>) -> Result<Payload, DiskBootError> {
    let root = filesystem::find_root(disk)?;
    let reader = Reader {
        disk: disk.name(),
        fs: &root.fs,
    };
    let names = reader.list("/boot")?.unwrap_or_default();
    let (kernel, initrd) = choose(disk.name(), &names)?;
    let (kernel, initrd) = (format!("/boot/{kernel}"), format!("/boot/{initrd}"));
    Ok(Payload {
        kernel: reader.read(&kernel)?,
        initrd: Some(reader.read(&initrd)?),
        cmdline: cmdline(&reader, &root, &kernel)?,
        kernel_name: kernel,
        initrd_name: initrd,
    })
}

/// Names of the newest kernel with an initrd and of that initrd. A kernel whose package is unpacked but
/// not configured has none yet; GRUB would not know of it either.
fn choose(disk: &str, names: &[String]) -> Result<(String, String), DiskBootError> {
    let mut releases: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_prefix("vmlinuz-"))
        .filter(|release| !is_garbage(release))
        .collect();
    releases.sort_by(|a, b| version::compare(b, a));
    let Some(newest) = releases.first() else {
        return Err(DiskBootError::NoKernel {
            disk: disk.to_owned(),
        });
    };
    for release in &releases {
        let initrd = format!("initrd.img-{release}");
        if names.contains(&initrd) {
            return Ok((format!("vmlinuz-{release}"), initrd));
        }
    }
    Err(DiskBootError::NoInitrd {
        disk: disk.to_owned(),
        kernel: format!("/boot/vmlinuz-{newest}"),
        initrd: format!("/boot/initrd.img-{newest}"),
    })
}

/// Left-overs of packaging, which GRUB ignores as well (`grub_file_is_not_garbage`).
fn is_garbage(name: &str) -> bool {
    name.contains(".dpkg-")
        || [".bak", ".old", ".rpmsave", ".rpmnew", "~"]
            .iter()
            .any(|suffix| name.ends_with(suffix))
}

fn cmdline(reader: &Reader<'_>, root: &Root, kernel: &str) -> Result<String, DiskBootError> {
    let mut defaults = grub::Defaults::default();
    let mut files = vec!["/etc/default/grub".to_owned()];
    let mut fragments = reader.list("/etc/default/grub.d")?.unwrap_or_default();
    fragments.retain(|name| name.ends_with(".cfg"));
    fragments.sort_unstable();
    files.extend(fragments.iter().map(|name| format!("/etc/default/grub.d/{name}")));
    for file in files {
        if let Some(text) = reader.read_if_there(&file)? {
            defaults.read(&String::from_utf8_lossy(&text));
        }
    }
    let mut cmdline = format!("BOOT_IMAGE={kernel} root=UUID={} ro", root.fs.uuid());
    for name in ["GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT"] {
        let value = defaults.get(name).trim();
        if !value.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(value);
        }
    }
    Ok(cmdline)
}

struct Reader<'a> {
    disk: &'a str,
    fs: &'a Ext4,
}

impl Reader<'_> {
    fn failed(&self, path: &str) -> impl FnOnce(Ext4Error) -> DiskBootError {
        let (disk, path) = (self.disk.to_owned(), path.to_owned());
        move |source| DiskBootError::Read { disk, path, source }
    }

    fn list(&self, path: &str) -> Result<Option<Vec<String>>, DiskBootError> {
        let entries = match self.fs.read_dir(path) {
            Ok(entries) => entries,
            Err(Ext4Error::NotFound) => return Ok(None),
            Err(error) => return Err(self.failed(path)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(self.failed(path))?;
            // A name that is not UTF-8 is none that we look for.
            if let Ok(name) = entry.file_name().as_str() {
                names.push(name.to_owned());
            }
        }
        Ok(Some(names))
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, DiskBootError> {
        let size = self.fs.metadata(path).map_err(self.failed(path))?.len();
        if size > MAX_FILE {
            return Err(DiskBootError::TooLarge {
                disk: self.disk.to_owned(),
                path: path.to_owned(),
                size,
            });
        }
        self.fs.read(path).map_err(self.failed(path))
    }

    fn read_if_there(&self, path: &str) -> Result<Option<Vec<u8>>, DiskBootError> {
        match self.fs.exists(path) {
            Ok(false) => Ok(None),
            Ok(true) => self.read(path).map(Some),
            Err(error) => Err(self.failed(path)(error)),
        }
    }
}

#[cfg(test)]
#[path = "disk_test.rs"]
mod tests;
