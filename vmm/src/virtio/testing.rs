//! A driver for tests of devices: it owns guest memory and speaks split rings.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::machine::memory::GuestMemoryMmap;

/// Nothing in a test takes longer, however busy the machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Size of the test's guest memory.
pub(crate) const MEMORY: u64 = 16 << 20;

/// Counts interrupts and wakes who waits for them.
#[derive(Default)]
pub(crate) struct TestInterrupt {
    signals: Mutex<u64>,
    signalled: Condvar,
}

impl Interrupt for TestInterrupt {
    fn signal_queue(&self, _index: u16) {
        *self.signals.lock().unwrap() += 1;
        self.signalled.notify_all();
    }

    fn signal_config(&self) {}
}

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        writable: false,
    }
}

pub(crate) fn writable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        writable: true,
    }
}

/// The driver's side of one queue.
pub(crate) struct TestQueue {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    available: u16,
    used: u16,
    next_descriptor: u16,
    done: HashMap<u16, u32>,
    notify: EventFd,
    interrupt: Arc<TestInterrupt>,
}

impl TestQueue {
    fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(8)
    }

    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.available_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_ready(true);
        queue
    }

    /// Offers a chain and rings the bell; returns its head.
    pub(crate) fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (i, piece) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            let next = (index + 1) % self.size;
            let more = i + 1 < pieces.len();
            let flags = u16::from(more) | if piece.writable { 2 } else { 0 };
            let at = GuestAddress(self.base + 16 * u64::from(index));
            self.memory.write_obj(piece.address, at).unwrap();
            self.memory.write_obj(piece.len, GuestAddress(at.0 + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
            self.next_descriptor = next;
        }
        self.offer_head(head);
        head
    }

    /// Puts `head` into the available ring, whatever it is.
    pub(crate) fn offer_head(&mut self, head: u16) {
        let entry = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Sets the available index, whatever it is, and rings the bell.
    pub(crate) fn set_available(&mut self, index: u16) {
        self.available = index;
        self.memory
            .store(index, GuestAddress(self.available_ring() + 2), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
        self.notify.write(1).unwrap();
    }

    fn collect(&mut self) {
        loop {
            let index: u16 = self
                .memory
                .load(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
                .unwrap();
            if self.used == index {
                return;
            }
            while self.used != index {
                let entry = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
                let id: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
                let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
                self.done.insert(id as u16, len);
                self.used = self.used.wrapping_add(1);
            }
            // used_event: the next interrupt that is wanted (virtio 1.2, 2.7.7.1). What came in between is
            // seen by the next round.
            let used_event = self.available_ring() + 4 + 2 * u64::from(self.size);
            self.memory
                .store(self.used, GuestAddress(used_event), Ordering::Release)
                .unwrap();
            fence(Ordering::SeqCst);
        }
    }

    /// Whether the device has returned `head`.
    pub(crate) fn is_used(&mut self, head: u16) -> bool {
        self.collect();
        self.done.contains_key(&head)
    }

    /// Length written for `head` if the device has returned it.
    pub(crate) fn poll_used(&mut self, head: u16) -> Option<u32> {
        self.collect();
        self.done.remove(&head)
    }

    /// Waits until the device has returned `head`, being woken by its interrupts alone.
    pub(crate) fn wait_used(&mut self, head: u16) -> u32 {
        let deadline = Instant::now() + SOON;
        let interrupt = self.interrupt.clone();
        let mut signals = interrupt.signals.lock().unwrap();
        loop {
            if let Some(len) = self.poll_used(head) {
                return len;
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .expect("the device has not returned the chain");
            signals = interrupt.signalled.wait_timeout(signals, left).unwrap().0;
        }
    }
}

/// A driver with its memory and queues. Queue rings lie in the first half of memory; the second half is
/// for the test's buffers.
pub(crate) struct TestDriver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) queues: Vec<TestQueue>,
    interrupt: Arc<TestInterrupt>,
}

/// Where a test's buffers start.
pub(crate) const BUFFERS: u64 = MEMORY / 2;

impl TestDriver {
    /// Sets up `device` with all its queues and the given features.
    pub(crate) fn start(device: &mut dyn VirtioDevice, features: u64) -> TestDriver {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut driver = TestDriver {
            memory,
            queues: Vec::new(),
            interrupt: Arc::default(),
        };
        for (index, &size) in device.queue_sizes().iter().enumerate() {
            driver.queues.push(TestQueue {
                memory: driver.memory.clone(),
                base: 0x10_000 * (index as u64 + 1),
                size,
                available: 0,
                used: 0,
                next_descriptor: 0,
                done: HashMap::new(),
                notify: EventFd::new(EFD_NONBLOCK).unwrap(),
                interrupt: driver.interrupt.clone(),
            });
        }
        let queues = driver
            .queues
            .iter()
            .enumerate()
            .map(|(index, queue)| ActiveQueue {
                index: index as u16,
                queue: queue.queue(),
                notify: queue.notify.try_clone().unwrap(),
            })
            .collect();
        device
            .activate(Activation {
                memory: driver.memory.clone(),
                interrupt: driver.interrupt.clone(),
                queues,
                features,
            })
            .unwrap();
        driver
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}
