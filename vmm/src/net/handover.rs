//! How taps change hands: the old owner sends their descriptors to the new one's handover socket.
//!
//! One connection carries all taps: for each a message of [`MESSAGE`] bytes with one descriptor
//! (`SCM_RIGHTS`), then the receiver answers with one byte, so that the giver knows they have arrived.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::tap::Tap;
use crate::virtio::worker::{Stop, Worker, poll, poll_entry};

/// Version of the message.
const VERSION: u16 = 1;

/// Length of the message: magic, version, index, number of taps, reserved, MAC, reserved, features.
const MESSAGE: usize = 28;

const MAGIC: &[u8; 4] = b"UTAP";

/// The answer of a receiver that has everything.
const TAKEN: u8 = b'K';

/// Most interfaces of a guest.
const MAX_TAPS: u16 = 64;

/// How long the other side may be silent.
const PATIENCE: Duration = Duration::from_secs(5);

/// A tap on its way.
#[derive(Debug)]
pub struct GivenTap {
    /// Index among the guest's interfaces.
    pub index: u16,
    /// MAC address of the interface, which both sides must agree on.
    pub mac: [u8; 6],
    /// Features that the giver's guest had negotiated; for the log only, the receiver applies its own.
    pub features: u64,
    /// The tap.
    pub fd: OwnedFd,
}

/// Sends taps to the handover socket of the new owner; when this returns it has them.
pub fn give(socket: &Path, taps: &[GivenTap]) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    for tap in taps {
        let message = encode(tap, taps.len() as u16);
        let sent = stream
            .send_with_fds(&[message.as_slice()], &[tap.fd.as_raw_fd()])
            .map_err(io::Error::from)?;
        if sent != MESSAGE {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    if taps.is_empty() {
        return Ok(());
    }
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    match answer {
        [TAKEN] => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the new owner refused the taps; its log says why",
        )),
    }
}

fn encode(tap: &GivenTap, count: u16) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    message[..4].copy_from_slice(MAGIC);
    message[4..6].copy_from_slice(&VERSION.to_le_bytes());
    message[6..8].copy_from_slice(&tap.index.to_le_bytes());
    message[8..10].copy_from_slice(&count.to_le_bytes());
    message[12..18].copy_from_slice(&tap.mac);
    message[20..28].copy_from_slice(&tap.features.to_le_bytes());
    message
}

fn decode(message: &[u8; MESSAGE], fd: OwnedFd) -> io::Result<(GivenTap, u16)> {
    let invalid = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    let word = |at: usize| u16::from_le_bytes([message[at], message[at + 1]]);
    if &message[..4] != MAGIC {
        return invalid("not a handover message".into());
    }
    if word(4) != VERSION {
        return invalid(format!(
            "handover message of version {} where {VERSION} is known",
            word(4)
        ));
    }
    let count = word(8);
    if count == 0 || count > MAX_TAPS || word(6) >= MAX_TAPS {
        return invalid(format!("handover of tap {} of {count}", word(6)));
    }
    let tap = GivenTap {
        index: word(6),
        mac: std::array::from_fn(|i| message[12 + i]),
        features: u64::from_le_bytes(std::array::from_fn(|i| message[20 + i])),
        fd,
    };
    Ok((tap, count))
}

/// The receiving side: a socket with a thread that keeps what arrives.
pub struct Handover {
    path: PathBuf,
    taps: Arc<Mutex<BTreeMap<u16, GivenTap>>>,
    worker: Option<Worker<()>>,
}

impl Handover {
    /// Listens at `path`, replacing a socket that a process before left behind.
    pub fn listen(path: &Path) -> io::Result<Handover> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let taps = Arc::new(Mutex::new(BTreeMap::new()));
        let kept = taps.clone();
        let worker = Worker::spawn("handover", move |stop| serve(&listener, &kept, &stop))?;
        Ok(Handover {
            path: path.to_owned(),
            taps,
            worker: Some(worker),
        })
    }

    /// Takes the tap of an interface, if it has arrived.
    pub fn take(&self, index: u16) -> Option<GivenTap> {
        self.taps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&index)
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        // Left behind, it would be replaced by the next one.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve(listener: &UnixListener, kept: &Mutex<BTreeMap<u16, GivenTap>>, stop: &Stop) {
    loop {
        let mut fds = [
            poll_entry(stop.as_raw_fd(), libc::POLLIN),
            poll_entry(listener.as_raw_fd(), libc::POLLIN),
        ];
        if let Err(error) = poll(&mut fds, None) {
            tracing::error!(%error, "waiting for taps failed");
            return;
        }
        if fds[0].revents != 0 {
            return;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        match receive(stream, kept) {
            Ok(count) => tracing::info!(count, "taps have arrived"),
            Err(error) => tracing::warn!(%error, "a handover of taps failed"),
        }
    }
}

/// Receives all taps of one connection; keeps all of them or none.
fn receive(mut stream: UnixStream, kept: &Mutex<BTreeMap<u16, GivenTap>>) -> io::Result<usize> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut taps = Vec::new();
    loop {
        let mut message = [0; MESSAGE];
        let (len, file) = stream.recv_with_fd(&mut message).map_err(io::Error::from)?;
        let (MESSAGE, Some(file)) = (len, file) else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a handover message without its tap, or the end",
            ));
        };
        let (tap, count) = decode(&message, file.into())?;
        taps.push(tap);
        if taps.len() >= usize::from(count) {
            break;
        }
    }
    let count = taps.len();
    // Kept before the answer, so that whoever reads the answer finds them.
    kept.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .extend(taps.into_iter().map(|tap| (tap.index, tap)));
    stream.write_all(&[TAKEN])?;
    Ok(count)
}

/// A tap that was given, ready for use.
pub(super) fn into_tap(given: GivenTap) -> io::Result<Tap> {
    Tap::from_fd(given.fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(index: u16, file: &std::fs::File) -> GivenTap {
        GivenTap {
            index,
            mac: [2, 0, 0, 0, 0, index as u8],
            features: 7,
            fd: file.try_clone().unwrap().into(),
        }
    }

    #[test]
    fn given_descriptors_are_there_when_giving_returns_and_again_when_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover");
        let handover = Handover::listen(&path).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"the same file").unwrap();
        for _ in 0..2 {
            give(&path, &[tap(0, &file), tap(1, &file)]).unwrap();
            let received = handover.take(1).unwrap();
            assert_eq!((received.mac[5], received.features), (1, 7));
            assert!(handover.take(0).is_some() && handover.take(0).is_none());
            let len = std::fs::File::from(received.fd).metadata().unwrap().len();
            assert_eq!(len, 13);
        }
    }

    #[test]
    fn strangers_and_torn_messages_leave_nothing_and_do_not_stop_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover");
        let handover = Handover::listen(&path).unwrap();
        let file = tempfile::tempfile().unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"hello").unwrap();
        drop(UnixStream::connect(&path).unwrap());
        let stream = UnixStream::connect(&path).unwrap();
        let mut message = encode(&tap(3, &file), 1);
        message[4] = 9;
        stream
            .send_with_fds(&[message.as_slice()], &[file.as_raw_fd()])
            .unwrap();
        drop(stream);
        // One of two only.
        let stream = UnixStream::connect(&path).unwrap();
        let message = encode(&tap(2, &file), 2);
        stream
            .send_with_fds(&[message.as_slice()], &[file.as_raw_fd()])
            .unwrap();
        drop(stream);
        give(&path, &[tap(0, &file)]).unwrap();
        assert!(handover.take(0).is_some());
        assert!(handover.take(2).is_none() && handover.take(3).is_none());
    }

    #[test]
    fn giving_to_nobody_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(give(&dir.path().join("none"), &[tap(0, &file)]).is_err());
    }
}
