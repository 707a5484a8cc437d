//! The fence: `owner.json` and `owner.lock` beside the root disk.
//!
//! `owner.json` names the one incarnation that may own the guest's network and writable data, and the
//! layer that is the guest's current disk. It is replaced by write, fsync, rename, fsync of the
//! directory. The guest's own VMM writes it on split and on commit; the agent writes it only for a guest
//! that has no VMM (first start, cold boot). A VMM opens its gates only when it is named there and holds
//! an exclusive `flock` on `owner.lock`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Version of the file's format.
pub const OWNER_VERSION: u32 = 1;

/// Content of `owner.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Owner {
    /// [`OWNER_VERSION`].
    pub version: u32,
    /// Grows by one at every change of owner: the commit point of a cutover.
    pub epoch: u64,
    /// The incarnation that owns the guest.
    pub incarnation: u64,
    /// Top layer of the root disk; `None`: the source file itself.
    pub layer: Option<Uuid>,
}

/// State directory of a disk: `<source>.understudy/`, beside the file so that it travels with it.
pub fn state_dir(source: &Path) -> PathBuf {
    let mut name = source.as_os_str().to_owned();
    name.push(".understudy");
    PathBuf::from(name)
}

/// Path of `owner.json` in a state directory.
pub fn owner_path(state_dir: &Path) -> PathBuf {
    state_dir.join("owner.json")
}

/// Path of `owner.lock` in a state directory.
pub fn lock_path(state_dir: &Path) -> PathBuf {
    state_dir.join("owner.lock")
}

/// Data file of a layer: sparse, the guest's bytes at identical offsets.
pub fn layer_path(state_dir: &Path, layer: Uuid) -> PathBuf {
    state_dir.join(format!("{layer}.layer"))
}

/// Map file of a layer: header and checksummed block states.
pub fn map_path(state_dir: &Path, layer: Uuid) -> PathBuf {
    state_dir.join(format!("{layer}.map"))
}

/// Why the fence could not be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
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
    /// The file is not what this version writes.
    #[error(
        "{path} is not a valid owner record ({reason}); it names the guest's current disk layer, so restore it from a backup of the state directory rather than deleting it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Owner {
    /// Reads `owner.json`; `Ok(None)` when the disk has never been owned.
    pub fn read(state_dir: &Path) -> Result<Option<Owner>, OwnerError> {
        let path = owner_path(state_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(OwnerError::Io {
                    action: "reading",
                    path,
                    source,
                });
            }
        };
        Self::parse(&path, &text).map(Some)
    }

    /// Reads the content of the file at `path`.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Owner, OwnerError> {
        let damaged = |reason: String| OwnerError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let owner: Owner = serde_json::from_slice(text).map_err(|e| damaged(e.to_string()))?;
        if owner.version != OWNER_VERSION {
            return Err(damaged(format!(
                "version {} where {OWNER_VERSION} is known",
                owner.version
            )));
        }
        Ok(owner)
    }

    /// The content of the file.
    pub fn encode(&self) -> Vec<u8> {
        // Three numbers and a UUID, with string keys: there is nothing that JSON could not say.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Replaces `owner.json` durably: when this returns, the new content survives a power cut; when it
    /// fails or is cut short, the old content is whole.
    pub fn replace(&self, state_dir: &Path) -> Result<(), OwnerError> {
        let path = owner_path(state_dir);
        let io = |action| {
            let path = path.clone();
            move |source| OwnerError::Io { action, path, source }
        };
        let temporary = state_dir.join("owner.json.new");
        let text = self.encode();
        let mut file = File::create(&temporary).map_err(io("creating a replacement of"))?;
        file.write_all(&text).map_err(io("writing a replacement of"))?;
        file.sync_all().map_err(io("syncing a replacement of"))?;
        fs::rename(&temporary, &path).map_err(io("replacing"))?;
        File::open(state_dir)
            .and_then(|dir| dir.sync_all())
            .map_err(io("syncing the directory of"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_owner_is_read_back_and_damage_is_refused() {
        let dir = std::env::temp_dir().join(format!("owner-{}", Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        assert_eq!(Owner::read(&dir).unwrap(), None);
        let owner = Owner {
            version: OWNER_VERSION,
            epoch: 7,
            incarnation: 3,
            layer: Some(Uuid::new_v4()),
        };
        owner.replace(&dir).unwrap();
        assert_eq!(Owner::read(&dir).unwrap(), Some(owner));
        fs::write(owner_path(&dir), b"{\"version\":1,\"epoch\"").unwrap();
        assert!(matches!(Owner::read(&dir), Err(OwnerError::Damaged { .. })));
        fs::remove_dir_all(dir).unwrap();
    }
}
