//! Saving, checking and restoring a virtio function.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{
    NO_VECTOR, Phase, RING_EVENT_IDX, STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET, Transport,
    TransportState, VERSION_1, lock,
};
use crate::pci::msix::MsixState;
use crate::persist::{Envelope, State, StateError, ensure};
use crate::virtio::device::{DeviceError, QueueProgress, VirtioDevice};

/// Bytes of device-specific configuration that are compared.
const CONFIG: usize = 64;

/// State of a virtio function, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionState {
    /// PCI configuration space with the BAR and the command register.
    #[serde(with = "serde_bytes")]
    config_space: Vec<u8>,
    /// MSI-X.
    msix: MsixState,
    /// The transport's registers.
    registers: TransportState,
    /// Interrupt status.
    isr: u8,
    /// `config_generation`.
    generation: u8,
    /// The device.
    device: DeviceState,
}

impl State for FunctionState {
    const VERSION: u32 = 1;
}

/// The device behind the function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceState {
    /// Its type.
    kind: u32,
    /// Start of its configuration: size of the disk, MAC address, CID. A driver has read it, so that it must
    /// be the same when the session goes on.
    #[serde(with = "serde_bytes")]
    config: Vec<u8>,
    /// What a driver has started.
    active: Option<ActiveState>,
}

/// A device that a driver has started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActiveState {
    /// How far it is in the queues that are enabled, in index order.
    queues: Vec<QueueProgress>,
    /// What it keeps beyond that.
    own: Option<Envelope>,
}

impl Transport {
    /// Whether a driver has started the device, as the status tells.
    fn is_active(state: &TransportState) -> bool {
        state.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    pub(super) fn suspend_device(&mut self) -> Result<(), DeviceError> {
        if matches!(self.phase, Phase::Running) {
            let queues = lock(&self.device).suspend()?;
            self.phase = Phase::Suspended(queues);
        }
        Ok(())
    }

    pub(super) fn resume_device(&mut self) -> Result<(), DeviceError> {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => Ok(()),
            Phase::Suspended(queues) => {
                let resumed = lock(&self.device).resume();
                resumed.inspect_err(|_| self.phase = Phase::Suspended(queues))
            }
            Phase::Restored(queues) => self.start_restored(&queues).inspect_err(|_| {
                self.phase = Phase::Restored(queues.clone());
            }),
        }
    }

    fn start_restored(&mut self, queues: &[QueueProgress]) -> Result<(), DeviceError> {
        if !Self::is_active(&self.state) {
            return Ok(());
        }
        self.activate(Some(queues))?;
        for queue in queues {
            let index = queue.index;
            // Notifications that KVM had taken and the device had not seen were not saved.
            if let Some(event) = self.notify.get(usize::from(index)) {
                // A full counter means that it is raised already.
                let _ = event.write(1);
            }
            // Nor was a message that was on its way to a vCPU.
            self.raise_queue(index);
        }
        self.signals
            .msix
            .raise(self.signals.config_vector.load(Ordering::Acquire));
        Ok(())
    }

    fn raise_queue(&self, index: u16) {
        if let Some(vector) = self.signals.queue_vectors.get(usize::from(index)) {
            self.signals.msix.raise(vector.load(Ordering::Acquire));
        }
    }

    pub(super) fn save_state(&self) -> Result<Envelope, StateError> {
        let device = lock(&self.device);
        let name = device.name();
        let queues = match &self.phase {
            Phase::Running => {
                return Err(StateError::Running {
                    part: name.to_owned(),
                });
            }
            Phase::Suspended(queues) | Phase::Restored(queues) => queues,
        };
        let active = match Self::is_active(&self.state) {
            true => Some(ActiveState {
                queues: queues.clone(),
                own: device.save()?,
            }),
            false => None,
        };
        let state = FunctionState {
            config_space: self.config.save(),
            msix: self.signals.msix.save(),
            registers: self.state.clone(),
            isr: self.signals.isr.load(Ordering::Acquire),
            generation: self.signals.generation.load(Ordering::Acquire),
            device: DeviceState {
                kind: device.device_type(),
                config: config_bytes(device.as_ref()),
                active,
            },
        };
        Envelope::seal(name, &state)
    }

    pub(super) fn restore_state(&mut self, state: &Envelope) -> Result<(), StateError> {
        let mut device = lock(&self.device);
        let name = device.name().to_owned();
        let state: FunctionState = state.open(&name)?;
        // All is looked at before anything is changed.
        self.config.check(&name, &state.config_space)?;
        let control = self.msix_capability + 2;
        let control = u16::from_le_bytes([state.config_space[control], state.config_space[control + 1]]);
        self.signals.msix.check(&name, &state.msix, control)?;
        check_device(&name, &state.device, device.as_ref())?;
        self.check_registers(&name, &state, device.as_ref())?;
        let queues = match &state.device.active {
            Some(active) => {
                self.check_queues(&name, &state.registers, &active.queues)?;
                device.restore(active.own.as_ref(), &active.queues)?;
                active.queues.clone()
            }
            None => Vec::new(),
        };
        drop(device);
        self.config.restore(&name, &state.config_space)?;
        self.signals.msix.restore(&name, &state.msix)?;
        self.signals
            .config_vector
            .store(state.registers.config_vector, Ordering::Release);
        for (vector, queue) in self.signals.queue_vectors.iter().zip(&state.registers.queues) {
            vector.store(queue.vector, Ordering::Release);
        }
        self.signals.isr.store(state.isr, Ordering::Release);
        self.signals.generation.store(state.generation, Ordering::Release);
        self.state = state.registers;
        self.phase = Phase::Restored(queues);
        self.follow_bar();
        Ok(())
    }

    /// Whether the registers can be those of this function, for a driver that behaved in whatever way.
    fn check_registers(
        &self,
        name: &str,
        state: &FunctionState,
        device: &dyn VirtioDevice,
    ) -> Result<(), StateError> {
        let registers = &state.registers;
        let offered = device.features();
        let agreed = registers.status & STATUS_FEATURES_OK != 0;
        let accepted = registers.driver_features;
        ensure(
            !agreed || accepted & !offered == 0 && accepted & VERSION_1 != 0,
            name,
            || format!("its driver uses features {accepted:#x}, and {offered:#x} are offered"),
        )?;
        let active = Self::is_active(registers);
        ensure(
            active == state.device.active.is_some() && (agreed || !active),
            name,
            || {
                format!(
                    "device status {:#x} does not say whether a driver has started it",
                    registers.status
                )
            },
        )?;
        let vectors = self.signals.msix.vectors();
        let known = |vector: u16| vector < vectors || vector == NO_VECTOR;
        ensure(known(registers.config_vector), name, || {
            format!("it has no MSI-X vector {}", registers.config_vector)
        })?;
        let sizes = device.queue_sizes();
        ensure(registers.queues.len() == sizes.len(), name, || {
            format!("it has {} queues, not {}", sizes.len(), registers.queues.len())
        })?;
        for (index, (queue, largest)) in registers.queues.iter().zip(sizes).enumerate() {
            ensure(known(queue.vector), name, || {
                format!("it has no MSI-X vector {} for queue {index}", queue.vector)
            })?;
            ensure(
                queue.size.is_power_of_two() && queue.size <= *largest,
                name,
                || {
                    format!(
                        "queue {index} cannot have {} entries; at most {largest}",
                        queue.size
                    )
                },
            )?;
        }
        Ok(())
    }

    /// Whether the device can be so far in the queues that its driver has enabled.
    fn check_queues(
        &self,
        name: &str,
        registers: &TransportState,
        progress: &[QueueProgress],
    ) -> Result<(), StateError> {
        let event_idx = registers.driver_features & RING_EVENT_IDX != 0;
        let mut progress = progress.iter();
        for (index, setup) in (0u16..).zip(&registers.queues).filter(|(_, setup)| setup.enabled) {
            let found = progress.next().filter(|found| found.index == index);
            let Some(found) = found else {
                return Err(StateError::unfit(
                    name,
                    format!("the progress of queue {index} is missing"),
                ));
            };
            setup
                .queue(&self.memory, event_idx, Some(found))
                .map_err(|reason| StateError::unfit(name, format!("queue {index}: {reason}")))?;
            ensure(found.outstanding() <= setup.size, name, || {
                format!(
                    "queue {index} of {} entries cannot have {} requests that were not returned",
                    setup.size,
                    found.outstanding()
                )
            })?;
        }
        ensure(progress.next().is_none(), name, || {
            "it has progress in a queue that its driver has not enabled".to_owned()
        })
    }
}

fn check_device(name: &str, saved: &DeviceState, device: &dyn VirtioDevice) -> Result<(), StateError> {
    ensure(saved.kind == device.device_type(), name, || {
        format!(
            "it is a device of type {}, not {}",
            device.device_type(),
            saved.kind
        )
    })?;
    ensure(saved.config == config_bytes(device), name, || {
        "its configuration (size of the disk, MAC address or CID) is not that of the saved session".to_owned()
    })
}

fn config_bytes(device: &dyn VirtioDevice) -> Vec<u8> {
    let mut bytes = vec![0; CONFIG];
    device.read_config(0, &mut bytes);
    bytes
}

#[cfg(test)]
#[path = "persist_test.rs"]
mod tests;
