//! The virtio block device (virtio 1.2, 5.2).

use std::cell::Cell;
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
use vm_memory::Bytes;

use super::disk::Disk;
use super::persist::BlockState;
use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS, Operation, Request};
use super::{BLOCK, SECTOR};
use crate::gate::{Counters, Gate, Subscription};
use crate::persist::{Envelope, StateError};
use crate::virtio::device::{Activation, DeviceError, QueueProgress, VirtioDevice};
use crate::virtio::ring::{Chain, Ring, read_config_bytes};
use crate::virtio::worker::{Service, Stop, Work, drain, poll, poll_entry};

/// Device type (virtio 1.2, 5.2.1).
const DEVICE_TYPE: u32 = 2;

/// Size of the one request queue.
const QUEUE_SIZE: u16 = 256;

/// How often a write that found the host's file system full is tried again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// Most failed requests that are logged between two resets.
const MAX_LOGGED: u32 = 20;

/// Shows a [`Disk`] to the guest. Requests are carried out by one thread, in order, but for writes that
/// wait: at the closed gate, or for room on the host. Reads pass those.
pub struct BlockDevice {
    name: String,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
    counters: Arc<Counters>,
    config: [u8; 60],
    service: Service<Requests>,
    /// Writes that waited when the session was saved, until the device is started with them.
    restored: Vec<Chain>,
}

impl BlockDevice {
    /// A device for `disk` whose writes stand behind `gate`.
    pub fn new(disk: Arc<Disk>, gate: Arc<Gate>, counters: Arc<Counters>) -> BlockDevice {
        let name = format!("blk-{}", disk.name());
        BlockDevice {
            service: Service::new(&name),
            restored: Vec::new(),
            name,
            config: config_space(&disk),
            disk,
            gate,
            counters,
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
            restored: _,
        } = activation;
        let got = queues.len();
        let Some(queue) = queues.pop() else {
            return Err(DeviceError::Queues {
                device: self.name.clone(),
                got,
                needed: 1,
            });
        };
        let waker = queue
            .notify
            .try_clone()
            .map_err(self.failed("duplicating an event"))?;
        let mut requests = Requests {
            name: self.name.clone(),
            disk: self.disk.clone(),
            gate: self.gate.clone(),
            counters: self.counters.clone(),
            ring: Ring::new(&self.name, &memory, &interrupt, queue, features),
            _opening: self.gate.subscribe(waker),
            held: VecDeque::new(),
            held_reported: 0,
            logged: Cell::new(0),
        };
        for chain in self.restored.drain(..) {
            requests.hold_again(chain);
        }
        self.service
            .start(requests)
            .map_err(self.failed("starting a thread"))
    }

    fn reset(&mut self) {
        self.service.stop();
        self.restored.clear();
    }

    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError> {
        let requests = self.service.suspend().map_err(|source| DeviceError::Panicked {
            device: self.name.clone(),
            source,
        })?;
        Ok(requests.iter().map(|requests| requests.ring.progress()).collect())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.service.resume().map_err(self.failed("starting a thread"))
    }

    fn save(&self) -> Result<Option<Envelope>, StateError> {
        let state = match self.service.suspended() {
            Some(requests) => BlockState::of(requests.held.iter().map(|held| &held.chain)),
            None => BlockState::of(&self.restored),
        };
        Envelope::seal(&self.name, &state).map(Some)
    }

    fn restore(&mut self, own: Option<&Envelope>, queues: &[QueueProgress]) -> Result<(), StateError> {
        let own = own.ok_or_else(|| StateError::unfit(&self.name, "it lacks the list of waiting writes"))?;
        let state: BlockState = own.open(&self.name)?;
        self.restored = state.check(&self.name, queues, QUEUE_SIZE)?;
        Ok(())
    }
}

impl BlockDevice {
    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> DeviceError + use<> {
        let device = self.name.clone();
        move |source| DeviceError::Io {
            device: device.clone(),
            action,
            source,
        }
    }
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

/// A write that waits, and the chain that it came in: what is saved of it.
struct Held {
    request: Request,
    chain: Chain,
}

/// The ring and all that its thread needs.
struct Requests {
    name: String,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
    counters: Arc<Counters>,
    ring: Ring,
    /// Raises the queue's event when the gate opens.
    _opening: Subscription,
    /// Writes that wait, in order.
    held: VecDeque<Held>,
    /// How many of them the counter knows.
    held_reported: u64,
    /// Failed requests that were logged.
    logged: Cell<u32>,
}

impl Work for Requests {
    fn run(&mut self, stop: &Stop) {
        loop {
            self.process(stop);
            let timeout = self.disk.is_full().then_some(FULL_RETRY);
            let mut fds = [
                poll_entry(stop.as_raw_fd(), libc::POLLIN),
                poll_entry(self.ring.event().as_raw_fd(), libc::POLLIN),
            ];
            if let Err(error) = poll(&mut fds, timeout) {
                tracing::error!(device = self.name, %error, "waiting for requests failed");
                return;
            }
            if fds[0].revents != 0 {
                return;
            }
            drain(self.ring.event());
        }
    }
}

impl Requests {
    /// Has a write that was saved wait again.
    fn hold_again(&mut self, chain: Chain) {
        // Only what was a request was held; a guest that changed it since has spoilt its own.
        match Request::parse(self.ring.memory(), &chain) {
            Some(request) => self.held.push_back(Held { request, chain }),
            None => self.ring.complete(chain.head, 0),
        }
    }

    /// Carries out what can be: first the writes that waited, then what the ring holds now.
    fn process(&mut self, stop: &Stop) {
        self.retry_held(stop);
        for _ in 0..self.ring.size() {
            // Not a request more once the thread shall end: who waits for it has paused the guest.
            if self.is_holding_too_much() || stop.is_asked() {
                break;
            }
            let Some(chain) = self.ring.next_chain() else {
                break;
            };
            match Request::parse(self.ring.memory(), &chain) {
                Some(request) => self.begin(Held { request, chain }),
                None => self.ring.complete(chain.head, 0),
            }
        }
        self.report_held(match self.gate.is_closed() {
            true => self.held.len() as u64,
            false => 0,
        });
        self.ring.notify_driver();
        if !self.is_holding_too_much() {
            self.ring.await_more();
        }
    }

    /// A well-behaved driver has no more requests out than the queue has entries; another one gets to
    /// wait, so that what it makes us keep is bounded.
    fn is_holding_too_much(&self) -> bool {
        self.held.len() >= self.ring.size()
    }

    fn retry_held(&mut self, stop: &Stop) {
        while !stop.is_asked() {
            let Some(held) = self.held.pop_front() else { return };
            match self.execute(&held.request) {
                Outcome::Done(status, written) => self.finish(&held.request, status, written),
                Outcome::Closed | Outcome::Full => {
                    self.held.push_front(held);
                    return;
                }
            }
        }
    }

    /// Carries out a request or has it wait behind those that wait already.
    fn begin(&mut self, new: Held) {
        if new.request.is_write() && !self.held.is_empty() {
            self.held.push_back(new);
            return;
        }
        match self.execute(&new.request) {
            Outcome::Done(status, written) => self.finish(&new.request, status, written),
            Outcome::Closed | Outcome::Full => self.held.push_back(new),
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
        let Some(buffers) = self.ring.buffers(&request.data) else {
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
                self.log_failure(request, &error);
                Outcome::Done(VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    /// Logs a failed request, but not for ever: the guest could fill the host's log with them.
    fn log_failure(&self, request: &Request, error: &io::Error) {
        let logged = self.logged.get();
        if logged < MAX_LOGGED {
            self.logged.set(logged + 1);
            tracing::warn!(device = self.name, operation = ?request.operation, %error, "a request failed");
        }
        if logged + 1 == MAX_LOGGED {
            tracing::warn!(
                device = self.name,
                "further failures are not logged until the device is reset"
            );
        }
    }

    fn finish(&mut self, request: &Request, status: u32, written: u32) {
        match self.ring.memory().write_obj(status as u8, request.status) {
            Ok(()) => self.ring.complete(request.head, written + 1),
            Err(_) => self.ring.complete(request.head, 0),
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

impl Drop for Requests {
    fn drop(&mut self) {
        // What waited is gone with its driver.
        self.report_held(0);
        self.disk.set_full(false);
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
