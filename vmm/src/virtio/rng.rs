//! The virtio entropy device (virtio 1.2, 5.4): the guest's random numbers from the host's kernel.

use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::device::{Activation, DeviceError, QueueProgress, VirtioDevice};
use super::ring::Ring;
use super::worker::{Service, Stop, Work, drain, poll, poll_entry};

/// Device type (virtio 1.2, 5.4.1).
const DEVICE_TYPE: u32 = 4;

const QUEUE_SIZE: u16 = 64;

/// Most bytes given for one request. A driver must live with fewer than it asked for (5.4.6.1).
const MAX_REQUEST: u64 = 4096;

const NAME: &str = "rng";

/// Gives the guest random numbers. It keeps nothing: what was not given is asked for in the ring.
pub struct RngDevice {
    service: Service<Requests>,
}

impl Default for RngDevice {
    fn default() -> RngDevice {
        RngDevice {
            service: Service::new(NAME),
        }
    }
}

impl RngDevice {
    /// A device that is not started.
    pub fn new() -> RngDevice {
        RngDevice::default()
    }
}

impl VirtioDevice for RngDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let got = activation.queues.len();
        let Some(queue) = activation.queues.pop() else {
            return Err(DeviceError::Queues {
                device: NAME.into(),
                got,
                needed: 1,
            });
        };
        let ring = Ring::new(
            NAME,
            &activation.memory,
            &activation.interrupt,
            queue,
            activation.features,
        );
        self.service.start(Requests(ring)).map_err(no_thread)
    }

    fn reset(&mut self) {
        self.service.stop();
    }

    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError> {
        let requests = self.service.suspend().map_err(|source| DeviceError::Panicked {
            device: NAME.into(),
            source,
        })?;
        Ok(requests.iter().map(|requests| requests.0.progress()).collect())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.service.resume().map_err(no_thread)
    }
}

fn no_thread(source: io::Error) -> DeviceError {
    DeviceError::Io {
        device: NAME.into(),
        action: "starting a thread",
        source,
    }
}

/// The ring of requests.
struct Requests(Ring);

impl Work for Requests {
    fn run(&mut self, stop: &Stop) {
        run(&mut self.0, stop);
    }
}

fn run(ring: &mut Ring, stop: &Stop) {
    loop {
        for _ in 0..ring.size() {
            let Some(chain) = ring.next_chain() else { break };
            let written = ring.buffers(&chain.writable).map_or(0, |buffers| {
                let mut bytes = vec![0; buffers.len().min(MAX_REQUEST) as usize];
                match fill_random(&mut bytes) {
                    Ok(()) => buffers.copy_from(&bytes) as u32,
                    Err(error) => {
                        tracing::error!(%error, "the host's kernel gives no random numbers");
                        0
                    }
                }
            });
            ring.complete(chain.head, written);
        }
        ring.notify_driver();
        ring.await_more();
        let mut fds = [
            poll_entry(stop.as_raw_fd(), libc::POLLIN),
            poll_entry(ring.event().as_raw_fd(), libc::POLLIN),
        ];
        if let Err(error) = poll(&mut fds, None) {
            tracing::error!(%error, "waiting for requests of random numbers failed");
            return;
        }
        if fds[0].revents != 0 {
            return;
        }
        drain(ring.event());
    }
}

fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the pointer and length describe a live, writable buffer.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, Suspendable, TestDriver, readable, suspendable_tests, writable};

    struct Bench {
        device: RngDevice,
        driver: TestDriver,
        begun: Vec<u16>,
    }

    impl Suspendable for Bench {
        fn new() -> Bench {
            let mut device = RngDevice::new();
            let driver = TestDriver::start(&mut device, 1 << VIRTIO_RING_F_EVENT_IDX);
            Bench {
                device,
                driver,
                begun: Vec::new(),
            }
        }

        fn parts(&mut self) -> (&mut dyn VirtioDevice, &mut TestDriver) {
            (&mut self.device, &mut self.driver)
        }

        fn renew(&mut self) {
            self.device = RngDevice::new();
        }

        fn act(&mut self, choice: u8) {
            let head = self.driver.queues[0].offer(&[writable(BUFFERS, u32::from(choice))]);
            self.driver.queues[0].wait_used(head);
        }

        fn begin(&mut self) {
            for _ in 0..5 {
                self.begun
                    .push(self.driver.queues[0].offer(&[writable(BUFFERS, 16)]));
            }
        }

        fn finish(&mut self) {
            for head in self.begun.drain(..) {
                assert_eq!(self.driver.queues[0].wait_used(head), 16);
            }
            let queue = &mut self.driver.queues[0];
            assert_eq!(queue.returned(), queue.offered(), "each once");
        }
    }

    suspendable_tests!(Bench);

    #[test]
    fn what_it_writes_is_marked() {
        let mut device = RngDevice::new();
        let mut driver = TestDriver::start(&mut device, 0);
        driver.forget_writes();
        let at = BUFFERS + 0x1ff0;
        let head = driver.queues[0].offer(&[writable(at, 0x20)]);
        driver.queues[0].wait_used(head);
        device.suspend().unwrap();
        assert!(driver.is_marked(at, 0x20) && driver.queues[0].is_marked_used(&driver));
        assert!(!driver.is_marked(BUFFERS, 1), "what it did not write is not");
    }

    #[test]
    fn buffers_come_back_filled_with_numbers_that_differ() {
        let mut device = RngDevice::new();
        let mut driver = TestDriver::start(&mut device, 0);
        let head = driver.queues[0].offer(&[writable(BUFFERS, 20), writable(BUFFERS + 100, 12)]);
        assert_eq!(driver.queues[0].wait_used(head), 32);
        let first = driver.read(BUFFERS, 20);
        assert_ne!(
            first,
            driver.read(BUFFERS + 20, 20),
            "what was not asked for stays zero"
        );
        assert_eq!(driver.read(BUFFERS + 20, 80), [0; 80]);
        let head = driver.queues[0].offer(&[writable(BUFFERS, 20)]);
        driver.queues[0].wait_used(head);
        assert_ne!(driver.read(BUFFERS, 20), first);
    }

    #[test]
    fn greedy_and_malformed_requests_are_answered() {
        let mut device = RngDevice::new();
        let mut driver = TestDriver::start(&mut device, 0);
        for (piece, expected) in [
            (writable(BUFFERS, 1 << 20), MAX_REQUEST as u32),
            (writable(u64::MAX - 10, 100), 0),
            (readable(BUFFERS, 100), 0),
        ] {
            let head = driver.queues[0].offer(&[piece]);
            assert_eq!(driver.queues[0].wait_used(head), expected);
        }
    }
}
