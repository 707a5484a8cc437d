//! Starting a guest's VMM: the first start, a cold boot, and the configuration that both and the clone share.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use understudy_vmm_control::API_VERSION;
use understudy_vmm_control::config::{DiskRole, Network, Paths, Role, VmConfig, Vsock};
use understudy_vmm_control::owner::{OWNER_VERSION, Owner, OwnerError, lock_path, state_dir};
use uuid::Uuid;

use super::resolve::Resolved;
use crate::durable::{self, DurableError};
use crate::host;
use crate::network::{NetworkError, ensure_tap};
use crate::node::Node;
use crate::vmm::{Instance, LaunchError, Layout};

/// Context ID of every guest: the vsock device is a socket of its VMM's own, so that guests share no
/// address space.
const GUEST_CID: u64 = 3;

/// Why a guest was not started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The fence could not be read or written.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// A file could not be made.
    #[error(transparent)]
    File(#[from] DurableError),
    /// A tap could not be made ready.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The VMM did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Somebody holds the fence's lock.
    #[error(
        "disk {disk} is in use: another VMM holds {lock}; stop the guest that uses it, or name another disk"
    )]
    InUse {
        /// The disk.
        disk: PathBuf,
        /// The lock.
        lock: PathBuf,
    },
    /// The lock could not be tried.
    #[error("locking {lock}: {source}")]
    Lock {
        /// The lock.
        lock: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not now.
    #[error(
        "memory: {wanted} MiB are needed, {available} MiB are available on this node (beside {reserved} MiB kept for the host); stop something or ask for less"
    )]
    Memory {
        /// What the guest asks for.
        wanted: u64,
        /// What is there.
        available: u64,
        /// What is kept for the host.
        reserved: u64,
    },
}

/// Memory for one more VMM of this guest.
pub fn check_memory(node: &Node, wanted: u64) -> Result<(), BootError> {
    let reserved = node.config.reserved_memory_mib;
    let available = host::available_memory_mib();
    if wanted + reserved > available {
        return Err(BootError::Memory {
            wanted,
            available,
            reserved,
        });
    }
    Ok(())
}

/// Starts the guest on what `owner.json` names, as the next incarnation. No VMM of the guest runs.
pub fn cold_boot(node: &Node, guest: &Resolved) -> Result<Instance, BootError> {
    check_memory(node, guest.memory_mib)?;
    for nic in &guest.networks {
        ensure_tap(&nic.tap, &nic.bridge)?;
    }
    for disk in guest.disks.iter().filter(|disk| !disk.read_only) {
        durable::make_dir(&state_dir(&disk.source))?;
    }
    let owner = next_owner(&guest.root().source)?;
    let incarnation = owner.incarnation;
    tracing::info!(guest = %guest.key, incarnation, "cold boot");
    let layout = Layout::new(&node.config, &guest.key, &guest.uid, incarnation);
    let mut instance = Instance {
        guest_uid: guest.uid.clone(),
        incarnation,
        role: Role::Active,
        config: node
            .instances
            .dir(&guest.uid)
            .join(format!("{incarnation}.vmm.json")),
        control: layout.control(),
        log: layout.log(),
        layer: None,
        operation: None,
        unit: node.launcher.unit(&guest.key, incarnation),
        process: None,
    };
    let config = vm_config(guest, &layout, incarnation, Role::Active, None, Vec::new());
    node.launcher.start(&node.instances, &mut instance, &config)?;
    Ok(instance)
}

/// Raises epoch and incarnation in `owner.json` under the lock that every VMM of the disk holds.
fn next_owner(root: &Path) -> Result<Owner, BootError> {
    let directory = state_dir(root);
    let _lock = lock(root)?;
    let owner = match Owner::read(&directory)? {
        Some(owner) => Owner {
            epoch: owner.epoch + 1,
            incarnation: owner.incarnation + 1,
            ..owner
        },
        None => Owner {
            version: OWNER_VERSION,
            epoch: 1,
            incarnation: 1,
            layer: None,
        },
    };
    owner.replace(&directory)?;
    Ok(owner)
}

/// Takes the fence's lock, which a VMM that owns the guest holds.
fn lock(root: &Path) -> Result<File, BootError> {
    let lock = lock_path(&state_dir(root));
    let failed = |source| BootError::Lock {
        lock: lock.clone(),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(BootError::InUse {
            disk: root.to_owned(),
            lock,
        }),
        Err(error) => Err(failed(error.into())),
    }
}

/// The configuration of one incarnation's VMM.
pub fn vm_config(
    guest: &Resolved,
    layout: &Layout,
    incarnation: u64,
    role: Role,
    layer: Option<Uuid>,
    clone_oem_strings: Vec<String>,
) -> VmConfig {
    let mut disks = guest.disks.clone();
    for disk in disks.iter_mut().filter(|disk| disk.role == DiskRole::Root) {
        disk.layer = layer;
    }
    VmConfig {
        version: API_VERSION,
        guest: guest.key.to_string(),
        uuid: guest.uuid,
        incarnation,
        role,
        cpus: guest.cpus,
        memory_mib: guest.memory_mib,
        boot: guest.boot.clone(),
        disks,
        networks: guest
            .networks
            .iter()
            .enumerate()
            .map(|(index, nic)| Network {
                mac: nic.mac.clone(),
                tap: nic.tap.clone(),
                isolated_peer: (role == Role::Clone).then(|| layout.isolated(index)),
            })
            .collect(),
        vsock: Vsock {
            cid: GUEST_CID,
            socket: layout.vsock(),
        },
        clone_oem_strings,
        resume: None,
        paths: Paths {
            control: layout.control(),
            handover: layout.handover(),
            console: layout.console(),
            platform: guest.state_dir().join("platform.json"),
        },
    }
}

/// Removes all files of a layer: they begin with its UUID.
pub fn remove_layer(state_dir: &Path, layer: Uuid) -> Result<(), DurableError> {
    let prefix = format!("{layer}.");
    let Ok(entries) = fs::read_dir(state_dir) else {
        return Ok(());
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let ours = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&prefix));
        if ours {
            durable::remove(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cold_boot_raises_epoch_and_incarnation_and_stays_on_the_layer() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("web.img");
        fs::create_dir(state_dir(&root)).unwrap();
        let first = next_owner(&root).unwrap();
        assert_eq!((first.epoch, first.incarnation, first.layer), (1, 1, None));
        let layer = Some(Uuid::new_v4());
        Owner { layer, ..first }.replace(&state_dir(&root)).unwrap();
        let second = next_owner(&root).unwrap();
        assert_eq!((second.epoch, second.incarnation, second.layer), (2, 2, layer));
    }

    #[test]
    fn a_disk_that_another_vmm_holds_is_refused_and_its_owner_record_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("web.img");
        fs::create_dir(state_dir(&root)).unwrap();
        let owner = next_owner(&root).unwrap();
        let held = lock(&root).unwrap();
        let error = next_owner(&root).unwrap_err().to_string();
        assert!(error.contains("web.img is in use"), "{error}");
        assert_eq!(Owner::read(&state_dir(&root)).unwrap(), Some(owner));
        drop(held);
        next_owner(&root).unwrap();
    }

    #[test]
    fn removing_a_layer_leaves_every_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let (gone, kept) = (Uuid::new_v4(), Uuid::new_v4());
        for name in [
            format!("{gone}.layer"),
            format!("{gone}.map"),
            format!("{kept}.layer"),
            "owner.json".into(),
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_layer(dir.path(), gone).unwrap();
        remove_layer(dir.path(), gone).unwrap();
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2);
    }
}
