//! One boot of the machine: a KVM virtual machine with its board and vCPUs, put together from parts that
//! outlive it. Whatever state a guest left behind in KVM is gone with it, so that a reset is as good as a
//! power cycle.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::board::{Board, Event};
use super::cpuid::{self, CpuidError, Leaf};
use super::memory::{GuestRam, MemoryError};
use super::slots;
use super::vcpu::{self, VcpuError, Vcpus};
use crate::boot::linux::LoadError;
use crate::boot::smbios::{self, Identity, SmbiosError};
use crate::boot::{Payload, acpi, linux};
use crate::layout;
use crate::legacy::console::ConsoleLog;
use crate::pci::interrupts::Router;
use crate::virtio::transport::{SharedDevice, Transport, TransportError};

/// Why a boot failed before its first instruction.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// KVM refused.
    #[error("{action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// SMBIOS.
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// ACPI tables.
    #[error("writing ACPI tables into guest RAM: {0}")]
    Acpi(vm_memory::GuestMemoryError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device's PCI function.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// What a boot is put together from.
pub struct Parts<'a> {
    /// `/dev/kvm`.
    pub kvm: &'a Kvm,
    /// RAM, used by nobody.
    pub ram: &'a GuestRam,
    /// Number of vCPUs.
    pub cpus: u8,
    /// CPUID template.
    pub cpuid: &'a [Leaf],
    /// What SMBIOS tells.
    pub identity: Identity<'a>,
    /// Devices with their slots; all have been reset.
    pub devices: &'a [(u8, SharedDevice)],
    /// Serial console.
    pub console: &'a ConsoleLog,
    /// Where the guest's requests go, with `boot`.
    pub events: &'a Sender<Event>,
    /// Number of the boot.
    pub boot: u64,
}

/// A machine that has been put together; its vCPUs are paused.
pub struct Assembly {
    /// Its vCPUs. Declared first: they end before the board goes.
    pub vcpus: Vcpus,
    /// Its board.
    pub board: Arc<Board>,
    /// The virtual machine.
    pub vm: Arc<VmFd>,
}

impl Assembly {
    /// Clears RAM, loads `payload` and puts the machine together.
    pub fn new(parts: &Parts<'_>, payload: &Payload) -> Result<Assembly, AssemblyError> {
        parts.ram.clear()?;
        let memory = &parts.ram.memory;
        let rsdp = acpi::write(memory, parts.cpus).map_err(AssemblyError::Acpi)?;
        smbios::write(memory, &parts.identity)?;
        let entry = linux::load(memory, parts.ram.size(), payload, rsdp)?;

        let Machine { vm, board, vcpus } = Machine::wire(parts)?;
        for (id, vcpu) in (0..parts.cpus).zip(&vcpus) {
            let cpuid = cpuid::for_vcpu(parts.cpuid, id, parts.cpus)?;
            vcpu::set_up(vcpu, id, &cpuid, (id == 0).then_some(entry))?;
        }
        let vcpus = Vcpus::start(vcpus, &board)?;
        Ok(Assembly { vcpus, board, vm })
    }
}

/// The parts wired together: RAM, interrupt controllers, board and devices as after power-on. A kernel is
/// loaded into it for a boot, or a saved state for a resume.
pub struct Machine {
    /// The virtual machine.
    pub vm: Arc<VmFd>,
    /// Its board.
    pub board: Arc<Board>,
    /// Its vCPUs, without CPUID and registers.
    pub vcpus: Vec<VcpuFd>,
}

impl Machine {
    /// Wires the parts; RAM is used as it is.
    pub fn wire(parts: &Parts<'_>) -> Result<Machine, AssemblyError> {
        let kvm = |action| move |source| AssemblyError::Kvm { action, source };
        let memory = &parts.ram.memory;
        let vm = Arc::new(create_vm(parts)?);
        let router = Router::new(vm.clone()).map_err(kvm("routing interrupts"))?;
        let board = Board::new(
            vm.clone(),
            parts.console.clone(),
            parts.boot,
            parts.events.clone(),
        )
        .map_err(kvm("wiring the serial port"))?;
        for (slot, device) in parts.devices {
            let transport = Transport::new(&vm, &router, memory, *slot, device)?;
            board
                .pci
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .insert(*slot, Box::new(transport));
        }
        let board = Arc::new(board);
        let mut vcpus = Vec::new();
        for id in 0..parts.cpus {
            vcpus.push(vm.create_vcpu(u64::from(id)).map_err(kvm("creating a vCPU"))?);
        }
        Ok(Machine { vm, board, vcpus })
    }
}

fn create_vm(parts: &Parts<'_>) -> Result<VmFd, AssemblyError> {
    let kvm = |action| move |source| AssemblyError::Kvm { action, source };
    let vm = parts
        .kvm
        .create_vm()
        .map_err(kvm("creating the virtual machine"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm("placing the identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(kvm("placing the TSS"))?;
    vm.create_irq_chip()
        .map_err(kvm("creating interrupt controllers"))?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(kvm("creating the timer"))?;
    for slot in slots::of(parts.ram) {
        slots::set(&vm, &slot, 0).map_err(kvm("giving RAM to the guest"))?;
    }
    Ok(vm)
}
