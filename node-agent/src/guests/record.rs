//! What must be remembered of a guest beyond its object: `<stateDir>/guests/<UID>.json`.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::durable::{self, DurableError};

/// Version of the record's format.
const VERSION: u32 = 1;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Record {
    version: u32,
    dormant: Option<Dormant>,
}

/// The incarnation before the current one, kept after a cutover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Dormant {
    /// Its number.
    pub incarnation: u64,
    /// Its own layer, removed with it.
    pub layer: Uuid,
    /// UID of the SeamlessReboot that made it dormant, and can be rolled back.
    #[serde(default)]
    pub operation: Option<String>,
    /// When it is removed.
    pub deadline: Timestamp,
}

/// The records of all guests.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// The records beneath `state_dir`.
    pub fn open(state_dir: &Path) -> Records {
        Records {
            dir: state_dir.join("guests"),
        }
    }

    /// The dormant incarnation of a guest.
    pub fn dormant(&self, guest_uid: &str) -> Result<Option<Dormant>, DurableError> {
        let path = self.file(guest_uid);
        match durable::read_json::<Record>(&path)? {
            Some(record) if record.version != VERSION => Err(DurableError::Damaged {
                path,
                reason: format!("version {} where {VERSION} is known", record.version),
            }),
            record => Ok(record.and_then(|record| record.dormant)),
        }
    }

    /// Records which incarnation is dormant, durably.
    pub fn set_dormant(&self, guest_uid: &str, dormant: Option<Dormant>) -> Result<(), DurableError> {
        durable::make_dir(&self.dir)?;
        let record = Record {
            version: VERSION,
            dormant,
        };
        durable::write_json(&self.file(guest_uid), &record)
    }

    /// Forgets a guest.
    pub fn remove(&self, guest_uid: &str) -> Result<(), DurableError> {
        durable::remove(&self.file(guest_uid))
    }

    fn file(&self, guest_uid: &str) -> PathBuf {
        self.dir.join(format!("{guest_uid}.json"))
    }
}
