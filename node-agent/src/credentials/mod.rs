//! Credentials: what logs on after a reboot of the host (patent US10387187B2, step 4).
//!
//! Each saved session is sealed with a key of its own. A *credential provider* wraps that key before the
//! host reboots, and gives it back afterwards: to the same node, for the same guest and checkpoint, in
//! another boot than the saving one. The wrapped key is a durable record ([`Registry`]); what protects it
//! (the host's key, a key file, a key that the operator keeps) is the provider's. Once a session has been taken up, its record is
//! destroyed, and with it the way to read the checkpoint.

mod hand;
mod key_file;
mod operator;
mod registry;
mod secret;
mod systemd;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::durable::DurableError;

pub use hand::HandedKeys;
pub use key_file::KeyFile;
pub use operator::Operator;
pub use registry::Registry;
pub use secret::Secret;
pub use systemd::SystemdCreds;

/// For what a key was registered. A provider gives it back for nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Identity {
    /// UID of the Guest.
    pub guest_uid: String,
    /// The host's machine ID.
    pub machine_id: String,
    /// Boot ID of the host when the session was saved.
    pub boot_id: String,
    /// The checkpoint.
    pub checkpoint: Uuid,
    /// Name of the NodeUpdate for which it is saved. Empty in records of earlier agents, whose providers did not ask.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_update: String,
}

impl Identity {
    /// The identity as one word: a valid name of a systemd credential, and what is authenticated with
    /// the key.
    fn name(&self) -> String {
        format!(
            "understudy.{}.{}.{}.{}",
            self.guest_uid, self.machine_id, self.boot_id, self.checkpoint
        )
    }
}

/// Wraps and unwraps keys of sessions.
pub trait CredentialProvider: Send + Sync {
    /// Its name in HostUpdates and in `Host` status.
    fn name(&self) -> &'static str;

    /// Whether it can wrap and unwrap now; else why not and what to do. Asked before any guest is paused.
    fn ready(&self) -> Result<(), CredentialError>;

    /// Whether it can wrap the keys of the sessions that are saved for this NodeUpdate.
    fn ready_for(&self, node_update: &str) -> Result<(), CredentialError> {
        let _ = node_update;
        self.ready()
    }

    /// Wraps a key so that only this node can unwrap it, and only for this identity.
    fn wrap(&self, identity: &Identity, key: &Secret) -> Result<String, CredentialError>;

    /// The key that was wrapped for this identity.
    ///
    /// Who must ask somebody else does not wait: [`CredentialError::Awaited`] until there is an answer.
    fn unwrap(&self, identity: &Identity, wrapped: &str) -> Result<Secret, CredentialError>;

    /// No session of the NodeUpdate of this UID is unwrapped any more.
    fn forget(&self, node_update: &str) {
        let _ = node_update;
    }
}

/// Why a credential could not be made, registered or used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The configuration names no such provider.
    #[error("no credential provider {name:?} on this node; it has: {}", known.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// It cannot be used now.
    #[error("credential provider {provider} is not usable: {why}; {remedy}")]
    NotReady {
        /// The provider.
        provider: &'static str,
        /// What is missing.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// It failed to wrap.
    #[error("credential provider {provider} could not register a key: {why}")]
    Wrap {
        /// The provider.
        provider: &'static str,
        /// Its words.
        why: String,
    },
    /// It will tell, and has not yet.
    #[error("waiting for credential provider {provider}: {why}")]
    Awaited {
        /// The provider.
        provider: &'static str,
        /// For what.
        why: String,
    },
    /// The NodeUpdate could not be read or written.
    #[error("the NodeUpdate in the node agent's state: {0}")]
    Objects(String),
    /// It does not give the key back.
    #[error("credential provider {provider} does not give back the key: {why}")]
    Refused {
        /// The provider.
        provider: &'static str,
        /// Its words.
        why: String,
    },
    /// Nothing was registered.
    #[error("no key is registered for checkpoint {0}: it was destroyed, or never registered")]
    Missing(Uuid),
    /// The record is for something else than was asked.
    #[error(
        "the key of checkpoint {checkpoint} was registered for another {what} ({registered}) than asks for it ({asking})"
    )]
    Foreign {
        /// The checkpoint.
        checkpoint: Uuid,
        /// Which part of the identity differs.
        what: &'static str,
        /// What was registered.
        registered: String,
        /// What asks.
        asking: String,
    },
    /// The saving boot has not ended.
    #[error("the key of checkpoint {0} is given back after the host's reboot only")]
    SameBoot(Uuid),
    /// A record could not be read or written.
    #[error(transparent)]
    File(#[from] DurableError),
    /// A key must not reach a disk.
    #[error(
        "{directory} is not on a tmpfs: the key of a session would be written to a disk; let the configuration's runDir be on one, such as /run/understudy"
    )]
    NotInMemory {
        /// The directory.
        directory: PathBuf,
    },
    /// No key could be drawn.
    #[error("the kernel gave no random numbers for a key")]
    Random,
    /// A key could not be handed over.
    #[error("handing a key to the VMM by {path}: {source}")]
    Hand {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod providers_test;
