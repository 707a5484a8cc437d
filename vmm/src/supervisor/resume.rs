//! Resuming a session from its checkpoint, in place of a boot.
//!
//! Everything is verified and put together first; what is wrong is refused, and nothing was changed. Then
//! the checkpoint is marked as consumed, durably, and only then does the guest run: whatever happens, no two
//! lives of it ever go on from one checkpoint. The write session of each disk grows beside the running guest,
//! before its first write at the latest, so that a copy of the checkpoint is refused as well.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use understudy_checkpoint::{Identity, Key, Manifest, Reader, RefusedCheckpoint};
use understudy_vmm_control::api::VmState;
use understudy_vmm_control::config::VmConfig;
use understudy_vmm_control::session::{Refusal, Resume, ResumeInfo};
use uuid::Uuid;

use super::devices::{Devices, DevicesError};
use super::fence::{self, FenceError};
use super::session::{Compatibility, SessionState};
use super::{Inner, StartError, Supervisor};
use crate::block::{Disk, DiskError};
use crate::boot::smbios::Identity as Smbios;
use crate::laps::Laps;
use crate::machine::assembly::{Assembly, AssemblyError, Chassis, ChassisUnderway, Machine, Parts};
use crate::machine::board::Event;
use crate::machine::cpuid::{self, CpuidError};
use crate::machine::platform::PlatformError;
use crate::machine::vcpu::Vcpus;
use crate::machine::vcpu_state::{self, Abilities};
use crate::machine::vm_state;
use crate::memory_restore::{LazyMemory, RestoreError, RestoreEvent, Userfault, UserfaultError};

/// Threads that read memory ahead of its use.
const PREFETCHERS: usize = 2;

/// Why a session was not resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The checkpoint is not to be resumed here and now. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedCheckpoint),
    /// The host has not what any start of the guest needs. Nothing was changed.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It failed when the checkpoint was consumed already.
    #[error("the checkpoint is consumed, and the guest does not run: {0}")]
    Late(String),
}

/// What the guest was resumed from.
pub(super) struct Resumed {
    checkpoint: Uuid,
    start_us: u64,
    /// Until all of memory is there.
    memory: Option<LazyMemory>,
}

impl Resumed {
    /// Bytes of memory that are in the checkpoint alone.
    pub(super) fn pending_bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, LazyMemory::pending_bytes)
    }

    /// Gives up what is not there yet, for a guest that is reset; vCPUs and devices are stopped.
    pub(super) fn discard(&self) -> Result<(), RestoreError> {
        self.memory.as_ref().map_or(Ok(()), LazyMemory::discard)
    }

    /// Why memory could not be read: the guest cannot go on.
    pub(super) fn error(&self) -> Option<String> {
        self.memory.as_ref().and_then(LazyMemory::error)
    }

    /// For the control API.
    pub(super) fn info(&self) -> ResumeInfo {
        ResumeInfo {
            checkpoint: self.checkpoint,
            pending_bytes: self.pending_bytes(),
            start_us: self.start_us,
            error: self.error(),
        }
    }
}

/// What a guest is resumed from, and with.
struct Source {
    reader: Arc<Reader>,
    state: SessionState,
    userfault: Userfault,
    chassis: ChassisUnderway,
}

fn refuse(refusal: Refusal, message: impl Into<String>) -> ResumeError {
    ResumeError::Refused(RefusedCheckpoint::new(refusal, message))
}

fn incompatible(error: impl std::fmt::Display) -> ResumeError {
    refuse(Refusal::CheckpointIncompatible, error.to_string())
}

impl Supervisor {
    /// Resumes the session that `resume` names; the process has `started` then, and tried to open
    /// `userfault` before it was confined. When this returns the guest runs.
    pub fn resume(
        config: VmConfig,
        resume: &Resume,
        userfault: Result<Userfault, UserfaultError>,
        started: Instant,
    ) -> Result<(Arc<Supervisor>, Receiver<Event>), ResumeError> {
        let mut laps = Laps::begun_at(started);
        laps.lap("process");
        let userfault = userfault.map_err(incompatible)?;
        let key =
            Key::read(&resume.key).map_err(|error| refuse(Refusal::CheckpointKey, error.to_string()))?;
        let identity = Identity {
            checkpoint: resume.checkpoint,
            guest_uid: resume.guest_uid.clone(),
            machine_id: resume.machine_id.clone(),
            host_boot_id: resume.host_boot_id.clone(),
        };
        let cpus = config.cpus;
        let (supervisor, events) = Supervisor::new(config).map_err(refuse_start)?;
        laps.lap("supervisor");
        // What KVM waits for goes by while the checkpoint is read.
        let chassis = Chassis::begin(supervisor.lock().ram.clone(), cpus).map_err(refuse_assembly)?;
        let reader = Reader::open(&resume.directory, &key, &identity)?;
        drop(key);
        check_configuration(&supervisor.config, reader.manifest())?;
        let state = SessionState::from_bytes(reader.state())?;
        laps.lap("checkpoint");
        let source = Source {
            reader: Arc::new(reader),
            state,
            userfault,
            chassis,
        };
        supervisor.restore(source, started, &mut laps)?;
        tracing::info!("stages of the resume, in us: {laps}");
        Ok((supervisor, events))
    }

    fn restore(&self, source: Source, started: Instant, laps: &mut Laps) -> Result<(), ResumeError> {
        let Source {
            reader,
            state,
            userfault,
            chassis,
        } = source;
        let mut guard = self.lock();
        let inner = &mut *guard;
        let manifest = reader.manifest();
        self.check_owner(manifest)?;
        take_platform(inner, manifest)?;
        let devices = Devices::open(
            &self.config,
            &inner.platform,
            &self.gates,
            &self.counters,
            Some(&manifest.disks),
        )
        .map_err(refuse_devices)?;
        laps.lap("devices");
        inner.boots = 1;
        let memory = self.fill_lazily(inner, &reader, userfault)?;
        laps.lap("memory");
        let chassis = chassis.wait().map_err(refuse_assembly)?;
        laps.lap("chassis");
        let assembly = assemble(
            &Parts {
                kvm: &inner.kvm,
                ram: &inner.ram,
                cpus: self.config.cpus,
                cpuid: &inner.platform.cpuid,
                identity: Smbios {
                    uuid: self.config.uuid,
                    memory_mib: self.config.memory_mib,
                    oem_strings: &[],
                },
                devices: devices.list(),
                console: &self.console,
                events: &self.events,
                boot: inner.boots,
            },
            chassis,
            &state,
        )?;
        laps.lap("state");

        reader.mark_consumed()?;
        laps.lap("consumed");
        let late = |error: &dyn std::fmt::Display| ResumeError::Late(error.to_string());
        vm_state::set_clock(&assembly.vm, state.chipset.clock_ns).map_err(|error| late(&error))?;
        assembly.board.resume().map_err(|error| late(&error))?;
        take_up(devices.disks())?;
        inner.kernel = state.kernel.clone();
        inner.state = VmState::Running;
        let start_us = started.elapsed().as_micros() as u64;
        assembly.vcpus.resume();
        memory.read_ahead();
        laps.lap("board");
        tracing::info!(
            checkpoint = %manifest.checkpoint,
            start_us,
            "the session is resumed"
        );
        inner.resumed = Some(Resumed {
            checkpoint: manifest.checkpoint,
            start_us,
            memory: Some(memory),
        });
        inner.devices = Some(devices);
        inner.assembly = Some(assembly);
        Ok(())
    }

    /// From now on whoever touches guest RAM gets what the checkpoint holds.
    fn fill_lazily(
        &self,
        inner: &Inner,
        reader: &Arc<Reader>,
        userfault: Userfault,
    ) -> Result<LazyMemory, ResumeError> {
        let (events, boot) = (self.events.clone(), inner.boots);
        let told = move |event| {
            let event = match event {
                RestoreEvent::Complete => Event::MemoryComplete { boot },
                RestoreEvent::Damaged { message } => Event::MemoryDamaged { boot, message },
            };
            // The receiver is gone only while the process ends.
            let _ = events.send(event);
        };
        LazyMemory::start(userfault, &inner.ram, reader.clone(), PREFETCHERS, told).map_err(|error| match error
        {
            RestoreError::Size { .. } => incompatible(error),
            RestoreError::Memory(error) => ResumeError::Start(error.into()),
            RestoreError::Os { .. } => incompatible(format!(
                "{error}; the host's kernel needs CONFIG_USERFAULTFD, and this process the right to use it"
            )),
        })
    }

    /// All memory of the resumed guest is there: the checkpoint is needed no more.
    pub(super) fn memory_is_complete(&self, inner: &mut Inner) {
        if let Some(resumed) = &mut inner.resumed
            && resumed.error().is_none()
        {
            resumed.memory = None;
            tracing::info!(checkpoint = %resumed.checkpoint, "all memory of the session is there");
        }
    }

    /// Memory of the resumed guest cannot be had: the guest is paused, and everything is kept.
    pub(super) fn memory_is_damaged(&self, inner: &mut Inner, message: &str) {
        tracing::error!(message, "the guest is paused: {}", Refusal::CheckpointDamaged);
        if let Some(assembly) = &inner.assembly {
            // Whoever waits for the memory may not be interruptible.
            assembly.vcpus.ask_to_pause();
        }
        inner.vcpus_closed = true;
        inner.lease = None;
        inner.state = VmState::Paused;
    }

    /// A commit since would have made another incarnation the owner.
    fn check_owner(&self, manifest: &Manifest) -> Result<(), ResumeError> {
        let owner = fence::named(&self.state_dir, self.config.incarnation)
            .map_err(|error| refuse_start(error.into()))?;
        if owner.epoch != manifest.owner_epoch {
            return Err(refuse(
                Refusal::CheckpointStale,
                format!(
                    "owner.json has epoch {}, the session was saved in epoch {}: the guest has changed its owner since",
                    owner.epoch, manifest.owner_epoch
                ),
            ));
        }
        Ok(())
    }
}

/// Begins the write sessions of the disks while the guest runs; a write that comes sooner does so itself.
fn take_up(disks: &[Arc<Disk>]) -> Result<(), ResumeError> {
    let disks = disks.to_vec();
    let begin = move || {
        for disk in disks {
            if let Err(error) = disk.take_up() {
                // The guest's next write tries again, and waits where there is no room.
                tracing::warn!(disk = disk.name(), %error, "its write session does not begin yet");
            }
        }
    };
    std::thread::Builder::new()
        .name("write-session".to_owned())
        .spawn(begin)
        .map(drop)
        .map_err(|error| ResumeError::Late(format!("starting a thread: {error}")))
}

/// The configuration is that of the session.
fn check_configuration(config: &VmConfig, manifest: &Manifest) -> Result<(), ResumeError> {
    if manifest.incarnation != config.incarnation {
        return Err(refuse(
            Refusal::CheckpointForeign,
            format!(
                "the session is of incarnation {}, asked for was {}",
                manifest.incarnation, config.incarnation
            ),
        ));
    }
    let disks: Vec<&str> = config.disks.iter().map(|disk| disk.name.as_str()).collect();
    let saved: Vec<&str> = manifest.disks.iter().map(|disk| disk.name.as_str()).collect();
    for (field, configured, saved) in [
        ("cpus", config.cpus.to_string(), manifest.cpus.to_string()),
        (
            "memoryMib",
            config.memory_mib.to_string(),
            manifest.memory_mib.to_string(),
        ),
        ("disks", disks.join(", "), saved.join(", ")),
    ] {
        if configured != saved {
            return Err(incompatible(format!(
                "{field}: the configuration has {configured}, the session {saved}; resume it with the configuration that it was saved with"
            )));
        }
    }
    Ok(())
}

/// The guest goes on with the CPUID and the slots that it knows, if this host has what it needs.
fn take_platform(inner: &mut Inner, manifest: &Manifest) -> Result<(), ResumeError> {
    let Compatibility { platform } =
        serde_json::from_value(manifest.compatibility.clone()).map_err(incompatible)?;
    if platform != inner.platform {
        // The recorded one was compared with the host's already.
        let offered = cpuid::template(&inner.kvm).map_err(incompatible)?;
        cpuid::check_recorded(&platform.cpuid, &offered).map_err(incompatible)?;
        inner.platform = platform;
    }
    Ok(())
}

fn refuse_start(error: StartError) -> ResumeError {
    match error {
        StartError::Fence(FenceError::NotOwner { .. } | FenceError::NoOwner { .. }) => {
            refuse(Refusal::CheckpointStale, error.to_string())
        }
        StartError::Platform(PlatformError::Cpuid(CpuidError::HostLacks { .. })) => incompatible(error),
        error => ResumeError::Start(error),
    }
}

fn refuse_assembly(error: AssemblyError) -> ResumeError {
    ResumeError::Start(error.into())
}

fn refuse_devices(error: DevicesError) -> ResumeError {
    match error {
        DevicesError::Disk {
            source: DiskError::StaleRoot { .. },
            ..
        } => refuse(Refusal::CheckpointStale, error.to_string()),
        error => ResumeError::Start(error.into()),
    }
}

/// The machine with the state of the session; its vCPUs are paused. The order is that of
/// [`vcpu_state`] and [`vm_state`].
fn assemble(parts: &Parts<'_>, chassis: Chassis, state: &SessionState) -> Result<Assembly, ResumeError> {
    let Machine { vm, board, vcpus } = Machine::wire(parts, chassis).map_err(refuse_assembly)?;
    if vcpus.len() != state.vcpus.len() {
        return Err(incompatible(format!(
            "the session has the state of {} vCPUs",
            state.vcpus.len()
        )));
    }
    let abilities = Abilities::of(parts.kvm, &vm).map_err(incompatible)?;
    for ((id, vcpu), state) in (0..parts.cpus).zip(&vcpus).zip(&state.vcpus) {
        let cpuid = cpuid::for_vcpu(parts.cpuid, id, parts.cpus).map_err(incompatible)?;
        vcpu_state::restore(vcpu, usize::from(id), &cpuid, state, &abilities).map_err(incompatible)?;
    }
    vm_state::restore(&vm, &state.chipset).map_err(incompatible)?;
    board.restore(&state.board).map_err(incompatible)?;
    let vcpus = Vcpus::start(vcpus, &board).map_err(|error| refuse_assembly(error.into()))?;
    Ok(Assembly { vcpus, vm, board })
}
