//! The thread that moves frames between the rings and the backend.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use super::backend::{Backend, Shared};
use super::tap::{HEADER, MAX_FRAME};
use crate::gate::{Counters, Gates, Subscription};
use crate::virtio::buffers::{Buffers, MAX_PIECES};
use crate::virtio::device::QueueProgress;
use crate::virtio::ring::Ring;
use crate::virtio::worker::{Stop, Work, drain, poll, poll_entry};

/// Frames moved in one direction before the other one and the events get their turn.
const BUDGET: usize = 64;

/// A buffer for frames that the driver has offered and we hold ready.
struct Offer {
    head: u16,
    pieces: Vec<(GuestAddress, u32)>,
    len: usize,
}

/// All that the thread needs.
pub(super) struct Frames {
    shared: Arc<Shared>,
    gates: Gates,
    counters: Arc<Counters>,
    rx: Ring,
    tx: Ring,
    /// Whether a frame may be spread over several buffers.
    mergeable: bool,
    offers: VecDeque<Offer>,
    offered: usize,
    /// The tap takes no frame now.
    congested: bool,
    /// Raise the queues' events when the gates open.
    _openings: [Subscription; 2],
}

impl Work for Frames {
    fn run(&mut self, stop: &Stop) {
        if let Err(error) = self.work(stop) {
            tracing::error!(device = self.shared.name, %error, "the network device stopped working");
        }
        // Buffers that were held ready belong to the ring again. Frames that nobody read wait in the tap.
        for _ in self.offers.drain(..) {
            self.rx.put_back();
        }
        self.offered = 0;
    }
}

impl Frames {
    pub(super) fn new(
        shared: Arc<Shared>,
        gates: Gates,
        counters: Arc<Counters>,
        rx: Ring,
        tx: Ring,
        mergeable: bool,
        openings: [Subscription; 2],
    ) -> Frames {
        Frames {
            shared,
            gates,
            counters,
            rx,
            tx,
            mergeable,
            offers: VecDeque::new(),
            offered: 0,
            congested: false,
            _openings: openings,
        }
    }

    /// How far both queues are.
    pub(super) fn progress(&self) -> Vec<QueueProgress> {
        vec![self.rx.progress(), self.tx.progress()]
    }

    fn work(&mut self, stop: &Stop) -> io::Result<()> {
        // Whether frames wait for us: read while there are any, as poll tells.
        let mut readable = true;
        // The backend is out of order (its tap was deleted), and polling it would only spin.
        let mut dead = false;
        loop {
            // Kept until after poll, so that its descriptor is not another one by then.
            let backend = self.shared.backend().clone();
            if readable {
                readable = self.receive();
            }
            self.transmit();
            let wants_frames = !readable && !self.gates.receive.is_closed() && self.is_ready_for_a_frame();
            let events = match (wants_frames, self.congested) {
                (true, true) => libc::POLLIN | libc::POLLOUT,
                (true, false) => libc::POLLIN,
                (false, true) => libc::POLLOUT,
                (false, false) => 0,
            };
            let fd = match backend.fd() {
                Some(fd) if events != 0 && !dead => fd,
                // Poll passes over negative descriptors.
                _ => -1,
            };
            let mut fds = [
                poll_entry(stop.as_raw_fd(), libc::POLLIN),
                poll_entry(self.shared.changed.as_raw_fd(), libc::POLLIN),
                poll_entry(self.rx.event().as_raw_fd(), libc::POLLIN),
                poll_entry(self.tx.event().as_raw_fd(), libc::POLLIN),
                poll_entry(fd, events),
            ];
            let timeout = readable.then_some(std::time::Duration::ZERO);
            poll(&mut fds, timeout)?;
            if fds[0].revents != 0 {
                return Ok(());
            }
            if fds[1].revents != 0 {
                drain(&self.shared.changed);
                (readable, self.congested, dead) = (true, false, false);
            }
            if fds[2].revents != 0 {
                drain(self.rx.event());
                readable = true;
            }
            if fds[3].revents != 0 {
                drain(self.tx.event());
            }
            readable |= fds[4].revents & libc::POLLIN != 0;
            if fds[4].revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0
                && fds[4].revents & libc::POLLIN == 0
            {
                tracing::error!(
                    device = self.shared.name,
                    "the interface's backend is gone; was its tap deleted?"
                );
                dead = true;
            }
            if fds[4].revents & (libc::POLLOUT | libc::POLLERR) != 0 {
                self.congested = false;
            }
        }
    }

    /// Whether the largest frame would fit into the buffers that are held ready.
    fn is_ready_for_a_frame(&self) -> bool {
        match self.mergeable {
            // A ring that is full of small buffers has to do.
            true => self.offered >= MAX_FRAME || self.offers.len() >= self.rx.size(),
            false => !self.offers.is_empty(),
        }
    }

    /// Takes buffers from the ring until a frame of any size fits.
    fn prepare(&mut self) -> bool {
        loop {
            if self.is_ready_for_a_frame() {
                return true;
            }
            let Some(chain) = self.rx.next_chain() else {
                if self.rx.arm() {
                    continue;
                }
                return false;
            };
            let len: usize = chain.writable.iter().map(|&(_, len)| len as usize).sum();
            let usable = self
                .rx
                .buffers(&chain.writable)
                .is_some_and(|b| b.len() >= HEADER as u64);
            if !usable {
                // What cannot hold even a header is returned empty; in order, so all before it first.
                self.return_unused(chain.head);
                continue;
            }
            self.offered += len;
            self.offers.push_back(Offer {
                head: chain.head,
                pieces: chain.writable,
                len,
            });
        }
    }

    /// Returns a useless buffer to its driver.
    fn return_unused(&mut self, head: u16) {
        self.rx.complete(head, 0);
        self.rx.notify_driver();
    }

    /// Moves frames to the guest; whether more may be waiting.
    fn receive(&mut self) -> bool {
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(pass) = self.gates.receive.enter() else {
                // Opening the gate raises the queue's event.
                more = false;
                break;
            };
            if !self.prepare() {
                more = false;
                break;
            }
            let received = self.receive_one();
            drop(pass);
            match received {
                Ok(true) => {}
                Ok(false) => {
                    more = false;
                    break;
                }
                Err(error) => {
                    tracing::warn!(device = self.shared.name, %error, "receiving a frame failed");
                    more = false;
                    break;
                }
            }
        }
        self.rx.notify_driver();
        more && !self.rx.is_broken()
    }

    fn receive_one(&mut self) -> io::Result<bool> {
        let mut pieces = Vec::new();
        let mut room = 0;
        for offer in &self.offers {
            if pieces.len() + offer.pieces.len() > MAX_PIECES {
                break;
            }
            pieces.extend_from_slice(&offer.pieces);
            room += offer.len;
            if room >= MAX_FRAME || !self.mergeable {
                break;
            }
        }
        let Some(buffers) = self.rx.buffers(&pieces) else {
            return Ok(false);
        };
        let len = {
            let backend = self.shared.backend();
            let received = match backend.as_ref() {
                Backend::Tap(tap) => tap.receive(&buffers),
                Backend::Isolated(isolated) => isolated.receive(&buffers),
                Backend::Given(_) => return Ok(false),
            };
            match received {
                Ok(len) => len.min(room),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        };
        let mut used = Vec::new();
        let mut rest = len;
        for offer in &self.offers {
            let take = rest.min(offer.len);
            used.push((offer.head, take as u32));
            rest -= take;
            if rest == 0 {
                break;
            }
        }
        // num_buffers (virtio 1.2, 5.1.6.4): 1 where merging was not negotiated.
        buffers.part(10, 2).copy_from(&(used.len() as u16).to_le_bytes());
        self.rx.complete_all(&used);
        for offer in self.offers.drain(..used.len()) {
            self.offered -= offer.len;
        }
        self.counters.frames_received.fetch_add(1, Ordering::AcqRel);
        Ok(true)
    }

    /// Moves frames from the guest.
    fn transmit(&mut self) {
        let mut closed = false;
        for _ in 0..BUDGET {
            if self.congested {
                closed = true;
                break;
            }
            let Some(pass) = self.gates.transmit.enter() else {
                // The frames stay in the ring; opening the gate raises the queue's event.
                closed = true;
                break;
            };
            let backend = self.shared.backend();
            if matches!(backend.as_ref(), Backend::Given(_)) {
                closed = true;
                break;
            }
            let Some(chain) = self.tx.next_chain() else { break };
            let sent = match Buffers::from_guest(self.tx.memory(), &chain.readable) {
                Some(frame) if (HEADER + 14..=MAX_FRAME).contains(&(frame.len() as usize)) => {
                    match backend.as_ref() {
                        Backend::Tap(tap) => tap.send(&frame).map(|_| true),
                        Backend::Isolated(isolated) => Ok(isolated.send(&frame)),
                        Backend::Given(_) => Ok(false),
                    }
                }
                // Not a frame.
                _ => Ok(false),
            };
            drop(backend);
            match sent {
                Ok(true) => {
                    self.counters.frames_sent.fetch_add(1, Ordering::AcqRel);
                    self.shared.note_sent();
                }
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tx.put_back();
                    self.congested = true;
                    closed = true;
                    break;
                }
                // A header that the kernel refuses, or a tap that is down: as a wire would lose it.
                Err(error) => tracing::debug!(device = self.shared.name, %error, "a frame was not sent"),
            }
            self.tx.complete(chain.head, 0);
            drop(pass);
        }
        self.tx.notify_driver();
        if !closed {
            self.tx.await_more();
        }
    }
}
