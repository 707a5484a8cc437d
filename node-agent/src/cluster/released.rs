//! Guests that were deleted and have left nothing on this node: kept until the API server has forgotten them, so
//! that an agent that dies in between still tells that it has let go of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use understudy_api::Guest;
use understudy_api::conditions::{self, Wanted, types};

use crate::durable::{self, DurableError};
use crate::store::Object;

/// Reason of the condition `Released`.
pub const DELETED: &str = "Deleted";

/// Records of released guests, one file each.
#[derive(Debug)]
pub struct Released {
    dir: PathBuf,
    guests: Mutex<BTreeMap<String, Guest>>,
}

impl Released {
    /// Reads what a former agent left.
    pub fn open(state_dir: &Path) -> Result<Released, DurableError> {
        let dir = state_dir.join("cluster").join("released");
        durable::make_dir(&dir)?;
        let mut guests = BTreeMap::new();
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match durable::read_json::<Guest>(&path) {
                Ok(Some(guest)) => {
                    guests.insert(guest.uid(), guest);
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the record of a deleted guest is left alone"),
            }
        }
        Ok(Released {
            dir,
            guests: Mutex::new(guests),
        })
    }

    /// Records that nothing of a guest is left here: durable when this returns.
    pub fn put(&self, guest: &Guest, now: Timestamp) -> Result<(), DurableError> {
        let mut guest = guest.clone();
        let generation = guest.generation();
        let status = guest.status.get_or_insert_default();
        conditions::set(
            &mut status.conditions,
            generation,
            now,
            &[Wanted {
                kind: types::RELEASED,
                status: Some(true),
                reason: DELETED,
                message: "nothing of the guest is left on its node, but disks that are kept",
            }],
        );
        durable::write_json(&self.path(&guest.uid()), &guest)?;
        self.lock().insert(guest.uid(), guest);
        Ok(())
    }

    /// Whether a guest was released.
    pub fn has(&self, uid: &str) -> bool {
        self.lock().contains_key(uid)
    }

    /// All of them, with their last status.
    pub fn all(&self) -> Vec<Guest> {
        self.lock().values().cloned().collect()
    }

    /// The API server has forgotten a guest.
    pub fn forget(&self, uid: &str) -> Result<(), DurableError> {
        durable::remove(&self.path(uid))?;
        self.lock().remove(uid);
        Ok(())
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join(format!("{uid}.json"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
