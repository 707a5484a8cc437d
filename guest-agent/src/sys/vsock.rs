//! Listening on vsock (`vsock(7)`), or on a unix socket where a test says so.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

/// How long a write may wait for the host before the session is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Where sessions come from.
#[derive(Debug)]
pub enum Listener {
    /// `AF_VSOCK`, any context id.
    Vsock(OwnedFd),
    /// A unix socket.
    Unix(UnixListener),
}

/// One session's byte stream.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Listener {
    /// Listens on a vsock port. The transport may arrive later: an early agent need not wait for it.
    pub fn vsock(port: u32) -> io::Result<Self> {
        // SAFETY: socket has no memory arguments; the result is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = libc::sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: port,
            svm_cid: libc::VMADDR_CID_ANY,
            svm_zero: [0; 4],
        };
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address outlives the call and its true length is given.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: listen has no memory arguments.
        if unsafe { libc::listen(fd.as_raw_fd(), 16) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::Vsock(fd))
    }

    /// Listens on a unix socket that only root may connect to; a stale one is replaced.
    pub fn unix(path: &Path) -> io::Result<Self> {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Self::Unix(listener))
    }

    /// Waits for the next session.
    pub fn accept(&self) -> io::Result<Stream> {
        let fd: OwnedFd = match self {
            Self::Unix(listener) => listener.accept()?.0.into(),
            Self::Vsock(fd) => loop {
                // SAFETY: no address is asked for, so both pointers may be null.
                let accepted = unsafe {
                    libc::accept4(
                        fd.as_raw_fd(),
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        libc::SOCK_CLOEXEC,
                    )
                };
                if accepted >= 0 {
                    // SAFETY: the descriptor was just made and belongs to nobody else.
                    break unsafe { OwnedFd::from_raw_fd(accepted) };
                }
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            },
        };
        rustix::net::sockopt::set_socket_timeout(
            &fd,
            rustix::net::sockopt::Timeout::Send,
            Some(SEND_TIMEOUT),
        )?;
        Ok(Stream(fd))
    }
}

impl Stream {
    /// A second handle on the same session.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Ends the session for whoever reads or writes it.
    pub fn shutdown(&self) {
        // It may be gone already, which is what is wanted.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// Limits how long a read may wait; `None` waits for ever.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&self.0, Timeout::Recv, timeout).map_err(Into::into)
    }
}

impl From<std::os::unix::net::UnixStream> for Stream {
    fn from(stream: std::os::unix::net::UnixStream) -> Self {
        Self(stream.into())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        rustix::io::read(&self.0, buffer).map_err(Into::into)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        rustix::net::send(&self.0, buffer, rustix::net::SendFlags::NOSIGNAL).map_err(Into::into)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
