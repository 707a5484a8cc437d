//! Opening a session: the VMM's `CONNECT`, then the channel's first exchange.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use understudy_channel::{
    FrameError, Hello, PORT, Purpose, VERSION_MAX, VERSION_MIN, Welcome, read_frame, write_frame,
};

/// Longest answer of the VMM to `CONNECT`.
const MAX_GREETING: usize = 64;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The VMM's vsock socket did not take us to the guest's port: no VMM, or no agent that listens.
    #[error("no guest agent on vsock port {PORT} behind {socket}: {source}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Frames failed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The guest agent refused.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// Something that is not in the protocol.
    #[error("the guest agent broke the protocol: {0}")]
    Protocol(String),
}

/// An open session.
#[derive(Debug)]
pub struct Session {
    /// The stream, in blocking mode with time limits as set at [`connect`].
    pub stream: UnixStream,
    /// Version of the protocol that both speak.
    pub version: u32,
    /// Version of the guest agent's package.
    pub agent: String,
}

/// Connects to the guest agent behind the VMM's vsock `socket`. `limit` bounds each read and write of the
/// exchange, and of the session until it is changed.
pub fn connect(socket: &Path, purpose: Purpose, limit: Duration) -> Result<Session, SessionError> {
    let failed = |source| SessionError::Connect {
        socket: socket.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    stream.set_write_timeout(Some(limit)).map_err(failed)?;
    stream
        .write_all(format!("CONNECT {PORT}\n").as_bytes())
        .map_err(failed)?;
    greeting(&mut stream).map_err(failed)?;
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        purpose,
    };
    write_frame(&mut stream, &hello)?;
    match read_frame(&mut stream)? {
        Welcome::Accepted { version, agent } if (VERSION_MIN..=VERSION_MAX).contains(&version) => {
            Ok(Session {
                stream,
                version,
                agent: agent.chars().take(64).collect(),
            })
        }
        Welcome::Accepted { version, .. } => Err(SessionError::Protocol(format!(
            "it speaks version {version}, {VERSION_MIN} to {VERSION_MAX} were offered"
        ))),
        Welcome::Refused(refusal) => Err(SessionError::Refused(refusal.reason)),
    }
}

/// Reads `OK <n>\n` byte by byte: what follows belongs to the guest.
fn greeting(stream: &mut UnixStream) -> io::Result<()> {
    let mut line = Vec::new();
    let mut byte = [0u8];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "nothing listens in the guest",
            ));
        }
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
        if line.len() > MAX_GREETING {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    if line.starts_with(b"OK ") {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected greeting {:?}", String::from_utf8_lossy(&line)),
    ))
}
