//! Threads of devices: they wait for events, and end when told so.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Tells a thread to end: its descriptor becomes readable and stays so.
pub struct Stop {
    event: EventFd,
    asked: Arc<AtomicBool>,
}

impl Stop {
    fn new() -> io::Result<Stop> {
        Ok(Stop {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            asked: Arc::default(),
        })
    }

    fn try_clone(&self) -> io::Result<Stop> {
        Ok(Stop {
            event: self.event.try_clone()?,
            asked: self.asked.clone(),
        })
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        // The counter of an eventfd that is written once cannot overflow.
        let _ = self.event.write(1);
    }

    /// Whether the thread shall end, for loops that would not look at the descriptor for long.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }
}

impl AsRawFd for Stop {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// A device's thread. It lives until [`Worker::stop`].
pub struct Worker<T> {
    stop: Stop,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `body`; it is given the event that asks it to end, and must watch it.
    pub fn spawn(name: &str, body: impl FnOnce(Stop) -> T + Send + 'static) -> io::Result<Worker<T>> {
        let stop = Stop::new()?;
        let event = stop.try_clone()?;
        // Linux keeps 15 bytes of a thread's name.
        let name: String = name.chars().take(15).collect();
        let thread = thread::Builder::new().name(name).spawn(move || body(event))?;
        Ok(Worker { stop, thread })
    }
}

impl<T> Worker<T> {
    /// Asks the thread to end and waits for it. `None` when it panicked, which is logged by then.
    pub fn stop(self) -> Option<T> {
        self.stop.ask();
        self.thread.join().ok()
    }
}

/// What a device's thread does. It can be stopped and go on where it was.
pub trait Work: Send + 'static {
    /// Works until `stop`. Afterwards nothing is in flight, and the driver was told of all that was done.
    fn run(&mut self, stop: &Stop);
}

/// The thread of a device panicked, so that what it did is not known. The panic is in the log.
#[derive(Debug, thiserror::Error)]
#[error("its thread panicked; reset the guest")]
pub struct Panicked;

/// A device's work and the thread that does it, if it is not suspended.
pub struct Service<W> {
    name: String,
    phase: Phase<W>,
}

enum Phase<W> {
    Idle,
    Running(Worker<Option<W>>),
    Suspended(W),
    Panicked,
}

impl<W: Work> Service<W> {
    /// Nothing to do yet. Threads get this name.
    pub fn new(name: &str) -> Service<W> {
        Service {
            name: name.to_owned(),
            phase: Phase::Idle,
        }
    }

    /// Starts `work`, in the place of what was done before.
    pub fn start(&mut self, work: W) -> io::Result<()> {
        self.stop();
        self.launch(work).inspect_err(|_| self.phase = Phase::Idle)
    }

    fn launch(&mut self, work: W) -> io::Result<()> {
        // Handed over once the thread is there, so that the work is not lost where there is none.
        let (give, take) = sync_channel(1);
        let worker = Worker::spawn(&self.name, move |stop| {
            let mut work: W = take.recv().ok()?;
            work.run(&stop);
            Some(work)
        });
        match worker {
            Ok(worker) => {
                // The thread lives until it has received it.
                let _ = give.send(work);
                self.phase = Phase::Running(worker);
                Ok(())
            }
            Err(error) => {
                self.phase = Phase::Suspended(work);
                Err(error)
            }
        }
    }

    /// Ends the thread and keeps the work; `None` where there is none. Asked again it does nothing.
    pub fn suspend(&mut self) -> Result<Option<&W>, Panicked> {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Running(worker) => match worker.stop().flatten() {
                Some(work) => Phase::Suspended(work),
                None => Phase::Panicked,
            },
            other => other,
        };
        match self.phase {
            Phase::Panicked => Err(Panicked),
            _ => Ok(self.suspended()),
        }
    }

    /// The work while it is suspended.
    pub fn suspended(&self) -> Option<&W> {
        match &self.phase {
            Phase::Suspended(work) => Some(work),
            _ => None,
        }
    }

    /// Goes on with suspended work. Asked again it does nothing.
    pub fn resume(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Suspended(work) => self.launch(work),
            other => {
                self.phase = other;
                Ok(())
            }
        }
    }
}

impl<W> Service<W> {
    /// Ends the thread and drops the work.
    pub fn stop(&mut self) {
        if let Phase::Running(worker) = std::mem::replace(&mut self.phase, Phase::Idle) {
            drop(worker.stop());
        }
    }
}

impl<W> Drop for Service<W> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes back everything that was signalled on a non-blocking event.
pub fn drain(event: &EventFd) {
    let _ = event.read();
}

/// Waits until one of `fds` has one of its `events`, or the time is over; fills in `revents`.
pub fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let millis = match timeout {
        // Rounded up, so that a short time is not busy waiting.
        Some(timeout) => timeout.as_millis().saturating_add(1).min(i32::MAX as u128) as libc::c_int,
        None => -1,
    };
    loop {
        // SAFETY: `fds` is a valid array of the given length for the duration of the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
        if ready >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// An entry for [`poll`].
pub fn poll_entry(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts how often it was run, and fails when told so.
    struct Count {
        runs: u32,
        fails: bool,
    }

    impl Work for Count {
        fn run(&mut self, stop: &Stop) {
            assert!(!self.fails, "told so");
            self.runs += 1;
            let mut fds = [poll_entry(stop.as_raw_fd(), libc::POLLIN)];
            poll(&mut fds, None).unwrap();
            assert!(stop.is_asked());
        }
    }

    #[test]
    fn work_that_was_suspended_goes_on_with_what_it_had() {
        let mut service = Service::new("count");
        assert!(service.suspend().unwrap().is_none());
        let work = Count {
            runs: 0,
            fails: false,
        };
        service.start(work).unwrap();
        for runs in 1..4 {
            assert_eq!(service.suspend().unwrap().unwrap().runs, runs);
            service.resume().unwrap();
        }
        service.stop();
        service.resume().unwrap();
        assert!(service.suspended().is_none());
    }

    #[test]
    fn work_whose_thread_panicked_is_not_suspended_but_can_be_begun_anew() {
        let mut service = Service::new("count");
        let work = Count { runs: 0, fails: true };
        service.start(work).unwrap();
        assert!(service.suspend().is_err());
        assert!(service.suspend().is_err(), "asked again");
        let work = Count {
            runs: 0,
            fails: false,
        };
        service.start(work).unwrap();
        assert_eq!(service.suspend().unwrap().unwrap().runs, 1);
    }
}
