//! The bottom of every chain: the file that the user named, with its record `source.json`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::DiskError;
use super::storage::{Access, Directory, Lock, Storage};

/// Version of [`SourceRecord`].
pub const SOURCE_VERSION: u32 = 1;

/// File name of the record in the state directory.
const RECORD: &str = "source.json";

/// What is known of the source, in `source.json` of its state directory. It exists once the disk was
/// opened for writing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceRecord {
    /// [`SOURCE_VERSION`].
    pub version: u32,
    /// Identity of the disk.
    pub uuid: Uuid,
    /// Size in bytes when the record was written.
    pub size: u64,
    /// Write session: grows, durably, before the first write of each opening for writing, so that a layer
    /// knows whether what is below it is still what it was made on.
    pub session: u64,
    /// The layer that is being merged into the source: its blocks are partly here, partly there, and they
    /// make sense together only.
    #[serde(default)]
    pub merging: Option<Uuid>,
    /// Layers were made above the source since it was the guest's whole disk.
    #[serde(default)]
    pub layered: bool,
}

/// The open source.
pub(crate) struct Source {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) record: SourceRecord,
    pub(crate) size: u64,
}

impl Source {
    /// Opens the source without locking it, checks its size and reads its record.
    pub(crate) fn open(directory: &dyn Directory, access: Access) -> Result<Source, DiskError> {
        let path = directory.source_path();
        let storage = directory
            .open_source(access)
            .map_err(DiskError::io("opening the disk image", path.clone()))?;
        let size = storage
            .size()
            .map_err(DiskError::io("finding the size of", path.clone()))?;
        if size == 0 || !size.is_multiple_of(super::SECTOR) {
            return Err(DiskError::Size { path, size });
        }
        let record = Self::read_record(directory)?.unwrap_or(SourceRecord {
            version: SOURCE_VERSION,
            uuid: Uuid::new_v4(),
            size,
            session: 0,
            merging: None,
            layered: false,
        });
        if record.size != size && (record.layered || record.merging.is_some()) {
            return Err(DiskError::StaleRoot {
                path,
                reason: format!("it has {size} bytes where {} were recorded", record.size),
                advice: "layers lie above it, so give it back its size, and change it only when they are merged",
            });
        }
        Ok(Source {
            storage,
            record,
            size,
        })
    }

    /// Reads `source.json`; `None` when the disk was never opened for writing.
    pub(crate) fn read_record(directory: &dyn Directory) -> Result<Option<SourceRecord>, DiskError> {
        let path = directory.path(RECORD);
        let Some(text) = directory
            .read(RECORD)
            .map_err(DiskError::io("reading", path.clone()))?
        else {
            return Ok(None);
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let damaged = |error: serde_json::Error| DiskError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        };
        // The version first: a newer one may have fields that this one does not know.
        let Versioned { version } = serde_json::from_slice(&text).map_err(damaged)?;
        if version != SOURCE_VERSION {
            return Err(DiskError::Version {
                path,
                found: version,
                known: SOURCE_VERSION,
            });
        }
        serde_json::from_slice(&text).map(Some).map_err(damaged)
    }

    pub(crate) fn lock(&self, directory: &dyn Directory, lock: Lock) -> Result<(), DiskError> {
        self.storage
            .lock(lock)
            .map_err(DiskError::lock(directory.source_path()))
    }

    /// Replaces the record durably.
    pub(crate) fn store(&mut self, directory: &dyn Directory, record: SourceRecord) -> Result<(), DiskError> {
        directory
            .make()
            .map_err(DiskError::io("creating", directory.path("")))?;
        let text = serde_json::to_vec_pretty(&record).map_err(|error| DiskError::Io {
            action: "encoding",
            path: directory.path(RECORD),
            source: error.into(),
        })?;
        directory
            .replace(RECORD, &text)
            .map_err(DiskError::io("replacing", directory.path(RECORD)))?;
        self.record = record;
        Ok(())
    }

    /// Begins a write session; to be called before the first write of an opening.
    pub(crate) fn begin_session(
        &mut self,
        directory: &dyn Directory,
        merging: Option<Uuid>,
        layered: bool,
    ) -> Result<(), DiskError> {
        let record = SourceRecord {
            size: self.size,
            session: self.record.session + 1,
            merging,
            layered,
            ..self.record.clone()
        };
        self.store(directory, record)
    }
}
