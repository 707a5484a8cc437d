//! Gates: what stands between a device and the world, and can be closed for a time.
//!
//! A device asks its gate before each request ([`Gate::enter`]) and keeps the [`Pass`] until the request
//! has ended. Closing is complete when the last pass is returned, so that whoever closed a gate knows that
//! nothing passes it any more. A device that was refused leaves the request in its ring (or the frame in
//! its tap) and goes on when its waker is raised.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// A gate that is shared by the devices behind it and by those who may close it.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    drained: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    in_flight: usize,
    next_waker: u64,
    wakers: Vec<(u64, EventFd)>,
}

/// A closed gate still has requests in flight after the time given to it. The gate stays closed.
#[derive(Debug, thiserror::Error)]
#[error("{in_flight} requests are still in flight after {waited:?}")]
pub struct NotDrained {
    /// Requests that have not ended.
    pub in_flight: usize,
    /// How long was waited for them.
    pub waited: Duration,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Arc<Gate> {
        Arc::default()
    }

    /// Lets one request pass, or `None` while the gate is closed.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.in_flight += 1;
        Some(Pass { gate: self.clone() })
    }

    /// Whether the gate is closed (it may still have requests in flight: see [`Gate::drain`]).
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Closes the gate for new requests, at once; those in flight go on.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Waits until no request is in flight. Sensible on a closed gate only.
    pub fn drain(&self, timeout: Duration) -> Result<(), NotDrained> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while state.in_flight > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(NotDrained {
                    in_flight: state.in_flight,
                    waited: timeout,
                });
            };
            (state, _) = self
                .drained
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Opens the gate and raises every waker.
    pub fn open(&self) {
        let mut state = self.lock();
        state.closed = false;
        for (_, waker) in &state.wakers {
            // An eventfd refuses a write only when its counter is full, and then it is raised already.
            let _ = waker.write(1);
        }
    }

    /// Has `waker` raised at every opening until the subscription is dropped.
    pub fn subscribe(self: &Arc<Self>, waker: EventFd) -> Subscription {
        let mut state = self.lock();
        let id = state.next_waker;
        state.next_waker += 1;
        state.wakers.push((id, waker));
        Subscription {
            gate: self.clone(),
            id,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to carry out one request; returned when it is dropped.
#[must_use = "the request counts as ended when the pass is dropped"]
pub struct Pass {
    gate: Arc<Gate>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.gate.drained.notify_all();
        }
    }
}

/// A waker's registration at a gate; dropped, the waker is raised no more.
pub struct Subscription {
    gate: Arc<Gate>,
    id: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.gate.lock().wakers.retain(|(id, _)| *id != self.id);
    }
}

/// The gates of one virtual machine that devices stand behind. All disks share one write gate, all
/// interfaces one receive and one transmit gate.
#[derive(Clone, Default)]
pub struct Gates {
    /// Frames from the tap to the guest.
    pub receive: Arc<Gate>,
    /// Frames from the guest to the tap.
    pub transmit: Arc<Gate>,
    /// Block writes, discards, write-zeroes and flushes.
    pub write: Arc<Gate>,
}

/// Counters that devices raise and the control API reports. Shared by all devices of a machine.
#[derive(Debug, Default)]
pub struct Counters {
    /// Write, discard and write-zeroes requests completed on all disks. Raised before the request's pass
    /// is returned, so that a drained gate and this counter agree.
    pub block_writes: AtomicU64,
    /// Requests that wait at the closed write gate now.
    pub block_writes_held: AtomicU64,
    /// Frames delivered to the guest.
    pub frames_received: AtomicU64,
    /// Frames sent by the guest.
    pub frames_sent: AtomicU64,
    /// Frames that were dropped for want of guest buffers.
    pub frames_dropped: AtomicU64,
}

impl Counters {
    /// The counters as the control API reports them.
    pub fn report(&self) -> understudy_vmm_control::api::Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        understudy_vmm_control::api::Counters {
            block_writes: get(&self.block_writes),
            block_writes_held: get(&self.block_writes_held),
            frames_received: get(&self.frames_received),
            frames_sent: get(&self.frames_sent),
            frames_dropped: get(&self.frames_dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn a_closed_gate_admits_nobody_and_is_drained_when_the_last_pass_returns() {
        let gate = Gate::new();
        let pass = gate.enter().unwrap();
        gate.close();
        assert!(gate.enter().is_none());
        assert_eq!(gate.drain(Duration::ZERO).unwrap_err().in_flight, 1);
        let other = thread::spawn(move || drop(pass));
        gate.drain(SOON).unwrap();
        other.join().unwrap();
        gate.open();
        assert!(gate.enter().is_some());
    }

    #[test]
    fn opening_raises_wakers_until_their_subscription_is_dropped() {
        let gate = Gate::new();
        let waker = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let subscription = gate.subscribe(waker.try_clone().unwrap());
        gate.close();
        assert!(waker.read().is_err(), "closing wakes nobody");
        gate.open();
        assert_eq!(waker.read().unwrap(), 1);
        drop(subscription);
        gate.open();
        assert!(waker.read().is_err());
    }
}
