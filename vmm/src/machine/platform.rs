//! What a guest's platform looked like at its first boot: CPUID and PCI slots, kept in a file so that
//! every incarnation sees the same machine. NIC names come from slots, and programs remember CPU features.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use understudy_vmm_control::config::VmConfig;

use super::cpuid::{self, CpuidError, Leaf};

/// Version of the record.
pub const PLATFORM_VERSION: u32 = 1;

/// Slots by kind of device; the slots between are spare, so that a guest may get more devices without
/// any other one moving.
const RNG_SLOT: u8 = 1;
const VSOCK_SLOT: u8 = 2;
/// The first interface is `enp0s3`, as on other virtual machine monitors.
const NETWORK_SLOTS: std::ops::RangeInclusive<u8> = 3..=14;
const DISK_SLOTS: std::ops::RangeInclusive<u8> = 16..=30;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Platform {
    /// [`PLATFORM_VERSION`].
    pub version: u32,
    /// PCI slot by device name: `rng`, `vsock`, `net-MAC`, `blk-NAME`.
    pub slots: BTreeMap<String, u8>,
    /// CPUID template.
    pub cpuid: Vec<Leaf>,
}

/// Why the platform could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// A file operation failed.
    #[error("paths.platform: {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Not what this version writes.
    #[error(
        "paths.platform: {path} is not a valid platform record ({reason}); restore it, or remove it while the guest is off: then the guest sees new hardware at its next boot"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// More devices than slots.
    #[error("{field}: {count} devices where the machine has {slots} slots for them")]
    NoSlot {
        /// Field of the configuration.
        field: &'static str,
        /// Devices.
        count: usize,
        /// Slots.
        slots: usize,
    },
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
}

/// Name of a network interface's device, by which its slot is recorded.
pub fn network_name(mac: &str) -> String {
    format!("net-{}", mac.to_ascii_lowercase())
}

/// Name of a disk's device.
pub fn disk_name(name: &str) -> String {
    format!("blk-{name}")
}

impl Platform {
    /// Reads the record, or makes it; gives slots to devices that have none, and records them.
    pub fn settle(config: &VmConfig, kvm: &Kvm) -> Result<Platform, PlatformError> {
        let path = &config.paths.platform;
        let offered = cpuid::template(kvm)?;
        let recorded = Platform::read(path)?;
        let mut platform = match recorded.clone() {
            Some(mut platform) => {
                // An earlier version may have recorded more than a guest shall see.
                cpuid::withhold(&mut platform.cpuid);
                cpuid::check_recorded(&platform.cpuid, &offered)?;
                platform
            }
            None => Platform {
                version: PLATFORM_VERSION,
                slots: BTreeMap::new(),
                cpuid: offered,
            },
        };
        platform.slots.insert("rng".to_owned(), RNG_SLOT);
        platform.slots.insert("vsock".to_owned(), VSOCK_SLOT);
        let networks = config.networks.iter().map(|network| network_name(&network.mac));
        platform.place("networks", networks.collect(), NETWORK_SLOTS)?;
        let disks = config.disks.iter().map(|disk| disk_name(&disk.name));
        platform.place("disks", disks.collect(), DISK_SLOTS)?;
        if recorded.as_ref() != Some(&platform) {
            platform.write(path)?;
        }
        Ok(platform)
    }

    /// Slot of a device that the configuration names.
    pub fn slot(&self, device: &str) -> Option<u8> {
        self.slots.get(device).copied()
    }

    /// Devices keep the slots they have; new ones take the lowest free slot. Slots of devices that are
    /// gone are given away last.
    fn place(
        &mut self,
        field: &'static str,
        names: Vec<String>,
        slots: std::ops::RangeInclusive<u8>,
    ) -> Result<(), PlatformError> {
        if names.len() > slots.clone().count() {
            return Err(PlatformError::NoSlot {
                field,
                count: names.len(),
                slots: slots.count(),
            });
        }
        for name in &names {
            if self.slots.contains_key(name) {
                continue;
            }
            let free = slots
                .clone()
                .find(|slot| !self.slots.values().any(|taken| taken == slot));
            let slot = match free {
                Some(slot) => slot,
                None => self
                    .take_from_absent(&names, slots.clone())
                    .ok_or(PlatformError::NoSlot {
                        field,
                        count: names.len(),
                        slots: slots.clone().count(),
                    })?,
            };
            self.slots.insert(name.clone(), slot);
        }
        Ok(())
    }

    fn take_from_absent(&mut self, present: &[String], slots: std::ops::RangeInclusive<u8>) -> Option<u8> {
        let (name, slot) = self
            .slots
            .iter()
            .find(|(name, slot)| slots.contains(slot) && !present.contains(name))
            .map(|(name, slot)| (name.clone(), *slot))?;
        self.slots.remove(&name);
        Some(slot)
    }

    fn read(path: &Path) -> Result<Option<Platform>, PlatformError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(PlatformError::Io {
                    action: "reading",
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let damaged = |reason: String| PlatformError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let platform: Platform = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if platform.version != PLATFORM_VERSION {
            return Err(damaged(format!(
                "version {} where {PLATFORM_VERSION} is known",
                platform.version
            )));
        }
        Ok(Some(platform))
    }

    fn write(&self, path: &Path) -> Result<(), PlatformError> {
        let failed = |action| {
            move |source| PlatformError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let temporary = PathBuf::from(name);
        let text = serde_json::to_vec(self).map_err(|e| failed("encoding")(e.into()))?;
        let mut file = File::create(&temporary).map_err(failed("creating"))?;
        file.write_all(&text).map_err(failed("writing"))?;
        file.sync_all().map_err(failed("syncing"))?;
        fs::rename(&temporary, path).map_err(failed("replacing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Platform {
        Platform {
            version: PLATFORM_VERSION,
            slots: BTreeMap::new(),
            cpuid: Vec::new(),
        }
    }

    #[test]
    fn a_device_keeps_its_slot_when_another_goes_or_comes() {
        let mut platform = empty();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        platform
            .place("disks", names(&["blk-a", "blk-b"]), DISK_SLOTS)
            .unwrap();
        assert_eq!(platform.slot("blk-b"), Some(17));
        platform
            .place("disks", names(&["blk-b", "blk-c"]), DISK_SLOTS)
            .unwrap();
        assert_eq!(platform.slot("blk-b"), Some(17));
        assert_eq!(platform.slot("blk-c"), Some(18));
    }

    #[test]
    fn slots_of_absent_devices_are_given_away_when_all_are_taken() {
        let mut platform = empty();
        let all: Vec<String> = (0..15).map(|n| format!("blk-{n}")).collect();
        platform.place("disks", all, DISK_SLOTS).unwrap();
        platform
            .place("disks", vec!["blk-new".to_owned()], DISK_SLOTS)
            .unwrap();
        assert!(DISK_SLOTS.contains(&platform.slot("blk-new").unwrap()));
        let many: Vec<String> = (0..16).map(|n| format!("blk-m{n}")).collect();
        assert!(matches!(
            platform.place("disks", many, DISK_SLOTS),
            Err(PlatformError::NoSlot { field: "disks", .. })
        ));
    }

    #[test]
    fn a_record_is_read_back_and_damage_is_refused_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("platform.json");
        assert_eq!(Platform::read(&path).unwrap(), None);
        empty().write(&path).unwrap();
        assert_eq!(Platform::read(&path).unwrap(), Some(empty()));
        fs::write(&path, b"{").unwrap();
        let error = Platform::read(&path).unwrap_err().to_string();
        assert!(error.contains("platform.json"), "{error}");
    }
}
