//! Sessions of guests: saved before the host reboots, resumed afterwards, and remembered on disk in
//! between ([`record`]).
//!
//! What holds at any time: a guest with a checkpoint that is complete and unused goes on from that
//! checkpoint, or not at all. Nobody boots it past that but the user who discards the session by name.

mod after;
mod estimate;
pub mod record;
mod resume;
mod save;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use understudy_vmm_control::client::ClientError;
use uuid::Uuid;

use crate::config::Config;
use crate::credentials::{CredentialError, HandedKey, Registry};
use crate::durable::DurableError;

pub use after::{Left, look};
pub use estimate::{Estimate, estimate};
pub use record::{Record, Records, Refused, Saved, Standing};
pub use resume::{ResumeError, Resumed, resume};
pub use save::{Cancelled, begin, cancel, keep, preflight, progress, record_saved, runs};

/// The sessions of a node's guests.
pub struct Sessions {
    /// What is on disk.
    pub records: Records,
    /// The keys.
    pub credentials: Registry,
    run_dir: PathBuf,
    machine_id: String,
    boot_id: String,
    handed: Mutex<HashMap<Uuid, HandedKey>>,
    resuming: Mutex<HashSet<String>>,
}

/// Why a session was not saved, or a save not undone.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A file.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The key.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The VMM.
    #[error("the VMM of {guest}: {source}")]
    Vmm {
        /// The guest.
        guest: String,
        /// What it said.
        source: ClientError,
    },
    /// It has no VMM.
    #[error("guest {0} does not run: there is no session to save")]
    NotRunning(String),
    /// Its configuration is gone.
    #[error("the configuration of the VMM of {0} is gone; its session could not be resumed")]
    NoConfiguration(String),
    /// Not enough space.
    #[error(
        "saving the sessions of this node's guests needs {needed_mib} MiB in {directory}, where {free_mib} MiB are free; make room, or let the configuration's stateDir be on a larger disk"
    )]
    Space {
        /// Where.
        directory: PathBuf,
        /// What is needed.
        needed_mib: u64,
        /// What is there.
        free_mib: u64,
    },
    /// The host has no identity.
    #[error("/etc/machine-id is missing or empty: checkpoints are bound to it; run systemd-machine-id-setup")]
    NoMachineId,
    /// Another checkpoint is being saved.
    #[error("guest {guest} is being saved as checkpoint {other} already")]
    OtherSave {
        /// The guest.
        guest: String,
        /// The other checkpoint.
        other: Uuid,
    },
    /// Nothing is recorded.
    #[error("no checkpoint {checkpoint} of guest {guest_uid} is known here")]
    Unknown {
        /// The guest.
        guest_uid: String,
        /// The checkpoint.
        checkpoint: Uuid,
    },
}

impl Sessions {
    /// The sessions beneath the configuration's state directory, on a machine in a boot.
    pub fn open(config: &Config, machine_id: String, boot_id: String) -> Sessions {
        HandedKey::sweep(&config.run_dir);
        Sessions {
            records: Records::open(&config.state_dir),
            credentials: Registry::open(&config.state_dir, &config.credentials),
            run_dir: config.run_dir.clone(),
            machine_id,
            boot_id,
            handed: Mutex::default(),
            resuming: Mutex::default(),
        }
    }

    /// The host's machine ID.
    pub fn machine_id(&self) -> &str {
        &self.machine_id
    }

    /// The host's boot ID.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Whether a guest is being resumed now; its engine alone starts and ends VMMs of it.
    pub fn is_resuming(&self, guest_uid: &str) -> bool {
        lock(&self.resuming).contains(guest_uid)
    }

    /// Destroys a checkpoint with its key; fine when it is gone.
    pub fn destroy(&self, guest_uid: &str, checkpoint: Uuid) -> Result<(), SessionError> {
        // The key first: whatever is left of the checkpoint by a power cut is of use to nobody.
        self.credentials.destroy(checkpoint)?;
        Ok(self.records.remove(guest_uid, checkpoint)?)
    }
}

#[cfg(test)]
impl Sessions {
    /// As [`Sessions::open`], with the test's own providers.
    pub(crate) fn with_credentials(mut self, credentials: Registry) -> Sessions {
        self.credentials = credentials;
        self
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod sessions_test;
