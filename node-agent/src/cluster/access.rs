//! How the service reaches the API server: a file that the Pod writes, and keeps fresh. It stays when the Pod
//! goes, so that the agent knows its node after a reboot before anybody answers.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, DurableError};

/// Content of `<stateDir>/cluster/access.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Access {
    /// URL of the API server.
    pub server: String,
    /// Certificates of its CA, in PEM.
    pub ca_data: String,
    /// Token of the agent's ServiceAccount, bound to its Pod and so to the node.
    pub token: String,
    /// Name of the Node.
    pub node_name: String,
    /// UID of the Node.
    #[serde(rename = "nodeUID")]
    pub node_uid: String,
    /// Namespace of the Pod.
    pub namespace: String,
}

impl fmt::Debug for Access {
    /// Without the token: logs are read by others.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("server", &self.server)
            .field("node_name", &self.node_name)
            .field("node_uid", &self.node_uid)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// Why there is no access.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The file could not be looked at.
    #[error("looking at {path}: {source}")]
    Look {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is none.
    #[error(
        "{0} is not there: in a cluster the agent's Pod writes it (`understudy-node pod`); is the DaemonSet's Pod running on this node?"
    )]
    Missing(PathBuf),
}

/// Tells a file from what it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// The file, read again when it changes.
#[derive(Debug)]
pub struct AccessFile {
    path: PathBuf,
    stamp: Option<Stamp>,
}

impl AccessFile {
    /// The file of an agent with this state directory.
    pub fn new(state_dir: &Path) -> AccessFile {
        AccessFile {
            path: path(state_dir),
            stamp: None,
        }
    }

    /// Its content, where that is new since the last call; `None` where it is not, or the file is gone: what was
    /// read last is used on.
    pub fn changed(&mut self) -> Result<Option<Access>, AccessError> {
        let stamp = match std::fs::metadata(&self.path) {
            Ok(metadata) => Stamp {
                inode: metadata.ino(),
                size: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(AccessError::Look {
                    path: self.path.clone(),
                    source,
                });
            }
        };
        if self.stamp == Some(stamp) {
            return Ok(None);
        }
        // A file that is damaged is told once, and read again when it was replaced.
        self.stamp = Some(stamp);
        Ok(durable::read_json(&self.path)?)
    }
}

/// Where it is.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("cluster").join("access.json")
}

/// Reads it.
pub fn read(state_dir: &Path) -> Result<Access, AccessError> {
    let path = path(state_dir);
    durable::read_json(&path)?.ok_or(AccessError::Missing(path))
}

/// Replaces it, readable by its owner alone. Returns whether it is another than before.
pub fn write(state_dir: &Path, access: &Access) -> Result<bool, AccessError> {
    let path = path(state_dir);
    // One that is damaged is replaced.
    if matches!(durable::read_json::<Access>(&path), Ok(Some(there)) if there == *access) {
        return Ok(false);
    }
    if let Some(directory) = path.parent() {
        durable::make_dir(directory)?;
    }
    durable::write_secret_json(&path, access)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn access(token: &str) -> Access {
        Access {
            server: "https://127.0.0.1:6443".into(),
            ca_data: "pem".into(),
            token: token.into(),
            node_name: "alpha".into(),
            node_uid: "u".into(),
            namespace: "understudy".into(),
        }
    }

    #[test]
    fn it_is_read_again_when_it_changes_and_kept_when_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = AccessFile::new(dir.path());
        assert_eq!(file.changed().unwrap(), None);
        assert!(matches!(read(dir.path()), Err(AccessError::Missing(_))));
        assert!(write(dir.path(), &access("a")).unwrap());
        assert_eq!(file.changed().unwrap(), Some(access("a")));
        assert_eq!(file.changed().unwrap(), None);
        assert!(
            !write(dir.path(), &access("a")).unwrap(),
            "the same is not written again"
        );
        assert_eq!(file.changed().unwrap(), None);
        assert!(write(dir.path(), &access("b")).unwrap());
        assert_eq!(file.changed().unwrap(), Some(access("b")));
        std::fs::write(path(dir.path()), "{").unwrap();
        assert!(file.changed().is_err());
        assert_eq!(file.changed().unwrap(), None);
        assert!(
            write(dir.path(), &access("b")).unwrap(),
            "a damaged file is replaced"
        );
        std::fs::remove_file(path(dir.path())).unwrap();
        assert_eq!(file.changed().unwrap(), None);
    }

    #[test]
    fn only_its_owner_reads_the_token_and_no_log_shows_it() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &access("secret-token")).unwrap();
        let mode = std::fs::metadata(path(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{:?}", access("secret-token")).contains("secret-token"));
    }
}
