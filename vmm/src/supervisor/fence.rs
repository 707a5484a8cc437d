//! Who owns the guest: `owner.json` and `owner.lock` beside the root disk, as the supervisor uses them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use understudy_vmm_control::owner::{Owner, OwnerError, lock_path};

/// Why this incarnation may not own the guest.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Reading or replacing `owner.json`.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The lock file.
    #[error("{action} {path}: {source}")]
    Lock {
        /// What was tried.
        action: &'static str,
        /// The lock file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process has the lock.
    #[error(
        "the disk is in use: another VMM process holds {path}; stop that guest first, or wait until its commit has released it"
    )]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
    /// There is no record.
    #[error(
        "{state_dir} has no owner.json: the node agent writes it before a guest's first start, naming the incarnation that may own the disk"
    )]
    NoOwner {
        /// State directory of the root disk.
        state_dir: PathBuf,
    },
    /// The record names another incarnation.
    #[error(
        "owner.json in {state_dir} names incarnation {named} (epoch {epoch}) and not {wanted}: this incarnation does not own the guest and opens nothing"
    )]
    NotOwner {
        /// State directory of the root disk.
        state_dir: PathBuf,
        /// Incarnation named.
        named: u64,
        /// Epoch of the record.
        epoch: u64,
        /// Incarnation of this process.
        wanted: u64,
    },
}

/// The lock held: released when dropped, and by the kernel when the process dies.
pub struct Ownership {
    _lock: File,
}

impl Ownership {
    /// Takes `owner.lock` and then checks that `owner.json` names `incarnation`. The order matters: who
    /// holds the lock reads a record that nobody else changes.
    pub fn take(state_dir: &Path, incarnation: u64) -> Result<(Ownership, Owner), FenceError> {
        let path = lock_path(state_dir);
        let lock = |action| {
            let path = path.clone();
            move |source| FenceError::Lock { action, path, source }
        };
        if !state_dir.exists() {
            return Err(FenceError::NoOwner {
                state_dir: state_dir.to_owned(),
            });
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(lock("opening"))?;
        // SAFETY: flock takes a descriptor, which `file` keeps open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => FenceError::InUse { path },
                _ => lock("locking")(error),
            });
        }
        let owner = named(state_dir, incarnation)?;
        Ok((Ownership { _lock: file }, owner))
    }
}

/// The record, when it names `incarnation`.
pub fn named(state_dir: &Path, incarnation: u64) -> Result<Owner, FenceError> {
    let state_dir = state_dir.to_owned();
    let Some(owner) = Owner::read(&state_dir)? else {
        return Err(FenceError::NoOwner { state_dir });
    };
    if owner.incarnation != incarnation {
        return Err(FenceError::NotOwner {
            state_dir,
            named: owner.incarnation,
            epoch: owner.epoch,
            wanted: incarnation,
        });
    }
    Ok(owner)
}

#[cfg(test)]
mod tests {
    use understudy_vmm_control::owner::OWNER_VERSION;

    use super::*;

    fn owner(incarnation: u64) -> Owner {
        Owner {
            version: OWNER_VERSION,
            epoch: 4,
            incarnation,
            layer: None,
        }
    }

    #[test]
    fn only_the_named_incarnation_takes_the_lock_and_only_one_process_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Ownership::take(dir.path(), 2),
            Err(FenceError::NoOwner { .. })
        ));
        owner(2).replace(dir.path()).unwrap();
        assert!(matches!(
            Ownership::take(dir.path(), 3),
            Err(FenceError::NotOwner {
                named: 2,
                wanted: 3,
                ..
            })
        ));
        let (held, record) = Ownership::take(dir.path(), 2).unwrap();
        assert_eq!(record.epoch, 4);
        assert!(matches!(
            Ownership::take(dir.path(), 2),
            Err(FenceError::InUse { .. })
        ));
        drop(held);
        Ownership::take(dir.path(), 2).unwrap();
    }
}
