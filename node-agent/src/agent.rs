//! The agent's main loop in stand-alone mode: manifests in, guests and operations kept, until it is stopped.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::config::Config;
use crate::durable::{self, DurableError};
use crate::guests::worker;
use crate::node::{Node, NodeError};
use crate::operations;
use crate::store::{Key, Object, Scanner, Store, StoreError};

/// The longest pause between two passes.
const TICK: Duration = Duration::from_secs(1);
/// The shortest.
const REST: Duration = Duration::from_millis(100);
/// How long the end of the agent waits for drivers to come to a point where they may stop. A guest that is
/// held is taken through its cutover first.
const GRACE: Duration = Duration::from_secs(90);

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// State could not be opened.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Objects could not be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A directory could not be made.
    #[error(transparent)]
    File(#[from] DurableError),
    /// Another agent has the state directory.
    #[error("another understudy-node runs on {0}; stop it first, or give this one another stateDir")]
    Running(PathBuf),
    /// The lock could not be taken, or signals not be waited for.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Runs the agent until SIGTERM or SIGINT. Guests run on afterwards.
pub fn run(config: Config) -> Result<(), AgentError> {
    for directory in [
        &config.state_dir,
        &config.run_dir,
        &config.manifests_dir,
        &config.disks_dir,
    ] {
        durable::make_dir(directory)?;
    }
    let _lock = lock(&config)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, stop.clone()).map_err(|source| AgentError::Io {
            action: "waiting for signals".to_owned(),
            source,
        })?;
    }
    let store = Store::open(&config.state_dir)?;
    let mut scanner = Scanner::new(&config.manifests_dir, &config.state_dir);
    let node = Node::open(config, Arc::new(store.clone()))?;
    tracing::info!(
        node = node.name,
        version = env!("CARGO_PKG_VERSION"),
        state = %node.config.state_dir.display(),
        manifests = %node.config.manifests_dir.display(),
        "stand-alone"
    );
    // First of all: what was in flight decides who may touch its guest.
    operations::recover(&node);
    notify("READY=1");

    let mut guests: HashMap<Key, JoinHandle<()>> = HashMap::new();
    let mut seen = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = scanner.scan(&store) {
            tracing::error!(%error, "the problems of manifests could not be told");
        }
        keep_guests(&node, &mut guests);
        operations::pass(&node);
        std::thread::sleep(REST);
        seen = store.wait(seen, TICK);
    }
    notify("STOPPING=1");
    tracing::info!("stopping; guests run on");
    node.stop();
    let deadline = Instant::now() + GRACE;
    while node.is_busy() && Instant::now() < deadline {
        std::thread::sleep(REST);
    }
    for (_, thread) in guests {
        if thread.is_finished() || !node.is_busy() {
            let _ = thread.join();
        }
    }
    Ok(())
}

/// A thread for each guest; one that ended (its guest is gone, or it panicked) makes room for the next.
fn keep_guests(node: &Arc<Node>, guests: &mut HashMap<Key, JoinHandle<()>>) {
    guests.retain(|_, thread| !thread.is_finished());
    for guest in node.objects.guests() {
        let key = guest.key();
        if guests.contains_key(&key) {
            continue;
        }
        match worker::spawn(node.clone(), key.clone()) {
            Ok(thread) => {
                guests.insert(key, thread);
            }
            Err(error) => tracing::error!(guest = %key, %error, "no thread for the guest; it is tried again"),
        }
    }
}

/// One agent per state directory.
fn lock(config: &Config) -> Result<File, AgentError> {
    let path = config.state_dir.join("agent.lock");
    let failed = |source| AgentError::Io {
        action: format!("locking {}", path.display()),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(AgentError::Running(config.state_dir.clone())),
        Err(error) => Err(failed(error.into())),
    }
}

/// sd_notify(3), where systemd asks for it.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        let text = path.to_string_lossy();
        match text.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(state.as_bytes(), &address)
            }
            None => socket.send_to(state.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd could not be told {state}");
    }
}
