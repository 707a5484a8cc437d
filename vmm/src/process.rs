//! The process of one guest, from its configuration to its end.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use tracing_subscriber::EnvFilter;
use understudy_vmm_control::config::Role;

use crate::control::server::{self, Sockets};
use crate::machine::board::Event;
use crate::memory_restore::Userfault;
use crate::seccomp;
#[cfg(doc)]
use crate::supervisor::ResumeError;
use crate::supervisor::{Supervisor, validate};

/// Logs to stderr with UTC timestamps in microseconds; `RUST_LOG` selects, `info` is the default.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
}

/// Runs the guest of the configuration at `path`; `false` when it ended by a crash. The process has begun at
/// `started`.
///
/// # Errors
/// [`ResumeError::Refused`] among others, which has an exit code of its own.
pub fn run(path: &Path, started: Instant) -> Result<bool, Box<dyn Error>> {
    return_freed_memory();
    let config = validate::read(path)?;
    // Before the process is confined: afterwards it may not open one.
    let userfault = config.resume.is_some().then(Userfault::open);
    seccomp::confine()?;
    // Before any thread: all inherit the mask.
    let signals = block_stop_signals()?;
    tracing::info!(
        guest = config.guest,
        incarnation = config.incarnation,
        role = ?config.role,
        cpus = config.cpus,
        memory_mib = config.memory_mib,
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
    let control = config.paths.control.clone();
    let listener = server::bind(&control)
        .map_err(|error| format!("paths.control: listening on {}: {error}", control.display()))?;
    let _sockets = Sockets(vec![control, config.vsock.socket.clone()]);
    let role = config.role;
    let (supervisor, events) = match (config.resume.clone(), userfault) {
        (Some(resume), Some(userfault)) => Supervisor::resume(config, &resume, userfault, started)?,
        _ => {
            let (supervisor, events) = Supervisor::new(config)?;
            if role == Role::Active {
                supervisor.start()?;
            }
            (supervisor, events)
        }
    };
    stop_on_signal(signals, supervisor.events())?;
    supervisor.watch_lease()?;
    server::serve(listener, supervisor.clone())?;
    Ok(supervisor.run(&events))
}

/// Kernel and initrd pass through the heap at each boot; without these settings the allocator would keep
/// their tens of megabytes for the life of the process, and an arena for each thread.
fn return_freed_memory() {
    const LARGE: libc::c_int = 256 << 10;
    // SAFETY: mallopt takes no pointers; this runs before any other thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

fn block_stop_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: `set` is initialised by sigemptyset before any other use; all pointers are to locals.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(set),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// SIGTERM and SIGINT end the process as `PUT /v1/vm/stop` does.
fn stop_on_signal(set: libc::sigset_t, events: Sender<Event>) -> io::Result<()> {
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut signal = 0;
        // SAFETY: both pointers are to locals, and the set was initialised.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            if events.send(Event::Stop).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
