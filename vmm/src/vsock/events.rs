//! The event queue: a guest that resumes from a saved session is told that its connections are gone.

use std::time::{Duration, Instant};

use crate::virtio::ring::Ring;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7) as `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The event queue, and whether the guest has heard what is to be told.
pub(super) struct Events {
    ring: Ring,
    reset: Reset,
}

/// How far the telling of a transport reset is.
enum Reset {
    /// Nothing is to be told, or it was heard.
    Heard,
    /// The guest has given no buffer for it.
    Owed { deadline: Instant },
    /// It is in the used ring. A driver that has read it offers the buffer again.
    Told { offered: u16, deadline: Instant },
}

impl Events {
    /// The queue of a driver that has to be told of nothing; or of a transport reset, for which it is
    /// waited so long.
    pub(super) fn new(ring: Ring, reset: Option<Duration>) -> Events {
        let reset = match reset {
            None => Reset::Heard,
            Some(patience) => Reset::Owed {
                deadline: Instant::now() + patience,
            },
        };
        Events { ring, reset }
    }

    /// The queue.
    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Tells a transport reset that is to be told. Returns how long the guest should hear of nothing else:
    /// its driver resets all connections that it has when it reads the event, and says nothing to us, so
    /// that a connection made a moment before would be dead on its side alone. A driver that does not use
    /// its event queue as others do is not waited for without end.
    pub(super) fn tell_transport_reset(&mut self) -> Option<Duration> {
        if let Reset::Owed { deadline } = self.reset {
            for _ in 0..self.ring.size() {
                let Some(chain) = self.ring.next_chain() else {
                    break;
                };
                let written = self
                    .ring
                    .buffers(&chain.writable)
                    .filter(|buffer| buffer.len() >= TRANSPORT_RESET.len() as u64)
                    .map_or(0, |buffer| buffer.copy_from(&TRANSPORT_RESET));
                if written > 0 {
                    // Before it is told, so that no answer is missed.
                    let offered = self.ring.offered();
                    self.reset = Reset::Told { offered, deadline };
                }
                self.ring.complete(chain.head, written as u32);
                self.ring.notify_driver();
                if written > 0 {
                    break;
                }
            }
            if matches!(self.reset, Reset::Owed { .. }) {
                self.ring.await_more();
            }
        }
        let deadline = match self.reset {
            Reset::Heard => return None,
            Reset::Owed { deadline } => deadline,
            Reset::Told { offered, deadline } => {
                if self.ring.arm_beyond(offered) {
                    self.reset = Reset::Heard;
                    return None;
                }
                deadline
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}
