//! Resuming: the key is asked for, and a VMM is started that goes on from the checkpoint.

use understudy_api::Guest;
use understudy_vmm_control::client::ClientError;
use understudy_vmm_control::config::Role;
use understudy_vmm_control::owner::state_dir;
use understudy_vmm_control::session::{Refusal, Resume, ResumeInfo};
use uuid::Uuid;

use super::record::{Record, Refused, Standing};
use super::{SessionError, Sessions, lock};
use crate::credentials::{CredentialError, HandedKey};
use crate::durable::{self, DurableError};
use crate::guests::boot::{BootError, check_memory};
use crate::guests::{SpecError, resolve};
use crate::host;
use crate::network::{NetworkError, ensure_tap};
use crate::node::Node;
use crate::store::Object;
use crate::vmm::{LaunchError, log_length};

/// A session that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// How its VMM tells it.
    pub info: ResumeInfo,
    /// When this try began, in microseconds since 1970.
    pub begin_us: i64,
    /// When the VMM had answered, in microseconds since 1970.
    pub end_us: i64,
}

/// Why a session was not resumed. Nothing was changed: its checkpoint is whole, the guest does not run.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The VMM refuses the checkpoint.
    #[error("{message}")]
    Checkpoint {
        /// Why.
        refusal: Refusal,
        /// In the VMM's words.
        message: String,
    },
    /// No key.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The guest's declaration does not let it run here.
    #[error("the Guest cannot be run here as it is declared: {0}")]
    Spec(#[from] SpecError),
    /// No network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Not enough memory.
    #[error(transparent)]
    Memory(BootError),
    /// The VMM did not start, without a word on the checkpoint.
    #[error(transparent)]
    Launch(LaunchError),
    /// The VMM runs and does not tell of its session.
    #[error("the VMM was started and does not say that it resumed: {0}")]
    Silent(String),
    /// A file.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The record.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It was used, and the VMM that used it is gone.
    #[error("checkpoint {0} was resumed before, and the guest it became has ended since")]
    Consumed(Uuid),
}

impl ResumeError {
    /// In one word, for a status.
    pub fn reason(&self) -> &'static str {
        match self {
            ResumeError::Checkpoint { refusal, .. } => refusal.as_str(),
            ResumeError::Credential(_) => "CredentialUnavailable",
            ResumeError::Spec(_) => "InvalidSpec",
            ResumeError::Network(_) => "NetworkUnavailable",
            ResumeError::Memory(_) => "InsufficientMemory",
            ResumeError::Consumed(_) => "SessionLost",
            _ => "ResumeFailed",
        }
    }
}

/// Marks a guest as being resumed, for as long as this lives.
struct Turn<'a>(&'a Sessions, String);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.resuming).remove(&self.1);
    }
}

/// Resumes a guest's session, or finds that it was resumed. A session that is not stays as it is, and its
/// record says why.
pub fn resume(node: &Node, guest: &Guest, checkpoint: Uuid) -> Result<Resumed, ResumeError> {
    let uid = guest.uid();
    let mut record = super::save::find(node, &uid, checkpoint)?;
    {
        // Held by the guest's worker for a pass: none is under way while the mark is set.
        let turn = node.turn(&guest.key());
        let _turn = lock(&turn);
        lock(&node.sessions.resuming).insert(uid.clone());
    }
    let _resuming = Turn(&node.sessions, uid);
    let result = attempt(node, guest, &mut record);
    match &result {
        Ok(resumed) => tracing::info!(
            guest = record.guest,
            %checkpoint,
            start_us = resumed.info.start_us,
            "its session goes on"
        ),
        Err(error) => {
            tracing::error!(guest = record.guest, %checkpoint, reason = error.reason(), "its session is not resumed: {error}");
        }
    }
    record.refused = result.as_ref().err().map(|error| Refused {
        reason: error.reason().to_owned(),
        message: error.to_string(),
    });
    if let Err(error) = node.sessions.records.put(&record) {
        tracing::error!(guest = record.guest, %error, "the outcome is not recorded");
    }
    node.objects.wake();
    result
}

fn attempt(node: &Node, guest: &Guest, record: &mut Record) -> Result<Resumed, ResumeError> {
    let begin_us = host::moment().unix_us;
    let checkpoint = record.identity.checkpoint;
    let sessions = &node.sessions;
    let done = |info| Resumed {
        info,
        begin_us,
        end_us: host::moment().unix_us,
    };
    if record.instance.is_alive() {
        // An agent that was killed has started it.
        return match told(&record.instance.client().info(), checkpoint) {
            Ok(info) => Ok(done(info)),
            Err(message) => Err(ResumeError::Silent(message)),
        };
    }
    if sessions.records.standing(record)? == Standing::Consumed {
        return Err(ResumeError::Consumed(checkpoint));
    }
    let resolved = resolve(&node.config, guest, host::cpus(), host::total_memory_mib())?;
    check_memory(node, record.config.memory_mib).map_err(ResumeError::Memory)?;
    let key = sessions.credentials.log_on(
        checkpoint,
        &record.identity.guest_uid,
        &sessions.machine_id,
        &sessions.boot_id,
    )?;
    for nic in &resolved.networks {
        ensure_tap(&nic.tap, &nic.bridge)?;
    }
    for disk in record.config.disks.iter().filter(|disk| !disk.read_only) {
        durable::make_dir(&state_dir(&disk.source))?;
    }
    let handed = HandedKey::new(&sessions.run_dir, checkpoint, &key)?;
    let mut config = record.config.clone();
    // What was a clone before its cutover owns the guest now.
    config.role = Role::Active;
    config.clone_oem_strings.clear();
    for network in &mut config.networks {
        network.isolated_peer = None;
    }
    for disk in &mut config.disks {
        // Whatever `owner.json` names: layers are merged while a guest runs.
        disk.layer = None;
    }
    config.resume = Some(Resume {
        checkpoint,
        directory: sessions
            .records
            .directory(&record.identity.guest_uid, checkpoint),
        key: handed.path().to_owned(),
        guest_uid: record.identity.guest_uid.clone(),
        host_boot_id: sessions.boot_id.clone(),
        machine_id: sessions.machine_id.clone(),
    });
    record.instance.role = Role::Active;
    record.instance.process = None;
    let before = log_length(&record.instance.log);
    match node
        .launcher
        .start(&node.instances, &mut record.instance, &config)
    {
        Ok(info) => match told(&Ok(info), checkpoint) {
            Ok(info) => Ok(done(info)),
            Err(message) => Err(ResumeError::Silent(message)),
        },
        Err(error @ LaunchError::Ended { .. }) => {
            let log = crate::vmm::log_since(&record.instance.log, before);
            Err(match Refusal::find(&log) {
                Some((refusal, message)) => ResumeError::Checkpoint {
                    refusal,
                    message: message.to_owned(),
                },
                None => ResumeError::Launch(error),
            })
        }
        Err(error) => Err(ResumeError::Launch(error)),
    }
}

fn told(
    info: &Result<understudy_vmm_control::api::VmInfo, ClientError>,
    checkpoint: Uuid,
) -> Result<ResumeInfo, String> {
    match info {
        Ok(info) => match &info.resume {
            Some(resume) if resume.checkpoint == checkpoint => Ok(resume.clone()),
            Some(resume) => Err(format!("it resumed checkpoint {}", resume.checkpoint)),
            None => Err("it tells of no checkpoint".to_owned()),
        },
        Err(error) => Err(error.to_string()),
    }
}
