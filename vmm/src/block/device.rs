//! The virtio block device (virtio 1.2, 5.2).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::Buffers;
use super::disk::Disk;
use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS, Operation, Request};
use super::{BLOCK, SECTOR};
use crate::gate::{Counters, Gate};
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, Interrupt, VirtioDevice};
use crate::virtio::worker::{Worker, drain, poll, poll_entry};

/// Device type (virtio 1.2, 5.2.1).
const DEVICE_TYPE: u32 = 2;

/// Size of the one request queue.
const QUEUE_SIZE: u16 = 256;

/// How often a write that found the host's file system full is tried again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// Shows a [`Disk`] to the guest. Requests are carried out by one thread, in order, but for writes that
/// wait: at the closed gate, or for room on the host. Reads pass those.
pub struct BlockDevice {
    name: String,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
    counters: Arc<Counters>,
    config: [u8; 60],
    worker: Option<Worker<ActiveQueue>>,
}

impl BlockDevice {
    /// A device for `disk` whose writes stand behind `gate`.
    pub fn new(disk: Arc<Disk>, gate: Arc<Gate>, counters: Arc<Counters>) -> BlockDevice {
        BlockDevice {
            name: format!("blk-{}", disk.name()),
            config: config_space(&disk),
            disk,
            gate,
            counters,
            worker: None,
        }
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
fn config_space(disk: &Disk) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    // Two descriptors of a chain are header and status.
    put(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // 4 KiB physical blocks, so that guests align to what layers keep.
    put(24, &[(BLOCK / SECTOR).trailing_zeros() as u8]);
    put(26, &((BLOCK / SECTOR) as u16).to_le_bytes());
    let segments = (MAX_SEGMENTS as u32).to_le_bytes();
    put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
    put(40, &segments);
    put(44, &((BLOCK / SECTOR) as u32).to_le_bytes());
    put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
    put(52, &segments);
    // write_zeroes_may_unmap
    put(56, &[1]);
    config
}

impl VirtioDevice for BlockDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if self.disk.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            interrupt,
            mut queues,
            features,
        } = activation;
        let got = queues.len();
        let Some(mut queue) = queues.pop() else {
            return Err(DeviceError::Queues {
                device: self.name.clone(),
                got,
                needed: 1,
            });
        };
        queue
            .queue
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let io = |action| {
            let device = self.name.clone();
            move |source| DeviceError::Io {
                device,
                action,
                source,
            }
        };
        let waker = queue.notify.try_clone().map_err(io("duplicating an event"))?;
        let mut ring = Ring {
            name: self.name.clone(),
            disk: self.disk.clone(),
            gate: self.gate.clone(),
            counters: self.counters.clone(),
            memory,
            interrupt,
            queue,
            held: VecDeque::new(),
            held_reported: 0,
            broken: false,
        };
        let subscription = self.gate.subscribe(waker);
        let worker = Worker::spawn(&self.name, move |stop| {
            ring.run(&stop);
            drop(subscription);
            ring.report_held(0);
            ring.queue
        })
        .map_err(io("starting a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).into_iter().collect()
    }
}

/// Reads `data.len()` bytes of a configuration space at `offset`; what lies beyond its end is zero.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let available = &config[start..];
    let take = available.len().min(data.len());
    data[..take].copy_from_slice(&available[..take]);
}

/// What became of a request.
enum Outcome {
    /// It ended with this status, having written so many bytes of data.
    Done(u32, u32),
    /// The write gate is closed.
    Closed,
    /// The host's file system is full.
    Full,
}

/// The ring and all that its thread needs.
struct Ring {
    name: String,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
    counters: Arc<Counters>,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
    queue: ActiveQueue,
    /// Writes that wait, in order.
    held: VecDeque<Request>,
    /// How many of them the counter knows.
    held_reported: u64,
    /// The driver broke the ring; nothing more is read from it.
    broken: bool,
}

impl Ring {
    fn run(&mut self, stop: &EventFd) {
        let notify = match self.queue.notify.try_clone() {
            Ok(notify) => notify,
            Err(error) => {
                tracing::error!(device = self.name, %error, "cannot watch the queue");
                return;
            }
        };
        loop {
            self.process();
            let timeout = self.disk.is_full().then_some(FULL_RETRY);
            let mut fds = [
                poll_entry(stop.as_raw_fd(), libc::POLLIN),
                poll_entry(notify.as_raw_fd(), libc::POLLIN),
            ];
            if let Err(error) = poll(&mut fds, timeout) {
                tracing::error!(device = self.name, %error, "waiting for requests failed");
                return;
            }
            if fds[0].revents != 0 {
                return;
            }
            drain(&notify);
        }
    }

    /// Carries out what can be: first the writes that waited, then what the ring holds now.
    fn process(&mut self) {
        self.retry_held();
        if self.broken {
            return;
        }
        self.drain_ring();
        self.report_held(match self.gate.is_closed() {
            true => self.held.len() as u64,
            false => 0,
        });
        self.notify_driver();
        if self.broken || self.is_holding_too_much() {
            return;
        }
        match self.queue.queue.enable_notification(&self.memory) {
            // Not at once but by an event, so that a driver that never stops does not keep this thread from
            // seeing that it shall.
            Ok(true) => drop(self.queue.notify.write(1)),
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }

    fn drain_ring(&mut self) {
        for _ in 0..self.queue.queue.size() {
            if self.broken || self.is_holding_too_much() {
                return;
            }
            let chain = match self.queue.queue.iter(&self.memory) {
                Ok(mut chains) => chains.next(),
                Err(error) => return self.give_up(&error),
            };
            let Some(chain) = chain else { return };
            let head = chain.head_index();
            match Request::parse(&self.memory, chain) {
                Some(request) => self.begin(request),
                None => self.complete(head, 0),
            }
        }
    }

    /// A well-behaved driver has no more requests out than the queue has entries; another one gets to
    /// wait, so that what it makes us keep is bounded.
    fn is_holding_too_much(&self) -> bool {
        self.held.len() >= usize::from(self.queue.queue.size())
    }

    fn give_up(&mut self, error: &virtio_queue::Error) {
        tracing::error!(device = self.name, %error, "the driver broke its ring; ignoring it until reset");
        self.broken = true;
    }

    fn retry_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            match self.execute(&request) {
                Outcome::Done(status, written) => self.finish(&request, status, written),
                Outcome::Closed | Outcome::Full => {
                    self.held.push_front(request);
                    return;
                }
            }
        }
    }

    /// Carries out a request or has it wait behind those that wait already.
    fn begin(&mut self, request: Request) {
        if request.is_write() && !self.held.is_empty() {
            self.held.push_back(request);
            return;
        }
        match self.execute(&request) {
            Outcome::Done(status, written) => self.finish(&request, status, written),
            Outcome::Closed | Outcome::Full => self.held.push_back(request),
        }
    }

    fn execute(&self, request: &Request) -> Outcome {
        if !request.is_write() {
            return self.transfer(request);
        }
        let Some(pass) = self.gate.enter() else {
            return Outcome::Closed;
        };
        let outcome = self.transfer(request);
        let full = matches!(outcome, Outcome::Full);
        if full != self.disk.is_full() {
            self.disk.set_full(full);
            if full {
                tracing::warn!(
                    device = self.name,
                    "the host's file system is full: the guest's writes wait"
                );
            } else {
                tracing::info!(
                    device = self.name,
                    "the host's file system has room again: writes go on"
                );
            }
        }
        if matches!(outcome, Outcome::Done(VIRTIO_BLK_S_OK, _)) && request.is_counted() {
            self.counters.block_writes.fetch_add(1, Ordering::AcqRel);
        }
        // The counter first, so that whoever sees the gate drained sees this write counted.
        drop(pass);
        outcome
    }

    fn transfer(&self, request: &Request) -> Outcome {
        let Some(buffers) = Buffers::from_guest(&self.memory, &request.data) else {
            return Outcome::Done(VIRTIO_BLK_S_IOERR, 0);
        };
        let result = match &request.operation {
            Operation::Read(offset) => self.disk.read(&buffers, *offset),
            Operation::Write(offset) => self.disk.write(&buffers, *offset),
            Operation::Zero(ranges) => ranges
                .iter()
                .try_for_each(|&(offset, len)| self.disk.zero(offset, len)),
            Operation::Flush => self.disk.flush(),
            Operation::GetId => {
                // Padded with zeros; a name of 20 bytes has no terminator (virtio 1.2, 5.2.6.1).
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, from) in id.iter_mut().zip(self.disk.name().bytes()) {
                    *to = from;
                }
                let written = buffers.copy_from(&id) as u32;
                return Outcome::Done(VIRTIO_BLK_S_OK, written);
            }
            Operation::Unsupported => return Outcome::Done(VIRTIO_BLK_S_UNSUPP, 0),
            Operation::Invalid => return Outcome::Done(VIRTIO_BLK_S_IOERR, 0),
        };
        match result {
            Ok(()) if matches!(request.operation, Operation::Read(_)) => {
                Outcome::Done(VIRTIO_BLK_S_OK, request.data_len as u32)
            }
            Ok(()) => Outcome::Done(VIRTIO_BLK_S_OK, 0),
            Err(error) if is_full(&error) => Outcome::Full,
            Err(error) => {
                tracing::warn!(device = self.name, operation = ?request.operation, %error, "a request failed");
                Outcome::Done(VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    fn finish(&mut self, request: &Request, status: u32, written: u32) {
        match self.memory.write_obj(status as u8, request.status) {
            Ok(()) => self.complete(request.head, written + 1),
            Err(_) => self.complete(request.head, 0),
        }
    }

    fn complete(&mut self, head: u16, written: u32) {
        if let Err(error) = self.queue.queue.add_used(&self.memory, head, written) {
            self.give_up(&error);
        }
    }

    fn notify_driver(&mut self) {
        match self.queue.queue.needs_notification(&self.memory) {
            Ok(true) => self.interrupt.signal_queue(self.queue.index),
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }

    fn report_held(&mut self, held: u64) {
        let counter = &self.counters.block_writes_held;
        if held >= self.held_reported {
            counter.fetch_add(held - self.held_reported, Ordering::AcqRel);
        } else {
            counter.fetch_sub(self.held_reported - held, Ordering::AcqRel);
        }
        self.held_reported = held;
    }
}

/// Whether the host has no room: a condition that passes, not a failure of the disk.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
