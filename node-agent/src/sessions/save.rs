//! Saving: the key, the space, the save itself, and taking it back.

use std::time::Duration;

use understudy_api::Guest;
use understudy_vmm_control::client::ClientError;
use understudy_vmm_control::config::VmConfig;
use understudy_vmm_control::owner::Owner;
use understudy_vmm_control::session::{
    CancelSave, KeepSaved, PauseForSave, SaveInfo, SaveRequest, SaveState,
};
use uuid::Uuid;

use super::estimate::{SPARE, space_bytes};
use super::record::{Record, Standing, VERSION};
use super::{SessionError, Sessions};
use crate::credentials::{Identity, Secret};
use crate::durable::{self, DurableError};
use crate::guests::resolve;
use crate::host;
use crate::node::Node;
use crate::store::Object;
use crate::vmm::Instance;

/// How long the final pause of a save should be at most. A further round costs the guest nothing while it runs, so
/// that little is asked for; rounds that shrink no more end all the same.
const TARGET_PAUSE: Duration = Duration::from_millis(30);

/// The VMM of a guest that may have a session to save: it owns the guest, and its process runs.
pub fn running(node: &Node, guest: &Guest) -> Option<Instance> {
    let resolved = resolve(&node.config, guest, host::cpus(), host::total_memory_mib()).ok()?;
    let owner = Owner::read(&resolved.state_dir()).ok()??;
    node.instances
        .get(&resolved.uid, owner.incarnation)
        .filter(Instance::is_alive)
}

/// Which of the guests with this much memory have no space for their sessions, with what is missing for
/// all of them: a problem for each, in the same order.
pub fn check_space(sessions: &Sessions, memory: &[u64]) -> Result<Vec<Option<String>>, SessionError> {
    let directory = sessions.records.dir();
    durable::make_dir(directory)?;
    let free = host::free_bytes(directory).map_err(|source| DurableError::Io {
        action: "looking for free space on",
        path: directory.to_owned(),
        source,
    })?;
    let needed = memory.iter().map(|bytes| space_bytes(*bytes)).sum::<u64>() + SPARE;
    let mut left = free.saturating_sub(SPARE);
    Ok(memory
        .iter()
        .map(|bytes| {
            let space = space_bytes(*bytes);
            let fits = space <= left;
            left = left.saturating_sub(space);
            (!fits).then(|| {
                SessionError::Space {
                    directory: directory.to_owned(),
                    missing_mib: (needed.saturating_sub(free) >> 20).max(1),
                }
                .to_string()
            })
        })
        .collect())
}

/// Makes a fresh key for a checkpoint, registers it with the credential provider, durably, and puts it
/// where the VMM reads it. The record of the checkpoint comes first. Asked again it makes another key.
pub fn register_key(
    node: &Node,
    guest: &Guest,
    checkpoint: Uuid,
    node_update: &str,
    provider: Option<&str>,
) -> Result<(), SessionError> {
    let sessions = &node.sessions;
    let (name, uid) = (guest.key().to_string(), guest.uid());
    if sessions.machine_id().is_empty() {
        return Err(SessionError::NoMachineId);
    }
    let instance = running(node, guest).ok_or_else(|| SessionError::NotRunning(name.clone()))?;
    let config: VmConfig =
        durable::read_json(&instance.config)?.ok_or_else(|| SessionError::NoConfiguration(name.clone()))?;
    let identity = Identity {
        guest_uid: uid,
        machine_id: sessions.machine_id().to_owned(),
        boot_id: sessions.boot_id().to_owned(),
        checkpoint,
        node_update: node_update.to_owned(),
    };
    sessions.records.put(&Record {
        version: VERSION,
        identity: identity.clone(),
        guest: name,
        node_update: node_update.to_owned(),
        provider: provider.map(str::to_owned),
        instance,
        config,
    })?;
    renew_key(sessions, &identity, provider)
}

fn renew_key(sessions: &Sessions, identity: &Identity, provider: Option<&str>) -> Result<(), SessionError> {
    let secret = Secret::generate()?;
    sessions.credentials.register(provider, identity, &secret)?;
    sessions.keys.put(identity.checkpoint, &secret)?;
    Ok(())
}

/// Begins a save whose key is registered, or tells how far it is. The key's file is taken away once the VMM
/// has read it.
pub fn save(
    node: &Node,
    guest_uid: &str,
    checkpoint: Uuid,
    lease: Duration,
) -> Result<SaveInfo, SessionError> {
    let sessions = &node.sessions;
    let record = find(sessions, guest_uid, checkpoint)?;
    let client = record.vmm(&node.instances).client();
    match client.save() {
        Ok(info) if info.checkpoint == checkpoint => {
            if info.state != SaveState::PreCopying || info.written_bytes > 0 {
                sessions.keys.take_away(checkpoint);
            }
            return Ok(info);
        }
        Ok(info) if !matches!(info.state, SaveState::Failed | SaveState::Cancelled) => {
            return Err(SessionError::OtherSave {
                guest: record.guest,
                other: info.checkpoint,
            });
        }
        Ok(_) => {}
        Err(error) if is_absent(&error) => {}
        Err(source) => return Err(vmm_error(&record, source)),
    }
    if !sessions.keys.has(checkpoint) {
        renew_key(sessions, &record.identity, record.provider.as_deref())?;
    }
    let directory = sessions.records.directory(guest_uid, checkpoint);
    durable::make_dir(&directory)?;
    let info = client
        .begin_save(&SaveRequest {
            checkpoint,
            directory,
            key: sessions.keys.path(checkpoint),
            guest_uid: guest_uid.to_owned(),
            host_boot_id: sessions.boot_id().to_owned(),
            machine_id: sessions.machine_id().to_owned(),
            target_pause_ms: millis(TARGET_PAUSE),
            hold: true,
            lease_ms: millis(lease),
        })
        .map_err(|source| vmm_error(&record, source))?;
    tracing::info!(guest = record.guest, %checkpoint, "saving its session");
    Ok(info)
}

/// Lets a save pause its guest, which it holds back until then.
pub fn pause(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<SaveInfo, SessionError> {
    let record = find(&node.sessions, guest_uid, checkpoint)?;
    let asked = record
        .vmm(&node.instances)
        .client()
        .pause_for_save(&PauseForSave { checkpoint });
    asked.map_err(|source| vmm_error(&record, source))
}

/// Renews the lease of a saved guest.
pub fn keep(
    node: &Node,
    guest_uid: &str,
    checkpoint: Uuid,
    lease: Duration,
) -> Result<SaveInfo, SessionError> {
    let record = find(&node.sessions, guest_uid, checkpoint)?;
    let asked = record.vmm(&node.instances).client().keep_saved(&KeepSaved {
        checkpoint,
        lease_ms: millis(lease),
    });
    asked.map_err(|source| vmm_error(&record, source))
}

/// What became of a save that was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The guest runs, and the checkpoint is void.
    RunsOn,
    /// Its VMM is gone.
    Gone,
}

/// Takes a save back: the guest runs on. Idempotent; files and key are left.
pub fn cancel(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<Cancelled, SessionError> {
    let sessions = &node.sessions;
    let Some(record) = sessions.records.get(guest_uid, checkpoint)? else {
        return Ok(Cancelled::RunsOn);
    };
    if !record.vmm(&node.instances).is_alive() {
        return Ok(Cancelled::Gone);
    }
    let client = record.vmm(&node.instances).client();
    match client.save() {
        Ok(info) if info.checkpoint == checkpoint => {
            client
                .cancel_save(&CancelSave { checkpoint })
                .map_err(|source| vmm_error(&record, source))?;
        }
        // It was never asked to save this one, or has forgotten it for another.
        Ok(_) => {}
        Err(error) if is_absent(&error) => {}
        Err(source) => return Err(vmm_error(&record, source)),
    }
    if sessions.records.standing(&record)? == Standing::Saved {
        // It says that it runs on, and its manifest is there: not to be resumed by anybody.
        return Err(SessionError::OtherSave {
            guest: record.guest,
            other: checkpoint,
        });
    }
    sessions.keys.take_away(checkpoint);
    tracing::info!(guest = record.guest, %checkpoint, "its save was taken back");
    Ok(Cancelled::RunsOn)
}

pub(super) fn find(sessions: &Sessions, guest_uid: &str, checkpoint: Uuid) -> Result<Record, SessionError> {
    sessions
        .records
        .get(guest_uid, checkpoint)?
        .ok_or_else(|| SessionError::Unknown {
            guest_uid: guest_uid.to_owned(),
            checkpoint,
        })
}

/// 404: no save was asked for.
fn is_absent(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { status: 404, .. })
}

fn vmm_error(record: &Record, source: ClientError) -> SessionError {
    SessionError::Vmm {
        guest: record.guest.clone(),
        source,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
