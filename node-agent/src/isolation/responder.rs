//! The thread behind one isolated interface.

use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Facts, answer};

/// Longest frame: Ethernet's 64 KiB with segmentation offload, rounded up.
const MAX_FRAME: usize = 72 * 1024;
/// How soon a stopped responder notices.
const TICK: Duration = Duration::from_millis(200);

/// Why a responder could not start.
#[derive(Debug, thiserror::Error)]
#[error("listening for the isolated clone at {path}: {source}")]
pub struct IsolationError {
    /// The socket.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Answers the frames of one isolated interface until it is dropped.
#[derive(Debug)]
pub struct Responder {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    answered: AtomicU64,
}

impl Responder {
    /// Listens at `path` (a `config::Network::isolated_peer`), replacing a socket that a former agent left.
    pub fn start(path: &Path, facts: Facts) -> Result<Responder, IsolationError> {
        let failed = |source| IsolationError {
            path: path.to_owned(),
            source,
        };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let socket = UnixDatagram::bind(path).map_err(failed)?;
        socket.set_read_timeout(Some(TICK)).map_err(failed)?;
        // A clone that does not read its answers must not hold us up.
        socket.set_write_timeout(Some(TICK)).map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let counters = Arc::new(Counters::default());
        let thread = std::thread::Builder::new()
            .name("isolation".into())
            .spawn({
                let stop = stop.clone();
                let counters = counters.clone();
                move || serve(&socket, &facts, &stop, &counters)
            })
            .map_err(failed)?;
        Ok(Responder {
            path: path.to_owned(),
            stop,
            counters,
            thread: Some(thread),
        })
    }

    /// Frames received and answered.
    pub fn counters(&self) -> (u64, u64) {
        (
            self.counters.received.load(Ordering::Relaxed),
            self.counters.answered.load(Ordering::Relaxed),
        )
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

fn serve(socket: &UnixDatagram, facts: &Facts, stop: &AtomicBool, counters: &Counters) {
    let mut buffer = vec![0u8; MAX_FRAME];
    while !stop.load(Ordering::Relaxed) {
        let (length, peer) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if would_block(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "an isolated clone's network ended");
                return;
            }
        };
        counters.received.fetch_add(1, Ordering::Relaxed);
        let Some(reply) = answer(facts, &buffer[..length]) else {
            continue;
        };
        // A frame that cannot be delivered is lost, as on any network.
        if socket.send_to_addr(&reply, &peer).is_ok() {
            counters.answered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
