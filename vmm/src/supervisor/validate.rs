//! Checks of a configuration before anything is opened. Each error names the field.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use understudy_vmm_control::API_VERSION;
use understudy_vmm_control::config::{Boot, Disk, DiskRole, Role, VmConfig};

/// Most vCPUs of a guest.
const MAX_CPUS: u8 = 64;
/// Longest path of a Unix socket.
const MAX_SOCKET_PATH: usize = 107;

/// Why a configuration cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("reading the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The file is not a configuration.
    #[error("{path} is not a VMM configuration: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A field has a value that cannot be.
    #[error("{field}: {reason}")]
    Field {
        /// The field, such as `disks[0].source`.
        field: String,
        /// What is wrong with it and what would do.
        reason: String,
    },
}

fn field(field: impl Into<String>, reason: impl Into<String>) -> ConfigError {
    ConfigError::Field {
        field: field.into(),
        reason: reason.into(),
    }
}

/// Reads and checks the configuration at `path`.
pub fn read(path: &Path) -> Result<VmConfig, ConfigError> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let text = fs::read(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    let malformed = |error: serde_json::Error| ConfigError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    // The version first: a newer one may have fields that this one does not know.
    let Versioned { version } = serde_json::from_slice(&text).map_err(malformed)?;
    if version != API_VERSION {
        return Err(field(
            "version",
            format!(
                "{version} is unknown to this VMM, which knows {API_VERSION}; use the VMM that came with the agent"
            ),
        ));
    }
    let config = serde_json::from_slice(&text).map_err(malformed)?;
    check(&config)?;
    Ok(config)
}

fn check(config: &VmConfig) -> Result<(), ConfigError> {
    let online = std::thread::available_parallelism().map_or(MAX_CPUS as usize, usize::from);
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        return Err(field(
            "cpus",
            format!("{} is not within 1 to {MAX_CPUS}", config.cpus),
        ));
    }
    if usize::from(config.cpus) > online {
        return Err(field(
            "cpus",
            format!(
                "{} vCPUs asked for, but this process may use {online} CPUs of the host; ask for {online} or less",
                config.cpus
            ),
        ));
    }
    if config.vsock.cid < 3 || config.vsock.cid >= u64::from(u32::MAX) {
        return Err(field(
            "vsock.cid",
            format!("{} is reserved; use 3 to {}", config.vsock.cid, u32::MAX - 1),
        ));
    }
    check_disks(&config.disks)?;
    check_networks(config)?;
    if config.resume.is_some() && config.role != Role::Active {
        return Err(field(
            "resume",
            "a session is resumed by the owner of its guest; set role to Active",
        ));
    }
    // A session that is resumed needs no kernel until the guest resets itself.
    if let (Boot::Files { kernel, initrd, .. }, None) = (&config.boot, &config.resume) {
        check_file("boot.files.kernel", kernel)?;
        if let Some(initrd) = initrd {
            check_file("boot.files.initrd", initrd)?;
        }
    }
    let paths = &config.paths;
    for (name, path, socket) in [
        ("paths.control", &paths.control, true),
        ("paths.handover", &paths.handover, true),
        ("paths.console", &paths.console, false),
        ("paths.platform", &paths.platform, false),
        ("vsock.socket", &config.vsock.socket, true),
    ] {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if !parent.is_some_and(Path::is_dir) {
            return Err(field(
                name,
                format!(
                    "the directory of {} does not exist; create it, or give an absolute path",
                    path.display()
                ),
            ));
        }
        let length = path.as_os_str().len();
        if socket && length > MAX_SOCKET_PATH {
            return Err(field(
                name,
                format!(
                    "{} has {length} bytes, but a Unix socket's path takes {MAX_SOCKET_PATH}",
                    path.display()
                ),
            ));
        }
    }
    Ok(())
}

fn check_disks(disks: &[Disk]) -> Result<(), ConfigError> {
    let mut names = BTreeSet::new();
    for (index, disk) in disks.iter().enumerate() {
        if disk.name.is_empty() || disk.name.contains(['/', '\0']) {
            return Err(field(
                format!("disks[{index}].name"),
                format!("{:?} is not a name; use letters, digits and dashes", disk.name),
            ));
        }
        if !names.insert(&disk.name) {
            return Err(field(
                format!("disks[{index}].name"),
                format!("{:?} is the name of another disk too", disk.name),
            ));
        }
        check_file(&format!("disks[{index}].source"), &disk.source)?;
    }
    let roots = disks.iter().filter(|disk| disk.role == DiskRole::Root).count();
    if roots != 1 {
        return Err(field(
            "disks",
            format!("{roots} disks have the role Root; a guest has exactly one"),
        ));
    }
    Ok(())
}

fn check_networks(config: &VmConfig) -> Result<(), ConfigError> {
    let mut macs = BTreeSet::new();
    for (index, network) in config.networks.iter().enumerate() {
        let octets: Vec<Option<u8>> = network
            .mac
            .split(':')
            .map(|octet| u8::from_str_radix(octet, 16).ok().filter(|_| octet.len() == 2))
            .collect();
        let unicast = octets
            .first()
            .copied()
            .flatten()
            .is_some_and(|first| first & 1 == 0);
        if octets.len() != 6 || octets.contains(&None) || !unicast {
            return Err(field(
                format!("networks[{index}].mac"),
                format!(
                    "{:?} is not a unicast address such as 52:54:00:12:34:56",
                    network.mac
                ),
            ));
        }
        if !macs.insert(octets) {
            return Err(field(
                format!("networks[{index}].mac"),
                format!("{} is the address of another interface too", network.mac),
            ));
        }
    }
    Ok(())
}

fn check_file(name: &str, path: &Path) -> Result<(), ConfigError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(field(
            name,
            format!("{} is a directory; name a file", path.display()),
        )),
        Ok(_) => Ok(()),
        Err(error) => Err(field(
            name,
            format!("{} cannot be opened: {error}; check the path", path.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A valid configuration in `dir`, changed by `change`.
    fn read_changed(change: impl FnOnce(&mut Value)) -> Result<VmConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::write(dir.path().join("disk.raw"), b"x").unwrap();
        fs::write(dir.path().join("vmlinuz"), b"x").unwrap();
        let mut config = json!({
            "version": API_VERSION,
            "guest": "default/web",
            "uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "incarnation": 1,
            "role": "Active",
            "cpus": 1,
            "memoryMib": 64,
            "boot": { "files": { "kernel": at("vmlinuz"), "initrd": null, "cmdline": "" } },
            "disks": [{ "name": "root", "role": "Root", "source": at("disk.raw") }],
            "networks": [{ "mac": "52:54:00:00:00:01", "tap": "tap0", "isolatedPeer": null }],
            "vsock": { "cid": 3, "socket": at("vsock.sock") },
            "paths": {
                "control": at("control.sock"),
                "handover": at("handover.sock"),
                "console": at("console.log"),
                "platform": at("platform.json"),
            },
        });
        change(&mut config);
        let path = dir.path().join("config.json");
        fs::write(&path, config.to_string()).unwrap();
        read(&path)
    }

    #[test]
    fn every_bad_field_is_refused_by_its_name() {
        read_changed(|_| {}).unwrap();
        type Case = (&'static str, fn(&mut Value));
        let cases: [Case; 13] = [
            ("version", |c| c["version"] = json!(99)),
            ("cpus", |c| c["cpus"] = json!(0)),
            ("cpus", |c| c["cpus"] = json!(65)),
            ("disks[0].source", |c| {
                c["disks"][0]["source"] = json!("/nonexistent")
            }),
            ("disks", |c| c["disks"] = json!([])),
            ("disks[0].name", |c| c["disks"][0]["name"] = json!("")),
            ("networks[0].mac", |c| {
                c["networks"][0]["mac"] = json!("53:54:00:00:00:01")
            }),
            ("networks[0].mac", |c| c["networks"][0]["mac"] = json!("52:54:00")),
            ("vsock.cid", |c| c["vsock"]["cid"] = json!(2)),
            ("paths.console", |c| {
                c["paths"]["console"] = json!("/nonexistent/log")
            }),
            ("boot.files.kernel", |c| {
                c["boot"]["files"]["kernel"] = json!("/nonexistent")
            }),
            ("guest", |c| {
                c.as_object_mut().unwrap().remove("guest");
            }),
            ("colour", |c| c["colour"] = json!("red")),
        ];
        for (name, change) in cases {
            let error = read_changed(change).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
