//! The guest's devices with their backends, which outlive resets of the machine.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use understudy_checkpoint::SavedDisk;
use understudy_vmm_control::api::{ActivateReport, DiskInfo, InterfaceInfo};
use understudy_vmm_control::config::{DiskRole, VmConfig};

use crate::block::{BlockDevice, Disk, DiskError};
use crate::gate::{Counters, Gates};
use crate::machine::platform::{self, Platform};
use crate::net::{self, Handover, NetDevice, NetError, NetHandle};
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng::RngDevice;
use crate::virtio::transport::SharedDevice;
use crate::vsock::{VsockDevice, VsockError};

/// Why the devices could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// A disk.
    #[error("disks[{index}]: {source}")]
    Disk {
        /// Index in the configuration.
        index: usize,
        /// Why it failed.
        source: DiskError,
    },
    /// A network interface.
    #[error("networks[{index}]: {source}")]
    Network {
        /// Index in the configuration.
        index: usize,
        /// Why it failed.
        source: NetError,
    },
    /// The socket device.
    #[error("vsock: {0}")]
    Vsock(#[from] VsockError),
    /// The configuration has no root disk, which validation refuses.
    #[error("disks: none has the role Root")]
    NoRoot,
}

/// Devices and backends.
pub struct Devices {
    list: Vec<(u8, SharedDevice)>,
    interfaces: Vec<NetHandle>,
    disks: Vec<Arc<Disk>>,
    root: Arc<Disk>,
}

impl Devices {
    /// Opens all backends. With `saved` they are those of a session that is resumed: disks must be as it left
    /// them, and their write sessions are to be begun by the caller.
    pub fn open(
        config: &VmConfig,
        platform: &Platform,
        gates: &Gates,
        counters: &Arc<Counters>,
        saved: Option<&[SavedDisk]>,
    ) -> Result<Devices, DevicesError> {
        let mut list = Vec::new();
        let mut add = |name: &str, device: Box<dyn VirtioDevice>| {
            // Every device of the configuration was given a slot when the platform was settled.
            if let Some(slot) = platform.slot(name) {
                list.push((slot, Arc::new(Mutex::new(device))));
            }
        };
        add("rng", Box::new(RngDevice::new()));
        add("vsock", Box::new(VsockDevice::new(&config.vsock)?));
        let mut interfaces = Vec::new();
        for (index, network) in config.networks.iter().enumerate() {
            // The configuration was checked for the number of interfaces.
            let device = NetDevice::new(
                network,
                index as u16,
                config.role,
                gates.clone(),
                counters.clone(),
            )
            .map_err(|source| DevicesError::Network { index, source })?;
            interfaces.push(device.handle());
            add(&platform::network_name(&network.mac), Box::new(device));
        }
        let mut disks = Vec::new();
        let mut root = None;
        for (index, disk) in config.disks.iter().enumerate() {
            let left = saved.and_then(|saved| saved.iter().find(|saved| saved.name == disk.name));
            let opened = match left {
                Some(left) => Disk::open_as_left(disk, config.role, &left.layers, left.write_session),
                None => Disk::open(disk, config.role),
            }
            .map_err(|source| DevicesError::Disk { index, source })?;
            let device = BlockDevice::new(opened.clone(), gates.write.clone(), counters.clone());
            add(&platform::disk_name(&disk.name), Box::new(device));
            if disk.role == DiskRole::Root {
                root = Some(opened.clone());
            }
            disks.push(opened);
        }
        Ok(Devices {
            list,
            interfaces,
            disks,
            root: root.ok_or(DevicesError::NoRoot)?,
        })
    }

    /// All devices with their slots.
    pub fn list(&self) -> &[(u8, SharedDevice)] {
        &self.list
    }

    /// The disk that the guest boots from.
    pub fn root(&self) -> &Arc<Disk> {
        &self.root
    }

    /// All disks.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// A disk by its name.
    pub fn disk(&self, name: &str) -> Option<&Arc<Disk>> {
        self.disks.iter().find(|disk| disk.name() == name)
    }

    /// Disks for the control API.
    pub fn disk_info(&self) -> Vec<DiskInfo> {
        self.disks.iter().map(|disk| disk.info()).collect()
    }

    /// Stops all workers.
    pub fn reset(&self) {
        for (_, device) in &self.list {
            device.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
    }

    /// Stops merges that run; they can be continued.
    pub fn stop_merges(&self) {
        for disk in &self.disks {
            disk.stop_merge();
        }
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(|disk| disk.flush())
    }

    /// Sends the taps to the process that listens at `socket`.
    pub fn give_taps(&self, socket: &Path) -> Result<(), NetError> {
        net::give_all(&self.interfaces, socket)
    }

    /// Puts every interface on its tap: one that has arrived, or with `open` by its name.
    pub fn attach_taps(&self, handover: &Handover, open: bool) -> Result<ActivateReport, NetError> {
        net::attach_all(&self.interfaces, handover, open)
    }

    /// Takes the taps back that were given away: they were kept for that. With `open` what was not kept is
    /// opened by name.
    pub fn take_taps_back(&self, open: bool) -> Result<ActivateReport, NetError> {
        net::take_back_all(&self.interfaces, open)
    }

    /// Interfaces for the control API.
    pub fn interface_info(&self) -> Vec<InterfaceInfo> {
        self.interfaces
            .iter()
            .map(|interface| {
                let sent = interface.frames_sent_at();
                InterfaceInfo {
                    index: interface.index(),
                    isolated: interface.is_isolated(),
                    first_sent_us: sent.map(|(first, _)| first),
                    last_sent_us: sent.map(|(_, last)| last),
                }
            })
            .collect()
    }
}
