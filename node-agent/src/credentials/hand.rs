//! Handing a key to a VMM: by a file that lives in memory only, readable by root, for as long as it takes.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FsWord, statfs};
use uuid::Uuid;

use super::{CredentialError, Secret};

/// `f_type` of tmpfs and ramfs (statfs(2)).
const MEMORY_ONLY: [FsWord; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether what is written beneath `directory` stays in memory: on a tmpfs.
///
/// A tmpfs may be swapped out; a host whose swap is not encrypted gives up the keys of sessions together
/// with the memory of everything else.
pub fn check_memory_only(directory: &Path) -> Result<(), CredentialError> {
    match statfs(directory) {
        Ok(stat) if MEMORY_ONLY.contains(&stat.f_type) => Ok(()),
        _ => Err(CredentialError::NotInMemory {
            directory: directory.to_owned(),
        }),
    }
}

/// A key in a file of mode 0600 on a tmpfs; removed when this is dropped.
#[derive(Debug)]
pub struct HandedKey {
    path: PathBuf,
}

impl HandedKey {
    /// Writes the key of a checkpoint beneath the run directory. One that a former agent left is replaced.
    pub fn new(run_dir: &Path, checkpoint: Uuid, key: &Secret) -> Result<HandedKey, CredentialError> {
        check_memory_only(run_dir)?;
        let directory = run_dir.join("keys");
        let path = directory.join(checkpoint.to_string());
        let write = || -> io::Result<()> {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)?;
            let _ = fs::remove_file(&path);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(key.bytes())
        };
        let handed = HandedKey { path: path.clone() };
        write().map_err(|source| CredentialError::Hand { path, source })?;
        Ok(handed)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what agents that were killed have left.
    pub fn sweep(run_dir: &Path) {
        for entry in fs::read_dir(run_dir.join("keys")).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

impl Drop for HandedKey {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(path = %self.path.display(), %error, "the file with a session's key could not be removed; remove it by hand");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_handed_key_is_for_root_alone_and_goes_with_its_holder() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let key = Secret::generate().unwrap();
        let handed = HandedKey::new(dir.path(), Uuid::new_v4(), &key).unwrap();
        let path = handed.path().to_owned();
        assert_eq!(fs::read(&path).unwrap(), key.bytes());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777,
            0o700
        );
        drop(handed);
        assert!(!path.exists());
    }

    #[test]
    fn a_key_is_not_handed_over_a_disk() {
        // The workspace itself lies on a disk, wherever temporary files are.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if check_memory_only(dir.path()).is_ok() {
            eprintln!("skipped: the sources lie on a tmpfs");
            return;
        }
        let key = Secret::generate().unwrap();
        let error = HandedKey::new(dir.path(), Uuid::new_v4(), &key).unwrap_err();
        assert!(error.to_string().contains("runDir"), "{error}");
        assert!(!dir.path().join("keys").exists());
    }
}
