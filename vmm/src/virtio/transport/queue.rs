//! What a driver has programmed into the transport's registers.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::NO_VECTOR;
use crate::machine::memory::GuestMemoryMmap;
use crate::virtio::device::QueueProgress;

/// One queue as the driver has programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// MSI-X vector.
    pub vector: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the driver area (available ring).
    pub driver: u64,
    /// Address of the device area (used ring).
    pub device: u64,
}

impl QueueSetup {
    /// The queue, with what was done in it; why there is none where the driver's addresses make none.
    pub(super) fn queue(
        &self,
        memory: &GuestMemoryMmap,
        event_idx: bool,
        done: Option<&QueueProgress>,
    ) -> Result<Queue, String> {
        let misplaced = |error: virtio_queue::Error| format!("the driver placed it wrongly: {error}");
        let mut queue = Queue::new(self.size).map_err(|error| error.to_string())?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(misplaced)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .map_err(misplaced)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .map_err(misplaced)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err("the driver placed it outside of RAM".to_owned());
        }
        if let Some(done) = done {
            queue.set_next_avail(done.next_avail);
            queue.set_next_used(done.next_used);
        }
        Ok(queue)
    }
}

/// State of the transport's registers, apart from configuration space and MSI-X.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Device status.
    pub status: u8,
    /// Selector of `device_feature`.
    pub device_feature_select: u32,
    /// Selector of `driver_feature`.
    pub driver_feature_select: u32,
    /// Features that the driver accepts.
    pub driver_features: u64,
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// Selected queue.
    pub queue_select: u16,
    /// Queues.
    pub queues: Vec<QueueSetup>,
}

impl TransportState {
    /// After a reset, for queues of at most these sizes.
    pub(super) fn new(queue_sizes: &[u16]) -> TransportState {
        TransportState {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|size| QueueSetup {
                    size: *size,
                    vector: NO_VECTOR,
                    enabled: false,
                    descriptors: 0,
                    driver: 0,
                    device: 0,
                })
                .collect(),
        }
    }
}
