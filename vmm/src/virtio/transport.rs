//! virtio over PCI, modern interface (virtio 1.2, 4.1): one function with one memory BAR.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, Interrupt, QueueProgress, VirtioDevice};
use crate::machine::memory::GuestMemoryMmap;
use crate::pci::bus::{Function, bar_address};
use crate::pci::config::{ConfigState, Identity};
use crate::pci::interrupts::Router;
use crate::pci::msix::{self, Msix};
use crate::persist::{Envelope, StateError};

mod persist;
mod queue;

pub use self::queue::{QueueSetup, TransportState};

/// A device that outlives resets of the machine, in which each boot gets a transport of its own.
pub type SharedDevice = Arc<Mutex<Box<dyn VirtioDevice>>>;

const BAR_SIZE: u32 = 0x8000;
/// Regions of the BAR.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const REGION_SIZE: u64 = 0x1000;
/// Distance of the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
const COMMON_SIZE: u32 = 0x38;

const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const RING_EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// PCI configuration access capability (4.1.4.9): its offset in configuration space is known only at run
/// time, its fields are at these offsets from it.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// What the device's threads raise.
struct Signals {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    /// Changes of configuration; the low byte is `config_generation`.
    generation: AtomicU8,
}

impl Interrupt for Signals {
    fn signal_queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.msix.raise(vector.load(Ordering::Acquire));
        }
    }

    fn signal_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.msix.raise(self.config_vector.load(Ordering::Acquire));
    }
}

/// The function of one virtio device.
pub struct Transport {
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    device: SharedDevice,
    config: ConfigState,
    msix_capability: usize,
    window: usize,
    state: TransportState,
    signals: Arc<Signals>,
    notify: Vec<EventFd>,
    phase: Phase,
    /// Where the BAR's notification addresses are registered with KVM.
    registered: Option<u64>,
}

/// Whether the device does something by itself.
enum Phase {
    /// It does what the driver asks.
    Running,
    /// It does nothing; the queues in use are so far.
    Suspended(Vec<QueueProgress>),
    /// A saved session was taken over, whose queues in use are so far; the device's own state, too. It is
    /// started when the machine goes on.
    Restored(Vec<QueueProgress>),
}

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{device}: making its PCI function: {source}")]
pub struct TransportError {
    device: String,
    source: kvm_ioctls::Error,
}

impl Transport {
    /// A function in `slot` for `device`, which has been reset.
    pub fn new(
        vm: &Arc<VmFd>,
        router: &Arc<Router>,
        memory: &GuestMemoryMmap,
        slot: u8,
        device: &SharedDevice,
    ) -> Result<Transport, TransportError> {
        let live = lock(device);
        let failed = |source| TransportError {
            device: live.name().to_owned(),
            source,
        };
        let sizes = live.queue_sizes().to_vec();
        // One vector for configuration changes, one for each queue.
        let msix = Msix::new(router, sizes.len() as u16 + 1).map_err(failed)?;
        let notify = sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| failed(e.into()))?;
        let (config, msix_capability, window) = config_space(live.device_type(), slot, msix.vectors());
        drop(live);
        Ok(Transport {
            vm: vm.clone(),
            memory: memory.clone(),
            device: device.clone(),
            config,
            msix_capability,
            window,
            state: TransportState::new(&sizes),
            signals: Arc::new(Signals {
                msix,
                config_vector: AtomicU16::new(NO_VECTOR),
                queue_vectors: sizes.iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
                isr: AtomicU8::new(0),
                generation: AtomicU8::new(0),
            }),
            notify,
            phase: Phase::Running,
            registered: None,
        })
    }

    /// Follows the BAR: KVM raises queue notifications without the process's help where it is decoded.
    fn follow_bar(&mut self) {
        let decoded = self.config.decoded_bar();
        if decoded == self.registered {
            return;
        }
        if let Some(old) = self.registered.take() {
            self.for_each_notification(old, |vm, event, at| vm.unregister_ioevent(event, at, NoDatamatch));
        }
        if let Some(new) = decoded {
            self.for_each_notification(new, |vm, event, at| vm.register_ioevent(event, at, NoDatamatch));
            self.registered = Some(new);
        }
    }

    /// A failure costs speed only: the write then exits to [`Transport::write_bar`], which raises the event.
    fn for_each_notification(
        &self,
        bar: u64,
        act: impl Fn(&VmFd, &EventFd, &IoEventAddress) -> Result<(), kvm_ioctls::Error>,
    ) {
        for (index, event) in self.notify.iter().enumerate() {
            let address = bar + NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Err(error) = act(&self.vm, event, &IoEventAddress::Mmio(address)) {
                tracing::warn!(%error, address, "queue notification is handled in user space");
            }
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let state = &self.state;
        let queue = state.queues.get(usize::from(state.queue_select));
        let value: u64 = match offset {
            0x00 => u64::from(state.device_feature_select),
            0x04 => {
                let features = lock(&self.device).features();
                match state.device_feature_select {
                    0 => features & 0xffff_ffff,
                    1 => features >> 32,
                    _ => 0,
                }
            }
            0x08 => u64::from(state.driver_feature_select),
            0x0c => match state.driver_feature_select {
                0 => state.driver_features & 0xffff_ffff,
                1 => state.driver_features >> 32,
                _ => 0,
            },
            0x10 => u64::from(state.config_vector),
            0x12 => state.queues.len() as u64,
            0x14 => u64::from(state.status),
            0x15 => u64::from(self.signals.generation.load(Ordering::Acquire)),
            0x16 => u64::from(state.queue_select),
            0x18 => queue.map_or(0, |queue| u64::from(queue.size)),
            0x1a => queue.map_or(u64::from(NO_VECTOR), |queue| u64::from(queue.vector)),
            0x1c => queue.map_or(0, |queue| u64::from(queue.enabled)),
            0x1e => u64::from(state.queue_select),
            0x20 => queue.map_or(0, |queue| queue.descriptors),
            0x24 => queue.map_or(0, |queue| queue.descriptors >> 32),
            0x28 => queue.map_or(0, |queue| queue.driver),
            0x2c => queue.map_or(0, |queue| queue.driver >> 32),
            0x30 => queue.map_or(0, |queue| queue.device),
            0x34 => queue.map_or(0, |queue| queue.device >> 32),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(index).copied().unwrap_or(0);
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0u8; 8];
        let length = data.len().min(8);
        bytes[..length].copy_from_slice(&data[..length]);
        let value = u64::from_le_bytes(bytes);
        let word = value as u32;
        let half = value as u16;
        match offset {
            0x00 => self.state.device_feature_select = word,
            0x08 => self.state.driver_feature_select = word,
            0x0c => self.accept_features(word),
            0x10 => {
                self.state.config_vector = self.known_vector(half);
                self.signals
                    .config_vector
                    .store(self.state.config_vector, Ordering::Release);
            }
            0x14 => self.set_status(value as u8),
            0x16 => self.state.queue_select = half,
            0x1a => {
                let vector = self.known_vector(half);
                if let Some(slot) = self
                    .signals
                    .queue_vectors
                    .get(usize::from(self.state.queue_select))
                {
                    slot.store(vector, Ordering::Release);
                }
                self.with_queue(|queue| queue.vector = vector);
            }
            0x18 => self.with_idle_queue(|queue| {
                if half.is_power_of_two() && half <= queue.size {
                    queue.size = half;
                }
            }),
            0x1c => self.with_queue(|queue| queue.enabled |= half == 1),
            0x20 => self.with_idle_queue(|queue| set_low(&mut queue.descriptors, value, length)),
            0x24 => self.with_idle_queue(|queue| set_high(&mut queue.descriptors, word)),
            0x28 => self.with_idle_queue(|queue| set_low(&mut queue.driver, value, length)),
            0x2c => self.with_idle_queue(|queue| set_high(&mut queue.driver, word)),
            0x30 => self.with_idle_queue(|queue| set_low(&mut queue.device, value, length)),
            0x34 => self.with_idle_queue(|queue| set_high(&mut queue.device, word)),
            _ => {}
        }
    }

    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.signals.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn with_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        if let Some(queue) = self.state.queues.get_mut(usize::from(self.state.queue_select)) {
            change(queue);
        }
    }

    /// An enabled queue does not change (4.1.4.3.2).
    fn with_idle_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        self.with_queue(|queue| {
            if !queue.enabled {
                change(queue);
            }
        });
    }

    fn accept_features(&mut self, word: u32) {
        if self.state.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.state.driver_features;
        match self.state.driver_feature_select {
            0 => *features = *features & !0xffff_ffff | u64::from(word),
            1 => *features = *features & 0xffff_ffff | u64::from(word) << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.reset();
            return;
        }
        let added = status & !self.state.status;
        let mut status = status | self.state.status;
        if added & STATUS_FEATURES_OK != 0 {
            let offered = lock(&self.device).features();
            let accepted = self.state.driver_features;
            if accepted & !offered != 0 || accepted & VERSION_1 == 0 {
                // The driver reads the status back and gives up (3.1.1).
                status &= !STATUS_FEATURES_OK;
            }
        }
        self.state.status = status;
        if added & STATUS_DRIVER_OK != 0
            && let Err(error) = self.activate(None)
        {
            tracing::error!(%error, "the device does not start; its driver is told to reset it");
            self.state.status |= STATUS_NEEDS_RESET;
            self.signals.signal_config();
        }
    }

    /// Starts the device with the queues that the driver has enabled, and their progress if there is any.
    fn activate(&mut self, progress: Option<&[QueueProgress]>) -> Result<(), DeviceError> {
        let mut device = lock(&self.device);
        let name = device.name().to_owned();
        if self.state.status & STATUS_FEATURES_OK == 0 {
            return Err(DeviceError::NoFeatures { device: name });
        }
        let failed = |action| {
            let device = name.clone();
            move |source| DeviceError::Io {
                device,
                action,
                source,
            }
        };
        let mut queues = Vec::new();
        for (index, setup) in (0u16..).zip(&self.state.queues) {
            if !setup.enabled {
                continue;
            }
            let done = progress.and_then(|queues| queues.iter().find(|queue| queue.index == index));
            let queue = setup
                .queue(
                    &self.memory,
                    self.state.driver_features & RING_EVENT_IDX != 0,
                    done,
                )
                .map_err(|reason| failed("setting up a queue")(std::io::Error::other(reason)))?;
            let notify = self.notify[usize::from(index)]
                .try_clone()
                .map_err(failed("duplicating an eventfd"))?;
            queues.push(ActiveQueue { index, queue, notify });
        }
        device.activate(Activation {
            memory: self.memory.clone(),
            interrupt: self.signals.clone(),
            queues,
            features: self.state.driver_features,
            restored: progress.is_some(),
        })
    }

    fn reset(&mut self) {
        let mut device = lock(&self.device);
        device.reset();
        self.phase = Phase::Running;
        self.state = TransportState::new(device.queue_sizes());
        drop(device);
        for vector in &self.signals.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.signals.config_vector.store(NO_VECTOR, Ordering::Release);
        self.signals.isr.store(0, Ordering::Release);
    }

    /// Where the configuration access window points to, when a driver uses it.
    fn window_target(&self) -> Option<(u64, usize)> {
        let mut fields = [0u8; WINDOW_DATA];
        self.config.read(self.window, &mut fields);
        let word =
            |at: usize| u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]]);
        let length = word(WINDOW_LENGTH) as usize;
        (fields[WINDOW_BAR] == 0 && matches!(length, 1 | 2 | 4))
            .then_some((u64::from(word(WINDOW_OFFSET)), length))
    }
}

impl Function for Transport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window + WINDOW_DATA
            && let Some((target, length)) = self.window_target()
        {
            let length = length.min(data.len());
            self.read_bar(target, &mut data[..length]);
            return;
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        if offset == self.window + WINDOW_DATA
            && let Some((target, length)) = self.window_target()
        {
            self.write_bar(target, &data[..length.min(data.len())]);
        }
        let control = self.msix_capability + 2;
        if offset < control + 2 && offset + data.len() > control {
            let mut bytes = [0; 2];
            self.config.read(control, &mut bytes);
            self.signals.msix.set_control(u16::from_le_bytes(bytes));
        }
        self.follow_bar();
    }

    fn bar(&self) -> Option<(u64, u64)> {
        Some((self.config.decoded_bar()?, u64::from(BAR_SIZE)))
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % REGION_SIZE;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(byte)) = (within, data.first_mut()) {
                    *byte = self.signals.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => lock(&self.device).read_config(within, data),
            TABLE => self.signals.msix.read_table(within, data),
            PENDING => self.signals.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let within = offset % REGION_SIZE;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => lock(&self.device).write_config(within, data),
            NOTIFY => {
                let index = (within / u64::from(NOTIFY_MULTIPLIER)) as usize;
                if let Some(event) = self.notify.get(index) {
                    // A full counter means that it is raised already.
                    let _ = event.write(1);
                }
            }
            TABLE => self.signals.msix.write_table(within, data),
            _ => {}
        }
    }

    fn name(&self) -> String {
        lock(&self.device).name().to_owned()
    }

    fn suspend(&mut self) -> Result<(), DeviceError> {
        self.suspend_device()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.resume_device()
    }

    fn save(&self) -> Result<Envelope, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: &Envelope) -> Result<(), StateError> {
        self.restore_state(state)
    }
}

fn lock(device: &SharedDevice) -> MutexGuard<'_, Box<dyn VirtioDevice>> {
    // A device whose code panicked is not used further by its threads; its registers stay readable.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_low(field: &mut u64, value: u64, length: usize) {
    *field = match length {
        8 => value,
        _ => *field & !0xffff_ffff | value & 0xffff_ffff,
    };
}

fn set_high(field: &mut u64, word: u32) {
    *field = *field & 0xffff_ffff | u64::from(word) << 32;
}

/// Configuration space, and the offsets of the MSI-X and the configuration access capability in it.
fn config_space(device_type: u32, slot: u8, vectors: u16) -> (ConfigState, usize, usize) {
    const VENDOR: u16 = 0x1af4;
    const MODERN: u16 = 0x1040;
    let class = match device_type {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        // Others: "unassigned".
        _ => 0xff_00_00,
    };
    let mut config = ConfigState::new(Identity {
        vendor: VENDOR,
        device: MODERN + device_type as u16,
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: 0x1100,
    });
    config.set_memory_bar(bar_address(slot), BAR_SIZE);

    let mut body = Vec::from((vectors - 1).to_le_bytes());
    body.extend_from_slice(&(TABLE as u32).to_le_bytes());
    body.extend_from_slice(&(PENDING as u32).to_le_bytes());
    // Enable and function mask.
    let msix = config.add_capability(msix::CAPABILITY, &body, &[0, 0xc0]);

    for (kind, offset, length, extra) in [
        (1, COMMON, COMMON_SIZE, None),
        (2, NOTIFY, REGION_SIZE as u32, Some(NOTIFY_MULTIPLIER)),
        (3, ISR, 1, None),
        (4, DEVICE, REGION_SIZE as u32, None),
    ] {
        let body = capability(kind, offset as u32, length, extra);
        config.add_capability(VENDOR_SPECIFIC, &body, &[]);
    }
    let body = capability(5, 0, 0, Some(0));
    // Bar, offset, length and data are the driver's to write.
    let mut writable = vec![0u8; body.len()];
    writable[WINDOW_BAR - 2] = 0xff;
    writable[WINDOW_OFFSET - 2..].fill(0xff);
    let window = config.add_capability(VENDOR_SPECIFIC, &body, &writable);
    (config, msix, window)
}

const VENDOR_SPECIFIC: u8 = 9;

/// Body of `struct virtio_pci_cap` (4.1.4) after ID and next pointer.
fn capability(kind: u8, offset: u32, length: u32, extra: Option<u32>) -> Vec<u8> {
    let size = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    if let Some(extra) = extra {
        body.extend_from_slice(&extra.to_le_bytes());
    }
    body
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;
