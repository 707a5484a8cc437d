//! A device's side of one queue: chains come out, used buffers go back, and a driver that breaks its
//! ring is ignored until it resets the device.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::buffers::{Buffers, MAX_PIECES};
use super::device::{ActiveQueue, Interrupt, QueueProgress};
use crate::machine::memory::GuestMemoryMmap;

/// A descriptor chain, copied out of guest memory once, so that the driver cannot change it under us.
#[derive(Clone, Debug)]
pub struct Chain {
    /// What is returned in the used ring.
    pub head: u16,
    /// Device-readable pieces in order.
    pub readable: Vec<(GuestAddress, u32)>,
    /// Device-writable pieces in order.
    pub writable: Vec<(GuestAddress, u32)>,
    /// Whether all readable pieces come before the writable ones (virtio 1.2, 2.7.4.2).
    pub ordered: bool,
}

/// One queue of a running device.
pub struct Ring {
    device: String,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
    queue: ActiveQueue,
    /// Used index when the driver was last considered.
    signalled: u16,
    broken: bool,
}

impl Ring {
    /// Takes over a queue that the driver has set up with `features`.
    pub fn new(
        device: &str,
        memory: &GuestMemoryMmap,
        interrupt: &Arc<dyn Interrupt>,
        mut queue: ActiveQueue,
        features: u64,
    ) -> Ring {
        queue
            .queue
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let signalled = queue.queue.next_used();
        Ring {
            device: device.to_owned(),
            memory: memory.clone(),
            interrupt: interrupt.clone(),
            queue,
            signalled,
            broken: false,
        }
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The event of the driver's notifications.
    pub fn event(&self) -> &vmm_sys_util::eventfd::EventFd {
        &self.queue.notify
    }

    /// Number of entries.
    pub fn size(&self) -> usize {
        usize::from(self.queue.queue.size())
    }

    /// Whether the driver broke the ring, so that nothing more comes out of it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Buffers for pieces of a chain; `None` where they are not in RAM.
    pub fn buffers(&self, pieces: &[(GuestAddress, u32)]) -> Option<Buffers<'_>> {
        Buffers::from_guest(&self.memory, pieces)
    }

    /// Takes the next chain that the driver offers.
    pub fn next_chain(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let mut descriptors = match self.queue.queue.iter(&self.memory) {
            Ok(mut chains) => chains.next()?,
            Err(error) => {
                self.give_up(&error);
                return None;
            }
        };
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
            ordered: true,
        };
        for descriptor in descriptors.by_ref().take(MAX_PIECES + 2) {
            let piece = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                chain.writable.push(piece);
            } else {
                chain.ordered &= chain.writable.is_empty();
                chain.readable.push(piece);
            }
        }
        Some(chain)
    }

    /// Puts the chain that was taken last back; several times, the ones before it.
    pub fn put_back(&mut self) {
        self.queue.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with the number of bytes written to it.
    pub fn complete(&mut self, head: u16, written: u32) {
        self.complete_all(&[(head, written)]);
    }

    /// Returns several chains at once: the driver sees all of them or none, as it must for a frame that
    /// was merged from several buffers (virtio 1.2, 5.1.6.4).
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) {
        if self.broken {
            return;
        }
        if let Err(error) = self.publish(chains) {
            self.give_up(&error);
        }
    }

    fn publish(&mut self, chains: &[(u16, u32)]) -> Result<(), Error> {
        let queue = &mut self.queue.queue;
        let at = |offset: u64| {
            let address = queue.used_ring().checked_add(offset);
            address.map(GuestAddress).ok_or(Error::AddressOverflow)
        };
        let mut index = queue.next_used();
        for &(head, written) in chains {
            if head >= queue.size() {
                return Err(Error::InvalidDescriptorIndex);
            }
            // Index of the head, then the length (virtio 1.2, 2.7.8), both little-endian.
            let element = (u64::from(head) | u64::from(written) << 32).to_le();
            let entry = at(4 + 8 * u64::from(index % queue.size()))?;
            self.memory
                .write_obj(element, entry)
                .map_err(Error::GuestMemory)?;
            index = index.wrapping_add(1);
        }
        // Released after the elements, so that the driver reads no element that is not written.
        self.memory
            .store(index.to_le(), at(2)?, Ordering::Release)
            .map_err(Error::GuestMemory)?;
        queue.set_next_used(index);
        Ok(())
    }

    /// Tells the driver about returned chains, if it wants to know.
    pub fn notify_driver(&mut self) {
        if self.broken {
            return;
        }
        match self.needs_notification() {
            Ok(true) => self.interrupt.signal_queue(self.queue.index),
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }

    /// Whether the driver wants to know of what was returned since the last time (virtio 1.2, 2.7.7.2).
    fn needs_notification(&mut self) -> Result<bool, Error> {
        let queue = &self.queue.queue;
        let new = queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(false);
        }
        // The index was written before what the driver wants is read, or both sides wait for each other.
        fence(Ordering::SeqCst);
        let load = |offset: u64| {
            let address = queue.avail_ring().checked_add(offset);
            self.memory
                .load(
                    GuestAddress(address.ok_or(Error::AddressOverflow)?),
                    Ordering::Relaxed,
                )
                .map(u16::from_le)
                .map_err(Error::GuestMemory)
        };
        if !queue.event_idx_enabled() {
            return Ok(load(0)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let wanted = load(4 + 2 * u64::from(queue.size()))?;
        Ok(new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks for a notification of the next chain. Where one is there already the queue's event is raised, so
    /// that a driver that never stops does not keep the device's thread from its other events.
    pub fn await_more(&mut self) {
        if self.arm() {
            // An eventfd refuses a write only when it is raised already.
            let _ = self.queue.notify.write(1);
        }
    }

    /// Asks for a notification of the next chain; `true` where one is there already.
    pub fn arm(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.queue.enable_notification(&self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.give_up(&error);
                false
            }
        }
    }

    /// Asks for a notification when the driver offers anything beyond `offered`, whether or not what it had
    /// offered before was taken; `true` where it has already.
    pub fn arm_beyond(&mut self, offered: u16) -> bool {
        self.arm();
        let queue = &self.queue.queue;
        if queue.event_idx_enabled() {
            // avail_event, behind the used ring (virtio 1.2, 2.7.8).
            let address = queue.used_ring().checked_add(4 + 8 * u64::from(queue.size()));
            let stored = address.ok_or(Error::AddressOverflow).and_then(|address| {
                self.memory
                    .store(offered.to_le(), GuestAddress(address), Ordering::Relaxed)
                    .map_err(Error::GuestMemory)
            });
            if let Err(error) = stored {
                self.give_up(&error);
            }
        }
        // It was asked for before it is looked, or both sides wait for each other.
        fence(Ordering::SeqCst);
        self.offered() != offered
    }

    /// Position in the available ring of the next chain that the driver will offer, wrapping. It moves with
    /// every chain that the driver offers.
    pub fn offered(&mut self) -> u16 {
        match self.queue.queue.avail_idx(&self.memory, Ordering::Acquire) {
            Ok(index) => index.0,
            Err(error) => {
                self.give_up(&error);
                0
            }
        }
    }

    /// How far the device is.
    pub fn progress(&self) -> QueueProgress {
        QueueProgress::of(self.queue.index, &self.queue.queue)
    }

    fn give_up(&mut self, error: &Error) {
        tracing::error!(device = self.device, queue = self.queue.index, %error,
            "the driver broke its ring; ignoring it until reset");
        self.broken = true;
    }
}

/// Reads `data.len()` bytes of a configuration space at `offset`; what lies beyond its end is zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let available = &config[start..];
    let take = available.len().min(data.len());
    data[..take].copy_from_slice(&available[..take]);
}
