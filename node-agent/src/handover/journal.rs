//! The journal: one file per operation, replaced as a whole, so that a cut finds the old or the new.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::record::{Operation, RECORD_VERSION};

/// Largest record that is read, in bytes.
pub const MAX_RECORD: u64 = 4 << 20;

/// First word of a record's file.
const MAGIC: &str = "understudy-operation";

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
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
    /// Not what this agent writes.
    #[error(
        "{path} is not a valid record of an operation ({reason}); the guest it names keeps what owner.json says, so move the file away to give the operation up"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Written by another version.
    #[error(
        "{path} is a record of version {version}, this agent knows {RECORD_VERSION}; run the version of the agent that wrote it until the operation is finished"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// Where records are kept.
pub trait Journal {
    /// Replaces the operation's record; when it returns the new one survives a power cut, when it fails
    /// the old one is whole.
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError>;
}

/// A directory of records, `<uid>.operation`.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Opens the journal, making its directory where it is missing.
    pub fn open(path: impl Into<PathBuf>) -> Result<Directory, JournalError> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(failed("making", &path))?;
        Ok(Directory { path })
    }

    /// All records, each good or bad by itself, in the order of their names.
    pub fn load(&self) -> Result<Vec<Result<Operation, JournalError>>, JournalError> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed("listing", &self.path))? {
            let path = entry.map_err(failed("listing", &self.path))?.path();
            if path.extension().is_some_and(|extension| extension == "operation") {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths.iter().map(|path| read(path)).collect())
    }

    /// Whether there is a record of an operation.
    pub fn has(&self, uid: &str) -> bool {
        self.file(uid).exists()
    }

    /// Removes an operation's record, durably; fine where there is none.
    pub fn remove(&self, uid: &str) -> Result<(), JournalError> {
        let path = self.file(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("removing", &path)(error)),
            _ => self.sync(),
        }
    }

    /// A UID is a name that an API server or this agent made; should it be anything else it still names a
    /// file of this directory.
    fn file(&self, uid: &str) -> PathBuf {
        let safe: String = uid
            .bytes()
            .take(128)
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(byte),
                _ => '_',
            })
            .collect();
        self.path.join(format!("{safe}.operation"))
    }

    fn sync(&self) -> Result<(), JournalError> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("syncing", &self.path))
    }
}

impl Journal for Directory {
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError> {
        let path = self.file(&operation.uid);
        let temporary = path.with_extension("new");
        let record = encode(operation).map_err(failed("encoding", &path))?;
        let mut file = File::create(&temporary).map_err(failed("creating", &temporary))?;
        file.write_all(&record).map_err(failed("writing", &temporary))?;
        file.sync_all().map_err(failed("syncing", &temporary))?;
        fs::rename(&temporary, &path).map_err(failed("replacing", &path))?;
        self.sync()
    }
}

/// A record as it is kept: a line with version and checksum, then JSON.
pub fn encode(operation: &Operation) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec_pretty(operation).map_err(io::Error::other)?;
    let mut record = format!("{MAGIC} {RECORD_VERSION} {:08x}\n", crc32c::crc32c(&body)).into_bytes();
    record.extend_from_slice(&body);
    Ok(record)
}

/// Reads a record; `path` is for the error.
pub fn decode(record: &[u8], path: &Path) -> Result<Operation, JournalError> {
    let damaged = |reason: &str| JournalError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let split = record
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or_else(|| damaged("it has no first line"))?;
    let (line, body) = (&record[..split], &record[split + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| damaged("its first line is not text"))?;
    let mut words = line.split(' ');
    if words.next() != Some(MAGIC) {
        return Err(damaged("its first line does not name an operation"));
    }
    let version: u32 = words
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| damaged("it has no version"))?;
    if version != RECORD_VERSION {
        return Err(JournalError::Version {
            path: path.to_owned(),
            version,
        });
    }
    let checksum = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
    if checksum != Some(crc32c::crc32c(body)) {
        return Err(damaged("its checksum does not agree"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let operation = Operation::deserialize(&mut json).map_err(|error| damaged(&error.to_string()))?;
    if operation.version != RECORD_VERSION {
        return Err(damaged("its two versions differ"));
    }
    Ok(operation)
}

fn read(path: &Path) -> Result<Operation, JournalError> {
    let mut record = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_RECORD + 1).read_to_end(&mut record))
        .map_err(failed("reading", path))?;
    if record.len() as u64 > MAX_RECORD {
        return Err(JournalError::Damaged {
            path: path.to_owned(),
            reason: format!("it is larger than {MAX_RECORD} bytes"),
        });
    }
    decode(&record, path)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { action, path, source }
}

#[cfg(test)]
#[path = "journal_test.rs"]
mod tests;
