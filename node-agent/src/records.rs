//! Records of the engines: one file each, replaced as a whole, so that a cut finds the old or the new.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest record that is read, in bytes.
pub const MAX_RECORD: u64 = 4 << 20;

/// What an engine records.
pub trait Record: Serialize + DeserializeOwned {
    /// First word of a record's file.
    const MAGIC: &'static str;
    /// Ending of a record's file name.
    const EXTENSION: &'static str;
    /// Version of the format; a record of another one is refused, never guessed at.
    const VERSION: u32;
    /// What it is, for errors: `a record of an operation`.
    const WHAT: &'static str;
    /// What to do about one that is damaged.
    const ADVICE: &'static str;

    /// Names the record.
    fn uid(&self) -> &str;
    /// The version within the record.
    fn version(&self) -> u32;
}

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
    #[error("{path} is not {what} ({reason}); {advice}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What would do.
        advice: &'static str,
    },
    /// Written by another version.
    #[error(
        "{path} is a record of version {version}, this agent knows {known}; run the version of the agent that wrote it until it is finished"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// The version that is known here.
        known: u32,
    },
}

/// A directory of records, `<uid>.<EXTENSION>`.
#[derive(Debug)]
pub struct Directory<R> {
    path: PathBuf,
    records: PhantomData<fn() -> R>,
}

impl<R> Clone for Directory<R> {
    fn clone(&self) -> Directory<R> {
        Directory {
            path: self.path.clone(),
            records: PhantomData,
        }
    }
}

impl<R: Record> Directory<R> {
    /// Opens the journal, making its directory where it is missing.
    pub fn open(path: impl Into<PathBuf>) -> Result<Directory<R>, JournalError> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(failed("making", &path))?;
        Ok(Directory {
            path,
            records: PhantomData,
        })
    }

    /// All records, each good or bad by itself, in the order of their names.
    pub fn load(&self) -> Result<Vec<Result<R, JournalError>>, JournalError> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed("listing", &self.path))? {
            let path = entry.map_err(failed("listing", &self.path))?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == R::EXTENSION)
            {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths.iter().map(|path| read(path)).collect())
    }

    /// Whether there is a record of this UID.
    pub fn has(&self, uid: &str) -> bool {
        self.file(uid).exists()
    }

    /// Removes a record, durably; fine where there is none.
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
        self.path.join(format!("{safe}.{}", R::EXTENSION))
    }

    /// Replaces a record; when it returns the new one survives a power cut, when it fails the old one is
    /// whole.
    pub fn write(&self, record: &R) -> Result<(), JournalError> {
        let path = self.file(record.uid());
        let temporary = path.with_extension("new");
        let text = encode(record).map_err(failed("encoding", &path))?;
        let mut file = File::create(&temporary).map_err(failed("creating", &temporary))?;
        file.write_all(&text).map_err(failed("writing", &temporary))?;
        file.sync_all().map_err(failed("syncing", &temporary))?;
        fs::rename(&temporary, &path).map_err(failed("replacing", &path))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), JournalError> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("syncing", &self.path))
    }
}

/// A record as it is kept: a line with version and checksum, then JSON.
pub fn encode<R: Record>(record: &R) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
    let mut text = format!("{} {} {:08x}\n", R::MAGIC, R::VERSION, crc32c::crc32c(&body)).into_bytes();
    text.extend_from_slice(&body);
    Ok(text)
}

/// Reads a record; `path` is for the error.
pub fn decode<R: Record>(record: &[u8], path: &Path) -> Result<R, JournalError> {
    let damaged = |reason: &str| JournalError::Damaged {
        path: path.to_owned(),
        what: R::WHAT,
        reason: reason.to_owned(),
        advice: R::ADVICE,
    };
    let split = record
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or_else(|| damaged("it has no first line"))?;
    let (line, body) = (&record[..split], &record[split + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| damaged("its first line is not text"))?;
    let mut words = line.split(' ');
    if words.next() != Some(R::MAGIC) {
        return Err(damaged("its first line does not name one"));
    }
    let version: u32 = words
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| damaged("it has no version"))?;
    if version != R::VERSION {
        return Err(JournalError::Version {
            path: path.to_owned(),
            version,
            known: R::VERSION,
        });
    }
    let checksum = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
    if checksum != Some(crc32c::crc32c(body)) {
        return Err(damaged("its checksum does not agree"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let record = R::deserialize(&mut json).map_err(|error| damaged(&error.to_string()))?;
    if record.version() != R::VERSION {
        return Err(damaged("its two versions differ"));
    }
    Ok(record)
}

fn read<R: Record>(path: &Path) -> Result<R, JournalError> {
    let mut record = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_RECORD + 1).read_to_end(&mut record))
        .map_err(failed("reading", path))?;
    if record.len() as u64 > MAX_RECORD {
        return Err(JournalError::Damaged {
            path: path.to_owned(),
            what: R::WHAT,
            reason: format!("it is larger than {MAX_RECORD} bytes"),
            advice: R::ADVICE,
        });
    }
    decode(&record, path)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { action, path, source }
}
