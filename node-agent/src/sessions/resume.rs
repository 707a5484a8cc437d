//! Resuming: the key is asked for, and a VMM is started that goes on from the checkpoint.

use understudy_api::Guest;
use understudy_vmm_control::api::VmInfo;
use understudy_vmm_control::config::Role;
use understudy_vmm_control::owner::state_dir;
use understudy_vmm_control::session::{Refusal, Resume, ResumeInfo};
use uuid::Uuid;

use super::SessionError;
use super::record::Standing;
use super::save::find;
use crate::credentials::CredentialError;
use crate::durable::{self, DurableError};
use crate::guests::boot::{BootError, check_memory};
use crate::guests::{SpecError, resolve};
use crate::host;
use crate::network::{NetworkError, ensure_tap};
use crate::node::Node;
use crate::store::Object;
use crate::vmm::{LaunchError, log_length, log_since};

/// A session that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// How its VMM tells it.
    pub info: ResumeInfo,
    /// The guest's first instruction, in microseconds since 1970.
    pub first_instruction_us: i64,
}

/// Why a session was not resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The VMM refuses the checkpoint, and has changed nothing.
    #[error("{message}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// In the VMM's words.
        message: String,
    },
    /// The VMM has ended after it had used the checkpoint.
    #[error("the VMM ended after the session was taken up: {0}")]
    Ended(String),
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
    /// The record or the key.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The VMM's key is not there.
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

/// Logs on: asks the credential provider for the key of a checkpoint, and puts it where the VMM reads it.
pub fn obtain_key(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<(), CredentialError> {
    let sessions = &node.sessions;
    let key =
        sessions
            .credentials
            .log_on(checkpoint, guest_uid, sessions.machine_id(), sessions.boot_id())?;
    sessions.keys.put(checkpoint, &key)?;
    Ok(())
}

/// Starts a VMM that goes on from a checkpoint whose key was obtained, or finds the one that does. Where it
/// fails before the checkpoint was used, nothing was changed.
pub fn resume(node: &Node, guest: &Guest, checkpoint: Uuid) -> Result<Resumed, ResumeError> {
    let sessions = &node.sessions;
    let record = find(sessions, &guest.uid(), checkpoint)?;
    let mut vmm = record.vmm(&node.instances);
    if let Some(process) = vmm.process() {
        // An agent that was killed has started it, or it was never gone.
        let info = vmm
            .client()
            .info()
            .map_err(|error| ResumeError::Silent(error.to_string()))?;
        tracing::info!(
            guest = record.guest,
            pid = process.pid,
            "its session goes on already"
        );
        let now = host::moment();
        let began = now.unix_us - now.boot_us + process.started_boot_us();
        return told(&info, checkpoint, began);
    }
    let resolved = resolve(&node.config, guest, host::cpus(), host::total_memory_mib())?;
    check_memory(node, record.config.memory_mib).map_err(ResumeError::Memory)?;
    for nic in &resolved.networks {
        ensure_tap(&nic.tap, &nic.bridge)?;
    }
    for disk in record.config.disks.iter().filter(|disk| !disk.read_only) {
        durable::make_dir(&state_dir(&disk.source))?;
    }
    if !sessions.keys.has(checkpoint) {
        obtain_key(node, &record.identity.guest_uid, checkpoint)?;
    }
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
        directory: sessions.records.directory(&record.identity.guest_uid, checkpoint),
        key: sessions.keys.path(checkpoint),
        guest_uid: record.identity.guest_uid.clone(),
        host_boot_id: sessions.boot_id().to_owned(),
        machine_id: sessions.machine_id().to_owned(),
    });
    vmm.role = Role::Active;
    vmm.process = None;
    let before = log_length(&vmm.log);
    let begin = host::moment();
    let started = node.launcher.start(&node.instances, &mut vmm, &config);
    // Read once at the start; a refused one is obtained anew.
    sessions.keys.take_away(checkpoint);
    match started {
        Ok(info) => {
            node.objects.wake();
            let resumed = told(&info, checkpoint, begin.unix_us)?;
            tracing::info!(guest = record.guest, %checkpoint, start_us = resumed.info.start_us, "its session goes on");
            Ok(resumed)
        }
        Err(error @ LaunchError::Ended { .. }) => {
            let log = log_since(&vmm.log, before);
            if let Some((refusal, message)) = Refusal::find(&log) {
                return Err(ResumeError::Refused {
                    refusal,
                    message: message.to_owned(),
                });
            }
            if sessions.records.standing(&record)? == Standing::Consumed {
                return Err(ResumeError::Ended(error.to_string()));
            }
            Err(ResumeError::Launch(error))
        }
        Err(error) => Err(ResumeError::Launch(error)),
    }
}

/// `begin_us` is when the process was started, at the earliest.
fn told(info: &VmInfo, checkpoint: Uuid, begin_us: i64) -> Result<Resumed, ResumeError> {
    match &info.resume {
        Some(resume) if resume.checkpoint == checkpoint => Ok(Resumed {
            info: resume.clone(),
            first_instruction_us: begin_us.saturating_add(i64::try_from(resume.start_us).unwrap_or(0)),
        }),
        Some(resume) => Err(ResumeError::Silent(format!(
            "it goes on from checkpoint {}",
            resume.checkpoint
        ))),
        None => Err(ResumeError::Silent("it tells of no checkpoint".to_owned())),
    }
}
