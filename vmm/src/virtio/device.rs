//! What a virtio device is to the transport (virtio 1.2, section 2), and what the transport is to it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::worker::Panicked;
use crate::machine::memory::GuestMemoryMmap;
use crate::persist::{Envelope, StateError};

/// How a device tells its driver that something happened.
pub trait Interrupt: Send + Sync {
    /// The device used buffers of queue `index` (virtio 1.2, 2.9).
    fn signal_queue(&self, index: u16);
    /// The device's configuration changed (virtio 1.2, 2.5).
    fn signal_config(&self);
}

/// One queue as the driver has set it up, with the event that its notifications raise.
pub struct ActiveQueue {
    /// Index among the device's queues.
    pub index: u16,
    /// The ready queue.
    pub queue: Queue,
    /// Raised by the driver's notification (ioeventfd) and by the VMM when a gate opens.
    pub notify: EventFd,
}

/// How far a device is in one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueProgress {
    /// Index among the device's queues.
    pub index: u16,
    /// Position in the available ring of the next chain that the device takes, wrapping.
    pub next_avail: u16,
    /// Position in the used ring of the next chain that it returns, wrapping.
    pub next_used: u16,
}

impl QueueProgress {
    /// That of a queue that its device has stopped using for now.
    pub fn of(index: u16, queue: &Queue) -> QueueProgress {
        QueueProgress {
            index,
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// Chains that were taken and not returned.
    pub fn outstanding(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }
}

/// What a device gets when its driver sets DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Queues that the driver has enabled, in index order.
    pub queues: Vec<ActiveQueue>,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// Whether the driver is in the middle of a session that was saved, and the queues have progress.
    pub restored: bool,
}

/// Why a device could not start, be suspended or go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver enabled fewer queues than the device needs.
    #[error("{device}: the driver enabled {got} queues where {needed} are needed")]
    Queues {
        /// Name of the device.
        device: String,
        /// Queues enabled.
        got: usize,
        /// Queues needed.
        needed: usize,
    },
    /// A thread of the device is gone.
    #[error("{device}: {source}")]
    Panicked {
        /// Name of the device.
        device: String,
        /// What happened.
        source: Panicked,
    },
    /// Its driver started it in a way that the device does not know.
    #[error("{device}: the driver started it before features were agreed on")]
    NoFeatures {
        /// Name of the device.
        device: String,
    },
    /// An operating system resource failed.
    #[error("{device}: {action}: {source}")]
    Io {
        /// Name of the device.
        device: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// A virtio device behind the PCI transport. Its backend (file, tap, socket) outlives resets of the
/// driver and of the machine; its workers live from `activate` to `reset`, but for the time between `suspend`
/// and `resume`. A session that was saved goes on with `restore`, then `activate`.
pub trait VirtioDevice: Send {
    /// Name for logs, such as `blk-root`.
    fn name(&self) -> &str;
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// Features offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Device-specific configuration; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes to device-specific configuration; ignored where it is read-only.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts the workers.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Stops the workers, waits for in-flight requests, and forgets the driver.
    fn reset(&mut self);

    /// Stops the workers and waits for in-flight requests: afterwards nothing changes in guest RAM, and every
    /// chain is in the ring, returned, or among what [`VirtioDevice::save`] tells. Returns how far each queue
    /// is, in index order; nothing for a device that no driver has started. Asked again it answers the same.
    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError>;
    /// Goes on after [`VirtioDevice::suspend`] as if nothing had been.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// What a suspended device keeps beyond its queues' progress, if there is anything.
    fn save(&self) -> Result<Option<Envelope>, StateError> {
        Ok(None)
    }
    /// Takes over what [`VirtioDevice::save`] told, for the activation with these queues that follows.
    fn restore(&mut self, own: Option<&Envelope>, _queues: &[QueueProgress]) -> Result<(), StateError> {
        match own {
            None => Ok(()),
            Some(_) => Err(StateError::unfit(
                self.name(),
                "this device keeps nothing of its own",
            )),
        }
    }
}
