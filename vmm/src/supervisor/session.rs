//! What a saved session consists of beside guest RAM and disks.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use understudy_checkpoint::{RamRange, RefusedCheckpoint, SavedDisk};
use understudy_vmm_control::api::DiskInfo;
use understudy_vmm_control::session::Refusal;

use crate::machine::assembly::Assembly;
use crate::machine::memory;
use crate::machine::platform::Platform;
use crate::machine::vcpu_state::{self, Abilities, VcpuState, VcpuStateError};
use crate::machine::vm_state::{self, ChipsetError, ChipsetState};
use crate::persist::{Envelope, State, StateError};

/// What the state is called in errors.
const PART: &str = "session";

/// State of the machine, version 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// vCPUs in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer, clock.
    pub chipset: ChipsetState,
    /// The board with its devices, in their own encoding.
    #[serde(with = "serde_bytes")]
    pub board: Vec<u8>,
    /// Kernel that the guest had booted, for the control API.
    pub kernel: Option<String>,
}

impl State for SessionState {
    const VERSION: u32 = 1;
}

/// What a host must have, in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Compatibility {
    /// CPUID and PCI slots that the guest has seen.
    pub platform: Platform,
}

/// Why the machine's state could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// KVM.
    #[error("asking KVM what it keeps: {0}")]
    Kvm(kvm_ioctls::Error),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// Interrupt controllers, timer, clock.
    #[error(transparent)]
    Chipset(#[from] ChipsetError),
    /// A device.
    #[error(transparent)]
    Device(#[from] StateError),
}

impl SessionState {
    /// Reads the state of a machine whose vCPUs are paused and whose board is suspended. Devices come before
    /// vCPUs: what a device had raised is in the interrupt controllers by then.
    pub fn capture(
        kvm: &Kvm,
        vm: &Arc<VmFd>,
        assembly: &Assembly,
        kernel: Option<String>,
    ) -> Result<SessionState, CaptureError> {
        let abilities = Abilities::of(kvm, vm).map_err(CaptureError::Kvm)?;
        let board = assembly.board.save()?;
        let chipset = vm_state::save(vm)?;
        let mut vcpus = assembly
            .vcpus
            .each(|id, vcpu| vcpu_state::save(vcpu, id, &abilities))?;
        vcpu_state::align_tscs(&mut vcpus);
        Ok(SessionState {
            vcpus,
            chipset,
            board,
            kernel,
        })
    }

    /// Encodes it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        Envelope::seal(PART, self)?.to_bytes(PART)
    }

    /// Decodes it; the bytes were authenticated, so that what does not fit is another version's.
    pub fn from_bytes(bytes: &[u8]) -> Result<SessionState, RefusedCheckpoint> {
        Envelope::from_bytes(PART, bytes)
            .and_then(|envelope| envelope.open(PART))
            .map_err(|error| RefusedCheckpoint::new(Refusal::CheckpointIncompatible, error.to_string()))
    }
}

/// Ranges of guest RAM for the manifest.
pub fn ram_ranges(size: u64) -> Vec<RamRange> {
    memory::ranges(size)
        .into_iter()
        .map(|(start, offset, length)| RamRange {
            start,
            offset,
            length,
        })
        .collect()
}

/// A disk for the manifest.
pub fn saved_disk(info: DiskInfo) -> SavedDisk {
    SavedDisk {
        name: info.name,
        layers: info.layers,
        write_session: info.session,
    }
}
