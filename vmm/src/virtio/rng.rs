//! The virtio entropy device (virtio 1.2, 5.4): the guest's random numbers from the host's kernel.

use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::ring::Ring;
use super::worker::{Worker, drain, poll, poll_entry};

/// Device type (virtio 1.2, 5.4.1).
const DEVICE_TYPE: u32 = 4;

const QUEUE_SIZE: u16 = 64;

/// Most bytes given for one request. A driver must live with fewer than it asked for (5.4.6.1).
const MAX_REQUEST: u64 = 4096;

/// Gives the guest random numbers.
#[derive(Default)]
pub struct RngDevice {
    worker: Option<Worker<ActiveQueue>>,
}

impl RngDevice {
    /// A device that is not started.
    pub fn new() -> RngDevice {
        RngDevice::default()
    }
}

impl VirtioDevice for RngDevice {
    fn name(&self) -> &str {
        "rng"
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
                device: "rng".into(),
                got,
                needed: 1,
            });
        };
        let mut ring = Ring::new(
            "rng",
            &activation.memory,
            &activation.interrupt,
            queue,
            activation.features,
        );
        let worker = Worker::spawn("rng", move |stop| {
            run(&mut ring, &stop);
            ring.into_queue()
        })
        .map_err(|source| DeviceError::Io {
            device: "rng".into(),
            action: "starting a thread",
            source,
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).into_iter().collect()
    }
}

fn run(ring: &mut Ring, stop: &EventFd) {
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
    use crate::virtio::testing::{BUFFERS, TestDriver, readable, writable};

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
