//! The agent's own process: locked in memory, and ready in the eyes of systemd.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Locks the agent in memory, now and for all that it allocates later: while user land and file systems
/// are frozen nothing may be paged in or written out for it.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: mlockall has no memory arguments.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Tells systemd that the service is ready (`sd_notify(3)`); does nothing where nobody asked.
pub fn notify_ready() -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let socket = UnixDatagram::unbound()?;
    let bytes = path.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    socket.send_to_addr(b"READY=1", &address)?;
    Ok(())
}
