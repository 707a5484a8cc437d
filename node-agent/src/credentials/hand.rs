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
pub(super) fn check_memory_only(directory: &Path) -> Result<(), CredentialError> {
    match statfs(directory) {
        Ok(stat) if MEMORY_ONLY.contains(&stat.f_type) => Ok(()),
        _ => Err(CredentialError::NotInMemory {
            directory: directory.to_owned(),
        }),
    }
}

/// Writes a secret for root alone, in a directory that is made where it is missing. Under another name first: whoever
/// looks finds the whole secret or none.
pub(super) fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}

/// Keys in files of mode 0600 beneath the run directory, which is on a tmpfs: one for each checkpoint, from
/// when its key is made or obtained until the VMM has read it. They outlive the agent, so that one that is
/// started anew goes on where its predecessor was killed; and they end with the boot.
#[derive(Clone, Debug)]
pub struct HandedKeys {
    run_dir: PathBuf,
}

impl HandedKeys {
    /// The keys beneath a run directory.
    pub fn new(run_dir: &Path) -> HandedKeys {
        HandedKeys {
            run_dir: run_dir.to_owned(),
        }
    }

    /// Whether a key can be handed over without reaching a disk.
    pub fn check(&self) -> Result<(), CredentialError> {
        check_memory_only(&self.run_dir)
    }

    /// Where the key of a checkpoint is.
    pub fn path(&self, checkpoint: Uuid) -> PathBuf {
        self.directory().join(checkpoint.to_string())
    }

    /// Whether the key of a checkpoint is there.
    pub fn has(&self, checkpoint: Uuid) -> bool {
        self.path(checkpoint).exists()
    }

    /// Puts the key of a checkpoint there, in place of one before.
    pub fn put(&self, checkpoint: Uuid, key: &Secret) -> Result<PathBuf, CredentialError> {
        self.check()?;
        let path = self.path(checkpoint);
        match write_secret(&path, key.bytes()) {
            Ok(()) => Ok(path),
            Err(source) => Err(CredentialError::Hand { path, source }),
        }
    }

    /// Takes the key of a checkpoint away; fine where it is gone.
    pub fn take_away(&self, checkpoint: Uuid) {
        let path = self.path(checkpoint);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(path = %path.display(), %error, "the file with a session's key could not be removed; remove it by hand");
        }
    }

    /// Takes away all but those of the checkpoints that `wanted` names.
    pub fn sweep(&self, wanted: impl Fn(Uuid) -> bool) {
        for entry in fs::read_dir(self.directory()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let checkpoint = name.to_str().and_then(|name| name.parse().ok());
            if !checkpoint.is_some_and(&wanted) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn directory(&self) -> PathBuf {
        self.run_dir.join("keys")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_handed_key_is_for_root_alone_and_is_taken_away() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let keys = HandedKeys::new(dir.path());
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        let key = Secret::generate().unwrap();
        keys.put(one, &Secret::generate().unwrap()).unwrap();
        let path = keys.put(one, &key).unwrap();
        assert_eq!(fs::read(&path).unwrap(), key.bytes());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let directory = fs::metadata(path.parent().unwrap()).unwrap();
        assert_eq!(directory.mode() & 0o777, 0o700);
        keys.put(other, &key).unwrap();
        keys.sweep(|checkpoint| checkpoint == one);
        assert!(keys.has(one) && !keys.has(other));
        keys.take_away(one);
        keys.take_away(one);
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
        let error = HandedKeys::new(dir.path()).put(Uuid::new_v4(), &key).unwrap_err();
        assert!(error.to_string().contains("runDir"), "{error}");
        assert!(!dir.path().join("keys").exists());
    }
}
