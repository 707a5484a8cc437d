//! Sessions of guests: saved before the host reboots, resumed afterwards, and remembered on disk in
//! between ([`record`]). What is done when is the host engine's ([`crate::host_update`]).
//!
//! What holds at any time: a guest with a checkpoint that is complete and unused goes on from that
//! checkpoint, or not at all ([`unused`]). Nobody boots it past that but the user who discards the session
//! by name.

mod estimate;
pub mod record;
mod resume;
mod save;

use std::path::PathBuf;
use std::sync::Arc;

use understudy_vmm_control::client::ClientError;
use uuid::Uuid;

use crate::config::Config;
use crate::credentials::{CredentialError, HandedKeys, Operator, Registry};
use crate::durable::DurableError;
use crate::host::HostIdentity;
use crate::node::Node;
use crate::store::Objects;
use crate::vmm::Instances;

pub use estimate::{Estimate, estimate, memory_bytes, remember_rate};
pub use record::{Life, Record, Records, Standing};
pub use resume::{ResumeError, Resumed, obtain_key, resume};
pub use save::{Cancelled, cancel, check_space, keep, pause, register_key, running, save};

/// The sessions of a node's guests.
pub struct Sessions {
    /// What is on disk.
    pub records: Records,
    /// The keys, wrapped.
    pub credentials: Registry,
    /// The keys, on their way to VMMs.
    pub keys: HandedKeys,
    identity: HostIdentity,
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
        "{missing_mib} MiB are missing in {directory} to save all sessions of this node; make room, or let the configuration's stateDir be on a larger disk"
    )]
    Space {
        /// Where.
        directory: PathBuf,
        /// What is missing.
        missing_mib: u64,
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
    /// The sessions beneath the configuration's state directory, on a host in a boot.
    pub fn open(config: &Config, identity: HostIdentity, objects: Arc<dyn Objects>) -> Sessions {
        let operator = Operator::new(objects, &config.run_dir, &identity.boot_id);
        Sessions {
            records: Records::open(&config.state_dir),
            credentials: Registry::open(&config.state_dir, &config.credentials, operator),
            keys: HandedKeys::new(&config.run_dir),
            identity,
        }
    }

    /// The host's machine ID; empty where it has none.
    pub fn machine_id(&self) -> &str {
        &self.identity.machine_id
    }

    /// The host's boot ID.
    pub fn boot_id(&self) -> &str {
        &self.identity.boot_id
    }

    /// Destroys a checkpoint with its key; fine when it is gone.
    pub fn destroy(&self, guest_uid: &str, checkpoint: Uuid) -> Result<(), SessionError> {
        // The keys first: whatever is left of the checkpoint by a power cut is of use to nobody.
        self.keys.take_away(checkpoint);
        self.credentials.destroy(checkpoint)?;
        Ok(self.records.remove(guest_uid, checkpoint)?)
    }

    /// Destroys what no update names (`is_known`) and nobody can use: saves that were cut short, and
    /// checkpoints that were used. A complete and unused one stays, whoever made it. Called when the agent
    /// starts, before guests are looked at.
    pub fn sweep(&self, instances: &Instances, is_known: impl Fn(Uuid) -> bool) {
        for guest_uid in self.records.guests() {
            let records = match self.records.of(&guest_uid) {
                Ok(records) => records,
                Err(error) => {
                    tracing::error!(guest_uid, %error, "the sessions of a guest cannot be read; it is not started");
                    continue;
                }
            };
            for record in records {
                let checkpoint = record.identity.checkpoint;
                let is_used_up = match self.records.standing(&record) {
                    Ok(Standing::Saved) => false,
                    // What a running VMM came from may hold memory that it has not read yet.
                    Ok(_) => !record.vmm(instances).is_alive(),
                    Err(error) => {
                        tracing::error!(guest = record.guest, %error, "a session is left alone");
                        false
                    }
                };
                if !is_used_up || is_known(checkpoint) {
                    continue;
                }
                tracing::info!(guest = record.guest, %checkpoint, "removing what is left of a session");
                if let Err(error) = self.destroy(&guest_uid, checkpoint) {
                    tracing::error!(guest = record.guest, %error, "removing what is left of a session");
                }
            }
        }
        self.keys.sweep(is_known);
    }
}

/// The complete and unused checkpoint of a guest, if there is one: then the guest is not booted. An error
/// is one of the disk, and then it is not booted either. One that the user asked to discard is destroyed,
/// where no update cares for it (`is_known`).
pub fn unused(
    node: &Node,
    guest_uid: &str,
    is_known: impl Fn(Uuid) -> bool,
) -> Result<Option<Record>, SessionError> {
    let sessions = &node.sessions;
    let mut unused = None;
    for record in sessions.records.of(guest_uid)? {
        let checkpoint = record.identity.checkpoint;
        if sessions.records.standing(&record)? != Standing::Saved {
            continue;
        }
        let is_unwanted = sessions.records.is_to_be_discarded(guest_uid, checkpoint);
        if is_unwanted && !is_known(checkpoint) && !record.vmm(&node.instances).is_alive() {
            tracing::warn!(guest = record.guest, %checkpoint, "its session is discarded, as the user asked");
            sessions.destroy(guest_uid, checkpoint)?;
        } else {
            unused = Some(record);
        }
    }
    Ok(unused)
}

#[cfg(test)]
mod sessions_test;
