//! A driver for tests of devices: it owns guest memory and speaks split rings.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, Interrupt, QueueProgress, VirtioDevice};
use crate::machine::memory::GuestMemoryMmap;
use crate::persist::{Envelope, StateError};

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

    /// How many chains were offered.
    pub(crate) fn offered(&self) -> u16 {
        self.available
    }

    /// How many chains the device has returned.
    pub(crate) fn returned(&mut self) -> u16 {
        self.collect();
        self.used
    }

    /// Whether the used ring's index is marked as written, and its first element.
    pub(crate) fn is_marked_used(&self, driver: &TestDriver) -> bool {
        driver.is_marked(self.used_ring() + 2, 2 + 8)
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
    features: u64,
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
            features,
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
        device.activate(driver.activation(&[])).unwrap();
        driver
    }

    fn activation(&self, progress: &[QueueProgress]) -> Activation {
        let queues = (0u16..).zip(&self.queues).map(|(index, queue)| {
            let mut live = queue.queue();
            if let Some(done) = progress.iter().find(|done| done.index == index) {
                live.set_next_avail(done.next_avail);
                live.set_next_used(done.next_used);
            }
            ActiveQueue {
                index,
                queue: live,
                notify: queue.notify.try_clone().unwrap(),
            }
        });
        Activation {
            memory: self.memory.clone(),
            interrupt: self.interrupt.clone(),
            queues: queues.collect(),
            features: self.features,
            restored: !progress.is_empty(),
        }
    }

    /// Has a fresh device take over a state, without starting it.
    pub(crate) fn restore(device: &mut dyn VirtioDevice, state: &TestState) -> Result<(), StateError> {
        device.restore(state.own.as_ref(), &state.queues)
    }

    /// Starts a device that has taken over a state.
    pub(crate) fn go_on(&self, device: &mut dyn VirtioDevice, state: &TestState) {
        device.activate(self.activation(&state.queues)).unwrap();
        for (index, queue) in (0u16..).zip(&self.queues) {
            // As the transport does.
            queue.notify.write(1).unwrap();
            self.interrupt.signal_queue(index);
        }
    }

    /// Forgets what was written into guest memory.
    pub(crate) fn forget_writes(&self) {
        for region in self.memory.iter() {
            MmapRegion::bitmap(region).reset();
        }
    }

    /// Whether all pages of a range are marked as written.
    pub(crate) fn is_marked(&self, address: u64, len: usize) -> bool {
        let region = self.memory.iter().next().unwrap();
        (address..address + len as u64).all(|at| MmapRegion::bitmap(region).is_addr_set(at as usize))
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

/// What is saved of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TestState {
    pub(crate) queues: Vec<QueueProgress>,
    pub(crate) own: Option<Envelope>,
}

impl TestState {
    /// Suspends a device and saves it.
    pub(crate) fn of(device: &mut dyn VirtioDevice) -> TestState {
        TestState {
            queues: device.suspend().unwrap(),
            own: device.save().unwrap(),
        }
    }
}

/// A device with its driver, for [`suspendable_tests`].
pub(crate) trait Suspendable {
    /// The device as its driver has started it.
    fn new() -> Self;
    /// The device and its driver.
    fn parts(&mut self) -> (&mut dyn VirtioDevice, &mut TestDriver);
    /// Puts a fresh device of the same configuration in the place of this one, which is gone before.
    fn renew(&mut self);
    /// Something that a driver does, chosen by any number. It is over when this returns, or waits.
    fn act(&mut self, choice: u8);
    /// Puts requests into the ring whose end [`Suspendable::finish`] waits for.
    fn begin(&mut self);
    /// Waits until what was begun has ended, and checks that it did so once.
    fn finish(&mut self);
}

/// What holds for every device that is suspended, saved and restored.
macro_rules! suspendable_tests {
    ($bench:ty) => {
        mod suspendable {
            use proptest::prelude::*;

            use super::*;
            use crate::virtio::testing::{Suspendable, TestDriver, TestState};

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(24))]

                #[test]
                fn saved_restored_and_saved_again_the_state_is_the_same(
                    actions in prop::collection::vec(any::<u8>(), 0..12)
                ) {
                    let mut bench = <$bench as Suspendable>::new();
                    for action in actions {
                        bench.act(action);
                    }
                    let saved = TestState::of(bench.parts().0);
                    prop_assert_eq!(&TestState::of(bench.parts().0), &saved, "suspended twice");
                    bench.renew();
                    TestDriver::restore(bench.parts().0, &saved).unwrap();
                    prop_assert_eq!(bench.parts().0.save().unwrap(), saved.own.clone(), "before it runs");
                    let (device, driver) = bench.parts();
                    driver.go_on(device, &saved);
                    prop_assert_eq!(TestState::of(bench.parts().0), saved, "after it ran");
                }

                #[test]
                fn no_state_of_its_own_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
                    let mut bench = <$bench as Suspendable>::new();
                    let saved = TestState::of(bench.parts().0);
                    bench.renew();
                    let part = "probe";
                    for own in [
                        crate::persist::Envelope::from_bytes(part, &bytes).ok(),
                        Some(crate::persist::Envelope::raw(1, bytes)),
                        None,
                    ] {
                        let state = TestState { own, ..saved.clone() };
                        if TestDriver::restore(bench.parts().0, &state).is_ok() {
                            bench.parts().0.save().unwrap();
                        }
                    }
                }
            }

            #[test]
            fn requests_in_the_ring_end_once_after_it_was_suspended() {
                let mut bench = <$bench as Suspendable>::new();
                bench.parts().0.suspend().unwrap();
                bench.begin();
                bench.parts().0.suspend().unwrap();
                bench.parts().0.resume().unwrap();
                bench.parts().0.resume().unwrap();
                bench.finish();
            }

            #[test]
            fn requests_in_the_ring_end_once_in_a_device_that_took_over() {
                let mut bench = <$bench as Suspendable>::new();
                bench.begin();
                let saved = TestState::of(bench.parts().0);
                bench.begin();
                bench.renew();
                TestDriver::restore(bench.parts().0, &saved).unwrap();
                let (device, driver) = bench.parts();
                driver.go_on(device, &saved);
                bench.finish();
            }
        }
    };
}

pub(crate) use suspendable_tests;
