//! From a Guest's spec to what this node shall run: paths, taps, addresses, with the node's policy applied.
//! What cannot be run is refused with the field's name and what would do.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use understudy_api::Guest;
use understudy_api::guest::DiskRole;
use understudy_api::quantity;
use understudy_vmm_control::config;
use understudy_vmm_control::owner::state_dir;
use uuid::Uuid;

use crate::config::Config;
use crate::network::{derived_mac, tap_name};
use crate::store::{Key, Object};

/// A Guest as this node runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Namespace and name.
    pub key: Key,
    /// UID of the Guest.
    pub uid: String,
    /// SMBIOS system UUID, made from the UID: the same in every incarnation.
    pub uuid: Uuid,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Kernel.
    pub boot: config::Boot,
    /// Disks, without layers.
    pub disks: Vec<config::Disk>,
    /// Interfaces.
    pub networks: Vec<Nic>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Bridge on the node.
    pub bridge: String,
    /// Tap on the node.
    pub tap: String,
    /// MAC address.
    pub mac: String,
}

impl Resolved {
    /// The root disk.
    pub fn root(&self) -> &config::Disk {
        self.disks
            .iter()
            .find(|disk| disk.role == config::DiskRole::Root)
            .unwrap_or(&self.disks[0])
    }

    /// State directory of the root disk: the guest's fence.
    pub fn state_dir(&self) -> PathBuf {
        state_dir(&self.root().source)
    }
}

/// Why a Guest cannot be run here as it is declared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct SpecError {
    /// The field of the Guest.
    pub field: String,
    /// What is wrong and what would do.
    pub message: String,
}

fn wrong(field: impl Into<String>, message: impl Into<String>) -> SpecError {
    SpecError {
        field: field.into(),
        message: message.into(),
    }
}

/// Resolves `guest` on this node, which has `host_cpus` CPUs and `host_memory_mib` of memory in all.
pub fn resolve(
    config: &Config,
    guest: &Guest,
    host_cpus: usize,
    host_memory_mib: u64,
) -> Result<Resolved, SpecError> {
    let (key, uid) = (guest.key(), guest.uid());
    let spec = &guest.spec;
    let cpus = u8::try_from(spec.cpus)
        .ok()
        .filter(|cpus| (1..=64).contains(cpus))
        .ok_or_else(|| wrong("spec.cpus", format!("{} is not within 1 to 64", spec.cpus)))?;
    if usize::from(cpus) > host_cpus {
        return Err(wrong(
            "spec.cpus",
            format!("{cpus} asked for, this node has {host_cpus}; ask for {host_cpus} or less"),
        ));
    }
    let memory_mib = quantity::mebibytes(&spec.memory).ok_or_else(|| {
        wrong(
            "spec.memory",
            format!("{:?} is not a quantity such as 512Mi", spec.memory),
        )
    })?;
    let usable = host_memory_mib.saturating_sub(config.reserved_memory_mib);
    if memory_mib > usable {
        return Err(wrong(
            "spec.memory",
            format!(
                "{memory_mib}Mi asked for, this node has {host_memory_mib}Mi of which guests may use {usable}Mi; ask for less"
            ),
        ));
    }
    let mut disks = Vec::new();
    for (index, disk) in spec.disks.iter().enumerate() {
        let source = host_file(
            config,
            &key,
            &format!("spec.disks[{index}].source"),
            &disk.source,
            true,
        )?;
        disks.push(config::Disk {
            name: disk.name.clone(),
            role: match disk.role {
                DiskRole::Root => config::DiskRole::Root,
                DiskRole::Data => config::DiskRole::Data,
            },
            source,
            read_only: disk.read_only,
            layer: None,
        });
    }
    if disks
        .iter()
        .filter(|disk| disk.role == config::DiskRole::Root)
        .count()
        != 1
    {
        return Err(wrong("spec.disks", "exactly one disk must have the role Root"));
    }
    Ok(Resolved {
        uuid: Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("guest/{uid}").as_bytes()),
        boot: boot(config, &key, guest)?,
        networks: networks(config, &key, guest)?,
        key,
        uid,
        cpus,
        memory_mib,
        disks,
    })
}

fn boot(config: &Config, key: &Key, guest: &Guest) -> Result<config::Boot, SpecError> {
    let boot = &guest.spec.boot;
    let Some(kernel) = &boot.kernel else {
        return Ok(config::Boot::FromDisk {});
    };
    let initrd = match &boot.initrd {
        Some(initrd) => Some(host_file(config, key, "spec.boot.initrd", initrd, false)?),
        None => None,
    };
    Ok(config::Boot::Files {
        kernel: host_file(config, key, "spec.boot.kernel", kernel, false)?,
        initrd,
        cmdline: boot.cmdline.clone().unwrap_or_default(),
    })
}

fn networks(config: &Config, key: &Key, guest: &Guest) -> Result<Vec<Nic>, SpecError> {
    let (policy, uid) = (config.policy(&key.namespace), guest.uid());
    let mut nics = Vec::new();
    for (index, network) in guest.spec.networks.iter().enumerate() {
        let field = format!("spec.networks[{index}].bridge");
        if !policy.bridges.contains(&network.bridge) {
            let allowed = match policy.bridges.is_empty() {
                true => "none is allowed".to_owned(),
                false => format!("allowed are {}", policy.bridges.join(", ")),
            };
            return Err(wrong(
                field,
                format!(
                    "bridge {:?} is not allowed for namespace {:?} ({allowed}); an administrator may add it to namespaces.{}.bridges in the node's configuration",
                    network.bridge, key.namespace, key.namespace
                ),
            ));
        }
        nics.push(Nic {
            bridge: network.bridge.clone(),
            tap: tap_name(&uid, index),
            mac: network
                .mac
                .as_ref()
                .map_or_else(|| derived_mac(&uid, index), |mac| mac.to_ascii_lowercase()),
        });
    }
    Ok(nics)
}

/// The file on the host that `source` names, with symbolic links followed: beneath the namespace's own
/// directory, or where the node's configuration allows it.
fn host_file(
    config: &Config,
    key: &Key,
    field: &str,
    source: &str,
    disk: bool,
) -> Result<PathBuf, SpecError> {
    let own = config.disks_dir.join(&key.namespace);
    let path = Path::new(source);
    let named = if path.is_absolute() {
        path.to_owned()
    } else {
        if !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(wrong(
                field,
                format!("{source:?} must not lead out of {}", own.display()),
            ));
        }
        own.join(path)
    };
    let allowed = config.policy(&key.namespace).paths;
    let denied = |what: &str| {
        wrong(
            field,
            format!(
                "{what} is outside of {}, and not allowed for namespace {:?}; an administrator may add it to namespaces.{}.paths in the node's configuration",
                own.display(),
                key.namespace,
                key.namespace
            ),
        )
    };
    // Asked before the file is looked at, so that nobody learns which files of others exist.
    if path.is_absolute() && !is_beneath(path, &own) && !allowed.iter().any(|there| is_beneath(path, there)) {
        return Err(denied(&format!("{source:?}")));
    }
    let real = match fs::canonicalize(&named) {
        Ok(real) => real,
        Err(error) => {
            return Err(wrong(
                field,
                format!(
                    "{} cannot be opened ({error}); put the file there, or name another one",
                    named.display()
                ),
            ));
        }
    };
    let really_beneath = |there: &Path| {
        fs::canonicalize(there).is_ok_and(|there| is_beneath(&real, &there)) || is_beneath(&real, there)
    };
    if !really_beneath(&own) && !allowed.iter().any(|there| really_beneath(there)) {
        return Err(denied(&format!("{source:?} ({})", real.display())));
    }
    let metadata = fs::metadata(&real)
        .map_err(|error| wrong(field, format!("{} cannot be opened ({error})", real.display())))?;
    let kind = metadata.file_type();
    let fits = kind.is_file() || (disk && kind.is_block_device());
    if !fits {
        return Err(wrong(
            field,
            format!("{} is not a regular file; name a raw image", real.display()),
        ));
    }
    if disk && kind.is_file() && (metadata.len() == 0 || metadata.len() % 512 != 0) {
        return Err(wrong(
            field,
            format!(
                "{} has {} bytes, which is no raw disk image (a multiple of 512, above 0)",
                real.display(),
                metadata.len()
            ),
        ));
    }
    Ok(real)
}

fn is_beneath(path: &Path, directory: &Path) -> bool {
    path.starts_with(directory) && !path.components().any(|part| part == Component::ParentDir)
}

#[cfg(test)]
#[path = "resolve_test.rs"]
mod tests;
