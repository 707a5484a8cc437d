//! What can be wrong with a disk.

use std::io;
use std::path::PathBuf;

/// Why a disk could not be opened or changed. Nothing on disk is harmed by any of these.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file operation failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process holds the file.
    #[error(
        "{path} is in use by another virtual machine; stop that one first (two writers would destroy the file system on it)"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The image has no size that a disk can have.
    #[error(
        "{path} has a size of {size} bytes, which is not a positive multiple of 512; a raw disk image is needed (a qcow2 image: `qemu-img convert -O raw`; a truncated one: `truncate -s`)"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The chain does not belong together: going on would boot stale data.
    #[error("{path} does not fit the disk's state ({reason}); {advice}")]
    StaleRoot {
        /// The file.
        path: PathBuf,
        /// What does not agree.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// A file's content is not what was written.
    #[error("{path} is damaged ({reason}); restore it from a backup, it holds part of the guest's disk")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file was written by a newer version.
    #[error("{path} has format version {found}, this VMM knows {known}; use a newer VMM")]
    Version {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Version known.
        known: u32,
    },
    /// The request does not fit what the disk is doing.
    #[error("disk {disk}: {reason}")]
    Conflict {
        /// Name of the disk.
        disk: String,
        /// Why not, and what would do.
        reason: String,
    },
}

impl DiskError {
    /// Whether the request was refused because of the disk's state (HTTP 409) rather than failed.
    pub fn is_conflict(&self) -> bool {
        matches!(self, DiskError::Conflict { .. } | DiskError::InUse { .. })
    }

    /// Wraps an I/O error with its context.
    pub(crate) fn io(action: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> DiskError {
        move |source| DiskError::Io { action, path, source }
    }

    /// As [`DiskError::io`] for taking a lock, where `WouldBlock` means that somebody else has it.
    pub(crate) fn lock(path: PathBuf) -> impl FnOnce(io::Error) -> DiskError {
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock => DiskError::InUse { path },
            _ => DiskError::Io {
                action: "locking",
                path,
                source,
            },
        }
    }
}
