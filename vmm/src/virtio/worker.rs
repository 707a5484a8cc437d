//! Threads of devices: they wait for events, and end when told so.

use std::io;
use std::os::fd::RawFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A device's thread. It lives until [`Worker::stop`].
pub struct Worker<T> {
    stop: EventFd,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `body`; it is given the event that asks it to end, and must watch it.
    pub fn spawn(name: &str, body: impl FnOnce(EventFd) -> T + Send + 'static) -> io::Result<Worker<T>> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let event = stop.try_clone()?;
        // Linux keeps 15 bytes of a thread's name.
        let name: String = name.chars().take(15).collect();
        let thread = thread::Builder::new().name(name).spawn(move || body(event))?;
        Ok(Worker { stop, thread })
    }

    /// Asks the thread to end and waits for it. `None` when it panicked, which is logged by then.
    pub fn stop(self) -> Option<T> {
        // The counter of an eventfd that is written once cannot overflow.
        let _ = self.stop.write(1);
        self.thread.join().ok()
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
