//! What a virtio device is to the transport (virtio 1.2, section 2), and what the transport is to it.

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::memory::GuestMemoryMmap;

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
}

/// Why a device could not start or stop.
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
/// driver and of the machine; its workers live from `activate` to `reset`.
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
    /// Stops the workers, waits for in-flight requests and returns the queues with their progress
    /// (next available and used index), so that they can be saved or started again.
    fn reset(&mut self) -> Vec<ActiveQueue>;
}
