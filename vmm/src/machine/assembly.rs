//! One boot of the machine: a KVM virtual machine with its board and vCPUs, put together from parts that
//! outlive it. Whatever state a guest left behind in KVM is gone with it, so that a reset is as good as a
//! power cycle.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

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
    /// The thread that makes the virtual machine.
    #[error("making the virtual machine on a thread of its own: {0}")]
    Thread(std::io::Error),
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

        let chassis = Chassis::new(parts.kvm, parts.ram, parts.cpus)?;
        let Machine { vm, board, vcpus } = Machine::wire(parts, chassis)?;
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
    /// Wires the parts to `chassis`, which was made for the same RAM and number of vCPUs; RAM is used as it is.
    pub fn wire(parts: &Parts<'_>, chassis: Chassis) -> Result<Machine, AssemblyError> {
        let kvm = |action| move |source| AssemblyError::Kvm { action, source };
        let memory = &parts.ram.memory;
        let Chassis { vm, vcpus } = chassis;
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
        Ok(Machine { vm, board, vcpus })
    }
}

/// A KVM virtual machine with RAM, interrupt controllers and vCPUs, and nothing else yet. To make one takes
/// milliseconds in which the kernel waits for its readers; a resume spends them on its checkpoint.
pub struct Chassis {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
}

impl Chassis {
    /// A chassis for `ram`, whatever that holds by then.
    pub fn new(kvm: &Kvm, ram: &GuestRam, cpus: u8) -> Result<Chassis, AssemblyError> {
        let vm = Arc::new(create_vm(kvm, ram)?);
        let mut vcpus = Vec::new();
        for id in 0..cpus {
            vcpus.push(
                vm.create_vcpu(u64::from(id))
                    .map_err(|source| AssemblyError::Kvm {
                        action: "creating a vCPU",
                        source,
                    })?,
            );
        }
        Ok(Chassis { vm, vcpus })
    }

    /// Makes one on a thread of its own.
    pub fn begin(ram: Arc<GuestRam>, cpus: u8) -> Result<ChassisUnderway, AssemblyError> {
        let make = move || {
            let kvm = Kvm::new().map_err(|source| AssemblyError::Kvm {
                action: "opening /dev/kvm",
                source,
            })?;
            Chassis::new(&kvm, &ram, cpus)
        };
        std::thread::Builder::new()
            .name("chassis".to_owned())
            .spawn(make)
            .map(ChassisUnderway)
            .map_err(AssemblyError::Thread)
    }
}

/// A [`Chassis`] that is being made.
pub struct ChassisUnderway(JoinHandle<Result<Chassis, AssemblyError>>);

impl ChassisUnderway {
    /// Waits for it.
    pub fn wait(self) -> Result<Chassis, AssemblyError> {
        self.0
            .join()
            .unwrap_or_else(|_| Err(AssemblyError::Thread(std::io::Error::other("it panicked"))))
    }
}

fn create_vm(kvm_device: &Kvm, ram: &GuestRam) -> Result<VmFd, AssemblyError> {
    let kvm = |action| move |source| AssemblyError::Kvm { action, source };
    let vm = kvm_device
        .create_vm()
        .map_err(kvm("creating the virtual machine"))?;
    // First: to change memory KVM waits until nobody reads the old, and after the interrupt controllers were made
    // that takes 6 to 10 ms in place of 0.1 (measured on Linux 6.18, where their registration ends by a callback).
    for slot in slots::of(ram) {
        slots::set(&vm, &slot, 0).map_err(kvm("giving RAM to the guest"))?;
    }
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
    Ok(vm)
}
