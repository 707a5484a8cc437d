//! One connection to a guest agent: the VMM's `CONNECT`, then hello and welcome.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use understudy_channel::{
    FrameError, Hello, PORT, Purpose, VERSION_MAX, VERSION_MIN, Welcome, read_frame, write_frame,
};

/// Longest answer of the VMM to `CONNECT`, in bytes.
const MAX_ANSWER: usize = 32;

/// Why a guest agent could not be asked, or did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The VMM's vsock socket is not there, or the guest does not listen (yet).
    #[error("the guest agent cannot be reached through {socket}: {source}")]
    Unreachable {
        /// The VMM's vsock socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The session broke, or what came is no message.
    #[error("the session with the guest agent failed: {0}")]
    Session(#[from] FrameError),
    /// No answer in time.
    #[error("the guest agent did not answer {what} within {seconds} s")]
    Silent {
        /// What was asked.
        what: String,
        /// How long was waited.
        seconds: u64,
    },
    /// No control session is open now.
    #[error("the guest agent is not connected; is it installed in the image (`understudy-guest install`)?")]
    NotConnected,
    /// The guest agent refused.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// The answer belongs to another question.
    #[error("the guest agent answered {what} with something else: {answer}")]
    Unexpected {
        /// What was asked.
        what: String,
        /// What came, shortened.
        answer: String,
    },
}

impl AgentError {
    /// Whether the guest answered and the answer was no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, AgentError::Refused(_))
    }
}

/// Connects to the guest agent behind `socket` and opens a session for `purpose`; `limit` bounds each wait.
pub fn dial(socket: &Path, purpose: Purpose, limit: Duration) -> Result<UnixStream, AgentError> {
    let unreachable = |source| AgentError::Unreachable {
        socket: socket.to_owned(),
        source,
    };
    let mut stream = connect(socket, limit).map_err(unreachable)?;
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        purpose,
    };
    write_frame(&mut stream, &hello)?;
    match read_frame::<Welcome>(&mut stream)? {
        Welcome::Accepted { version, .. } if (VERSION_MIN..=VERSION_MAX).contains(&version) => Ok(stream),
        Welcome::Accepted { version, .. } => Err(AgentError::Refused(format!(
            "it chose protocol version {version}, which was not offered"
        ))),
        Welcome::Refused(refusal) => Err(AgentError::Refused(refusal.reason)),
    }
}

fn connect(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    // Byte by byte: what follows the line belongs to the session.
    let mut answer = Vec::new();
    let mut byte = [0u8];
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_ANSWER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the VMM's answer has no end",
            ));
        }
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("nothing listens on vsock port {PORT} in the guest"),
            ));
        }
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        let text = String::from_utf8_lossy(&answer).trim().to_owned();
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
    }
    Ok(stream)
}

/// What is left until `deadline`, as a socket timeout: never zero, which would mean none.
pub(super) fn left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}
