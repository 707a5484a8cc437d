//! Files that survive a power cut: replaced by write, fsync, rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a durable file could not be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
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
    /// The content is not what is expected there.
    #[error("{path} is damaged: {reason}; move it away to go on without it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl DurableError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
        let path = path.to_owned();
        move |source| DurableError::Io { action, path, source }
    }
}

/// Replaces `path`: when this returns, the new content survives a power cut; when it fails or is cut
/// short, the old content is whole. One writer at a time per path.
pub fn replace(path: &Path, content: &[u8]) -> Result<(), DurableError> {
    write(path, content, true, ANYBODY)
}

/// As [`replace`], but the content may be lost (never torn) by a power cut: for what is only shown.
pub fn replace_relaxed(path: &Path, content: &[u8]) -> Result<(), DurableError> {
    write(path, content, false, ANYBODY)
}

/// As [`write_json`], for what only the owner may read.
pub fn write_secret_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DurableError> {
    // One that a former writer left half-written may be readable by others.
    let _ = fs::remove_file(replacement(path));
    write(path, &encode(path, value)?, true, OWNER)
}

/// Mode of files, but for the umask.
const ANYBODY: u32 = 0o666;
/// Mode of files with secrets.
const OWNER: u32 = 0o600;

fn replacement(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    parent(path).join(name)
}

fn write(path: &Path, content: &[u8], durable: bool, mode: u32) -> Result<(), DurableError> {
    let directory = parent(path);
    let temporary = replacement(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .map_err(DurableError::io("creating a replacement of", path))?;
    file.write_all(content)
        .map_err(DurableError::io("writing a replacement of", path))?;
    if durable {
        file.sync_all()
            .map_err(DurableError::io("syncing a replacement of", path))?;
    }
    fs::rename(&temporary, path).map_err(DurableError::io("replacing", path))?;
    if durable {
        sync_dir(directory)?;
    }
    Ok(())
}

/// Removes a file durably; fine when it is gone already.
pub fn remove(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(DurableError::io("removing", path)(error)),
    }
}

/// Makes a directory with its parents.
pub fn make_dir(path: &Path) -> Result<(), DurableError> {
    fs::create_dir_all(path).map_err(DurableError::io("creating the directory", path))
}

/// Fsyncs a directory, so that names made or removed in it are durable.
pub fn sync_dir(directory: &Path) -> Result<(), DurableError> {
    File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(DurableError::io("syncing the directory", directory))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Reads JSON; `None` when the file does not exist.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DurableError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DurableError::io("reading", path)(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| DurableError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        })
}

/// Replaces `path` by `value` as JSON, durably.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DurableError> {
    replace(path, &encode(path, value)?)
}

/// As [`write_json`], by [`replace_relaxed`].
pub fn write_json_relaxed<T: Serialize>(path: &Path, value: &T) -> Result<(), DurableError> {
    replace_relaxed(path, &encode(path, value)?)
}

fn encode<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, DurableError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| {
        DurableError::io("encoding", path)(io::Error::new(io::ErrorKind::InvalidData, error))
    })?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_whole_and_a_damaged_one_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), None);
        write_json(&path, &vec![1u32, 2]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2]));
        fs::write(&path, "[1,").unwrap();
        let error = read_json::<Vec<u32>>(&path).unwrap_err().to_string();
        assert!(error.contains("a.json"), "{error}");
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), None);
    }
}
