//! The supervisor of one guest: builds its machine for each boot, carries out what the control API asks,
//! and answers to what the guest asks (reset, power-off).
//!
//! All of it happens under one lock. vCPU threads and device workers never take that lock, so that they
//! can be stopped while it is held.

pub mod devices;
mod disks;
pub mod fence;
mod lease;
mod operations;
mod precopy;
pub mod resume;
mod save;
mod save_job;
mod session;
pub mod validate;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_ioctls::Kvm;
use understudy_vmm_control::API_VERSION;
use understudy_vmm_control::api::{self, Commit, VmInfo, VmState};
use understudy_vmm_control::config::{DiskRole, Role, VmConfig};
use understudy_vmm_control::owner::state_dir;

pub use operations::OperationError;
pub use resume::ResumeError;

use crate::boot::smbios::Identity;
use crate::boot::{self, BootError};
use crate::gate::{Counters, Gates};
use crate::legacy::console::ConsoleLog;
use crate::machine::assembly::{Assembly, AssemblyError, Parts};
use crate::machine::board::{Event, GuestEvent};
use crate::machine::memory::{GuestRam, MemoryError};
use crate::machine::platform::{Platform, PlatformError};
use crate::net::Handover;
use devices::{Devices, DevicesError};
use fence::{FenceError, Ownership};

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `/dev/kvm`.
    #[error(
        "opening /dev/kvm: {0}; load the module kvm_amd or kvm_intel, and give this process access to the device"
    )]
    Kvm(kvm_ioctls::Error),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Platform record.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Console log.
    #[error("paths.console: opening {path}: {source}")]
    Console {
        /// The log.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Not the owner.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The socket for taps.
    #[error("paths.handover: listening on {path}: {source}")]
    Handover {
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Devices.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// Kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Machine.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
}

/// The supervisor; shared by the main loop, control connections and the lease's thread.
pub struct Supervisor {
    config: VmConfig,
    state_dir: PathBuf,
    gates: Gates,
    counters: Arc<Counters>,
    console: ConsoleLog,
    events: Sender<Event>,
    inner: Mutex<Inner>,
    /// While a boot is put together or a session is paused to be saved: what held before.
    before: Mutex<Option<VmInfo>>,
    /// The last save, whatever became of it.
    last_save: Mutex<Option<Arc<save_job::Job>>>,
    lease_changed: Condvar,
    stop_asked: AtomicBool,
}

struct Inner {
    kvm: Kvm,
    ram: Arc<GuestRam>,
    platform: Platform,
    /// Where a clone receives taps.
    handover: Option<Handover>,
    /// Opened at boot: a clone is prepared before its layer has its final content below it.
    devices: Option<Devices>,
    assembly: Option<Assembly>,
    role: Role,
    state: VmState,
    ownership: Option<Ownership>,
    /// The commit that made this VMM dormant.
    committed: Option<Commit>,
    /// What kvm-clock showed when this VMM became dormant, in nanoseconds.
    stopped_at: Option<u64>,
    /// The epoch by which a clone, or a dormant incarnation again, was activated.
    activated: Option<(u64, api::ActivateReport)>,
    vcpus_closed: bool,
    lease: Option<Instant>,
    /// The save that goes on, until the session is saved.
    saving: Option<Arc<save_job::Job>>,
    /// The session is saved.
    saved: Option<save::SavedSession>,
    /// The guest was resumed, and has not been reset since.
    resumed: Option<resume::Resumed>,
    boots: u64,
    kernel: Option<String>,
    exit_reason: Option<String>,
}

impl Supervisor {
    /// Takes what the guest needs and, as the owner, the fence; nothing runs yet.
    pub fn new(config: VmConfig) -> Result<(Arc<Supervisor>, Receiver<Event>), StartError> {
        let root = config
            .disks
            .iter()
            .find(|disk| disk.role == DiskRole::Root)
            .map(|disk| state_dir(&disk.source))
            .unwrap_or_default();
        let ownership = match config.role {
            Role::Active => Some(Ownership::take(&root, config.incarnation)?.0),
            Role::Clone => None,
        };
        let kvm = Kvm::new().map_err(StartError::Kvm)?;
        let ram = Arc::new(GuestRam::new(config.memory_mib)?);
        let platform = Platform::settle(&config, &kvm)?;
        let console = ConsoleLog::open(&config.paths.console).map_err(|source| StartError::Console {
            path: config.paths.console.clone(),
            source,
        })?;
        let handover = match config.role {
            Role::Clone => {
                Some(
                    Handover::listen(&config.paths.handover).map_err(|source| StartError::Handover {
                        path: config.paths.handover.clone(),
                        source,
                    })?,
                )
            }
            Role::Active => None,
        };
        let (events, receiver) = channel();
        let supervisor = Arc::new(Supervisor {
            state_dir: root,
            gates: Gates::default(),
            counters: Arc::default(),
            console,
            events,
            inner: Mutex::new(Inner {
                kvm,
                ram,
                platform,
                handover,
                devices: None,
                assembly: None,
                role: config.role,
                state: VmState::Prepared,
                ownership,
                committed: None,
                stopped_at: None,
                activated: None,
                vcpus_closed: false,
                lease: None,
                saving: None,
                saved: None,
                resumed: None,
                boots: 0,
                kernel: None,
                exit_reason: None,
            }),
            before: Mutex::default(),
            last_save: Mutex::default(),
            lease_changed: Condvar::new(),
            stop_asked: AtomicBool::new(false),
            config,
        });
        Ok((supervisor, receiver))
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// A sender for the main loop, through which the process is told to stop.
    pub fn events(&self) -> Sender<Event> {
        self.events.clone()
    }

    /// The console's last output.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    /// Opens the devices and runs the guest.
    pub fn start(&self) -> Result<(), StartError> {
        self.start_locked(&mut self.lock())
    }

    fn start_locked(&self, inner: &mut Inner) -> Result<(), StartError> {
        *self.before() = Some(self.describe(inner));
        let result = self.assemble(inner);
        *self.before() = None;
        result
    }

    fn assemble(&self, inner: &mut Inner) -> Result<(), StartError> {
        let devices = match inner.devices.take() {
            Some(devices) => devices,
            None => Devices::open(&self.config, &inner.platform, &self.gates, &self.counters, None)?,
        };
        let devices = inner.devices.insert(devices);
        let payload = boot::find(&self.config.boot, devices.root())?;
        inner.boots += 1;
        inner.kernel = Some(payload.kernel_name.clone());
        let clone_strings: &[String] = match inner.role {
            Role::Clone => &self.config.clone_oem_strings,
            Role::Active => &[],
        };
        let assembly = Assembly::new(
            &Parts {
                kvm: &inner.kvm,
                ram: &inner.ram,
                cpus: self.config.cpus,
                cpuid: &inner.platform.cpuid,
                identity: Identity {
                    uuid: self.config.uuid,
                    memory_mib: self.config.memory_mib,
                    oem_strings: clone_strings,
                },
                devices: devices.list(),
                console: &self.console,
                events: &self.events,
                boot: inner.boots,
            },
            &payload,
        )?;
        tracing::info!(
            boot = inner.boots,
            kernel = payload.kernel_name,
            initrd = payload.initrd_name,
            cmdline = payload.cmdline,
            role = ?inner.role,
            "the guest boots"
        );
        if inner.vcpus_closed {
            inner.state = VmState::Paused;
        } else {
            inner.state = VmState::Running;
            assembly.vcpus.resume();
        }
        inner.assembly = Some(assembly);
        Ok(())
    }

    /// Handles events until the process shall end; `true` when it ends as it should.
    pub fn run(&self, events: &Receiver<Event>) -> bool {
        loop {
            let event = match events.recv() {
                Ok(event) => event,
                // The supervisor itself holds a sender, so that this does not happen while it lives.
                Err(_) => return false,
            };
            let mut inner = self.lock();
            match event {
                Event::Stop => {
                    let orderly = inner.state != VmState::Exited;
                    tracing::info!("the process is told to stop");
                    self.halt(&mut inner);
                    return orderly;
                }
                Event::Guest { boot, .. }
                | Event::MemoryComplete { boot }
                | Event::MemoryDamaged { boot, .. }
                    if boot != inner.boots || inner.assembly.is_none() => {}
                Event::MemoryComplete { .. } => self.memory_is_complete(&mut inner),
                Event::MemoryDamaged { message, .. } => self.memory_is_damaged(&mut inner, &message),
                // The dormant's guest is paused; what it asked just before is void.
                Event::Guest { .. } if inner.state == VmState::Dormant => {}
                Event::Guest { event, .. } => match event {
                    GuestEvent::Reset => self.reset_locked(&mut inner),
                    GuestEvent::PowerOff => {
                        tracing::info!("the guest has powered itself off");
                        inner.exit_reason = Some("the guest has powered itself off".to_owned());
                        self.halt(&mut inner);
                        inner.state = VmState::Exited;
                        return true;
                    }
                    GuestEvent::Crashed(reason) => {
                        tracing::error!(reason, "the guest has crashed");
                        inner.exit_reason = Some(reason);
                        self.halt(&mut inner);
                        inner.state = VmState::Exited;
                    }
                },
            }
        }
    }

    /// Builds the machine anew. Backends of devices live on; a kernel is looked for again.
    fn reset_locked(&self, inner: &mut Inner) {
        tracing::info!("the guest is reset");
        if let Some(job) = inner.saving.take() {
            job.overtaken("the guest was reset while it was saved");
        }
        stop_machine(inner);
        // Nothing fills RAM from a checkpoint any more, or clearing it would bring the old memory back.
        if let Some(resumed) = inner.resumed.take()
            && let Err(error) = resumed.discard()
        {
            tracing::error!(%error, "the guest was reset, and its memory cannot be cleared");
            inner.exit_reason = Some(format!(
                "the guest was reset, and its memory cannot be cleared: {error}"
            ));
            self.halt(inner);
            inner.state = VmState::Exited;
            return;
        }
        if let Err(error) = self.start_locked(inner) {
            let reason = format!("the guest was reset, and does not boot again: {error}");
            tracing::error!(%error, "the guest was reset, and does not boot again");
            inner.exit_reason = Some(reason);
            self.halt(inner);
            inner.state = VmState::Exited;
        }
    }

    /// Ends vCPUs and devices, and makes written data durable.
    fn halt(&self, inner: &mut Inner) {
        if inner
            .resumed
            .as_ref()
            .is_some_and(|resumed| resumed.error().is_some())
        {
            // vCPUs and devices may wait for memory that will never come, and hold what a flush needs: they
            // end with the process. What the guest was told is durable is so already.
            std::mem::forget(inner.assembly.take());
            return;
        }
        stop_machine(inner);
        if let Some(devices) = &inner.devices {
            devices.stop_merges();
            if let Err(error) = devices.flush() {
                tracing::error!(%error, "flushing the disks");
            }
        }
    }

    /// The answer of `GET /v1/vm`. While a boot reads kernel and initrd, or the end of a save waits for the
    /// disk, which may take seconds, it is what held before, so that a live VMM is never silent.
    pub fn info(&self) -> VmInfo {
        let before = self.before().clone();
        match before {
            Some(info) => VmInfo {
                counters: self.counters.report(),
                ..info
            },
            None => self.describe(&self.lock()),
        }
    }

    fn before(&self) -> MutexGuard<'_, Option<VmInfo>> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn describe(&self, inner: &Inner) -> VmInfo {
        VmInfo {
            api_version: API_VERSION,
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            guest: self.config.guest.clone(),
            incarnation: self.config.incarnation,
            pid: std::process::id(),
            state: inner.state,
            owner: inner.ownership.is_some(),
            boots: inner.boots,
            kernel: inner.kernel.clone(),
            exit_reason: inner.exit_reason.clone(),
            gates: self.gates_report(inner),
            counters: self.counters.report(),
            disks: inner.devices.as_ref().map(Devices::disk_info).unwrap_or_default(),
            interfaces: inner
                .devices
                .as_ref()
                .map(Devices::interface_info)
                .unwrap_or_default(),
            resume: inner.resumed.as_ref().map(resume::Resumed::info),
        }
    }

    fn gates_report(&self, inner: &Inner) -> api::Gates {
        api::Gates {
            receive: self.gates.receive.is_closed(),
            transmit: self.gates.transmit.is_closed(),
            write: self.gates.write.is_closed(),
            vcpus: inner.vcpus_closed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic ends the process in release builds; in tests the state is inspected as it is.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stop_machine(inner: &mut Inner) {
    // vCPUs end before devices are reset, so that no driver finds its device gone.
    inner.assembly = None;
    if let Some(devices) = &inner.devices {
        devices.reset();
    }
}
