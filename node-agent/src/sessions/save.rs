//! Saving: preflight, begin, follow, keep, take back.

use std::time::Duration;

use understudy_api::Guest;
use understudy_vmm_control::api::VmState;
use understudy_vmm_control::client::ClientError;
use understudy_vmm_control::config::VmConfig;
use understudy_vmm_control::owner::Owner;
use understudy_vmm_control::session::{CancelSave, KeepSaved, SaveInfo, SaveRequest, SaveState};
use uuid::Uuid;

use super::record::{Record, Saved, Standing, VERSION};
use super::{SessionError, estimate, lock};
use crate::credentials::{HandedKey, Identity, Secret, check_memory_only};
use crate::durable;
use crate::guests::resolve;
use crate::host;
use crate::node::Node;
use crate::store::{Key, Object};
use crate::vmm::Instance;

/// How long the final pause of a save should be at most.
const TARGET_PAUSE: Duration = Duration::from_millis(300);

/// The VMM of a guest that has a session to save: it owns the guest and has not ended.
pub(super) fn running(node: &Node, guest: &Guest) -> Option<Instance> {
    let resolved = resolve(&node.config, guest, host::cpus(), host::total_memory_mib()).ok()?;
    let owner = Owner::read(&resolved.state_dir()).ok()??;
    node.instances
        .get(&resolved.uid, owner.incarnation)
        .filter(Instance::is_alive)
}

/// Whether a guest has a session to save.
pub fn runs(node: &Node, guest: &Guest) -> Result<Option<Instance>, SessionError> {
    let Some(instance) = running(node, guest) else {
        return Ok(None);
    };
    let info = instance.client().info().map_err(|source| SessionError::Vmm {
        guest: guest.key().to_string(),
        source,
    })?;
    Ok((!matches!(info.state, VmState::Exited | VmState::Dormant)).then_some(instance))
}

/// What must hold before any guest is paused: the credential provider works, keys stay in memory, there is
/// space for every session.
pub fn preflight(node: &Node, provider: Option<&str>) -> Result<(), SessionError> {
    let sessions = &node.sessions;
    if sessions.machine_id.is_empty() {
        return Err(SessionError::NoMachineId);
    }
    sessions.credentials.provider(provider)?.ready()?;
    check_memory_only(&sessions.run_dir)?;
    let directory = sessions.records.dir();
    durable::make_dir(directory)?;
    let needed = estimate(node).space_bytes;
    let free = host::free_bytes(directory).map_err(|source| durable::DurableError::Io {
        action: "looking for free space on",
        path: directory.to_owned(),
        source,
    })?;
    if needed > free {
        return Err(SessionError::Space {
            directory: directory.to_owned(),
            needed_mib: needed >> 20,
            free_mib: free >> 20,
        });
    }
    Ok(())
}

/// Begins to save a guest's session, or finds that it has begun: a fresh key is registered with the
/// credential provider, durably, before anything is written. Idempotent for a checkpoint.
pub fn begin(
    node: &Node,
    guest: &Guest,
    checkpoint: Uuid,
    node_update: &str,
    provider: Option<&str>,
    lease: Duration,
) -> Result<SaveInfo, SessionError> {
    let sessions = &node.sessions;
    let (key, uid) = (guest.key(), guest.uid());
    let failed = vmm_error(&key);
    let instance = runs(node, guest)?.ok_or_else(|| SessionError::NotRunning(key.to_string()))?;
    let client = instance.client();
    match client.save() {
        Ok(info) if info.checkpoint == checkpoint => return Ok(info),
        Ok(info) if !matches!(info.state, SaveState::Failed | SaveState::Cancelled) => {
            return Err(SessionError::OtherSave {
                guest: key.to_string(),
                other: info.checkpoint,
            });
        }
        Ok(_) => {}
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(failed(error)),
    }
    let config: VmConfig = durable::read_json(&instance.config)?
        .ok_or_else(|| SessionError::NoConfiguration(key.to_string()))?;
    let identity = Identity {
        guest_uid: uid.clone(),
        machine_id: sessions.machine_id.clone(),
        boot_id: sessions.boot_id.clone(),
        checkpoint,
    };
    sessions.records.put(&Record {
        version: VERSION,
        identity: identity.clone(),
        guest: key.to_string(),
        node_update: node_update.to_owned(),
        instance,
        config,
        saved: None,
        refused: None,
    })?;
    let directory = sessions.records.directory(&uid, checkpoint);
    durable::make_dir(&directory)?;
    let secret = Secret::generate()?;
    sessions.credentials.register(provider, &identity, &secret)?;
    let handed = HandedKey::new(&sessions.run_dir, checkpoint, &secret)?;
    let info = client
        .begin_save(&SaveRequest {
            checkpoint,
            directory,
            key: handed.path().to_owned(),
            guest_uid: uid,
            host_boot_id: sessions.boot_id.clone(),
            machine_id: sessions.machine_id.clone(),
            target_pause_ms: millis(TARGET_PAUSE),
            lease_ms: millis(lease),
        })
        .map_err(failed)?;
    tracing::info!(guest = %key, %checkpoint, "saving its session");
    lock(&sessions.handed).insert(checkpoint, handed);
    Ok(info)
}

/// How far a save is. Its key is taken away from the run directory as soon as the VMM has it.
pub fn progress(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<SaveInfo, SessionError> {
    let record = find(node, guest_uid, checkpoint)?;
    let info = record
        .instance
        .client()
        .save()
        .map_err(|source| SessionError::Vmm {
            guest: record.guest.clone(),
            source,
        })?;
    if info.checkpoint != checkpoint {
        return Err(SessionError::OtherSave {
            guest: record.guest,
            other: info.checkpoint,
        });
    }
    if info.state != SaveState::PreCopying || info.written_bytes > 0 {
        lock(&node.sessions.handed).remove(&checkpoint);
    }
    Ok(info)
}

/// Records that a session is saved, durably. `begin_us` is when saving began (CLOCK_BOOTTIME).
pub fn record_saved(
    node: &Node,
    guest_uid: &str,
    info: &SaveInfo,
    begin_us: i64,
) -> Result<(), SessionError> {
    let mut record = find(node, guest_uid, info.checkpoint)?;
    lock(&node.sessions.handed).remove(&info.checkpoint);
    if record.saved.is_none() {
        estimate::measured(node, info.written_bytes, begin_us);
    }
    record.saved = Some(Saved {
        at_us: host::moment().unix_us,
        checkpoint_bytes: info.checkpoint_bytes,
        written_bytes: info.written_bytes,
        rounds: info.rounds,
        pause_us: info.pause_us.unwrap_or(0),
    });
    Ok(node.sessions.records.put(&record)?)
}

/// Renews the lease of a saved guest.
pub fn keep(
    node: &Node,
    guest_uid: &str,
    checkpoint: Uuid,
    lease: Duration,
) -> Result<SaveInfo, SessionError> {
    let record = find(node, guest_uid, checkpoint)?;
    record
        .instance
        .client()
        .keep_saved(&KeepSaved {
            checkpoint,
            lease_ms: millis(lease),
        })
        .map_err(|source| SessionError::Vmm {
            guest: record.guest,
            source,
        })
}

/// What became of a save that was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The guest runs, and nothing is left of the checkpoint.
    RunsOn,
    /// Its VMM is gone, and the checkpoint is complete: it stays, to be resumed after the host's reboot.
    Kept,
    /// Its VMM is gone, and the checkpoint was never complete: the session is lost.
    Lost,
}

/// Takes a save back: the guest runs on. Idempotent.
pub fn cancel(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<Cancelled, SessionError> {
    let sessions = &node.sessions;
    let Some(record) = sessions.records.get(guest_uid, checkpoint)? else {
        return Ok(Cancelled::RunsOn);
    };
    lock(&sessions.handed).remove(&checkpoint);
    let alive = record.instance.is_alive();
    if alive {
        let client = record.instance.client();
        match client.save() {
            Ok(info) if info.checkpoint == checkpoint => {
                client
                    .cancel_save(&CancelSave { checkpoint })
                    .map_err(|source| SessionError::Vmm {
                        guest: record.guest.clone(),
                        source,
                    })?;
            }
            // It was never asked to, or has forgotten it for another one.
            Ok(_) => {}
            Err(error) if is_absent(&error) => {}
            Err(source) => {
                return Err(SessionError::Vmm {
                    guest: record.guest.clone(),
                    source,
                });
            }
        }
    } else if sessions.records.standing(&record)? != Standing::Incomplete {
        return Ok(Cancelled::Kept);
    }
    sessions.destroy(guest_uid, checkpoint)?;
    tracing::info!(guest = record.guest, %checkpoint, alive, "the save was taken back");
    Ok(if alive {
        Cancelled::RunsOn
    } else {
        Cancelled::Lost
    })
}

pub(super) fn find(node: &Node, guest_uid: &str, checkpoint: Uuid) -> Result<Record, SessionError> {
    node.sessions
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

fn vmm_error(key: &Key) -> impl Fn(ClientError) -> SessionError + use<> {
    let guest = key.to_string();
    move |source| SessionError::Vmm {
        guest: guest.clone(),
        source,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
