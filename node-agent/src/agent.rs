//! The agent's main loop: objects in, from manifests or from an API server, guests and operations kept, until it is
//! stopped.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::cluster::access::{self, AccessError};
use crate::cluster::link::LinkError;
use crate::cluster::{Cluster, Link};
use crate::config::{Config, Mode};
use crate::durable::{self, DurableError};
use crate::guests::worker;
use crate::host::{self, HostIdentity};
use crate::host_object;
use crate::host_updates::HostUpdates;
use crate::node::{Node, NodeError};
use crate::operations;
use crate::power::{Power, Shutdown, Systemctl};
use crate::store::{Key, Object, Scanner, Store, StoreError};

/// The agent's unit, as `install` names it.
pub const UNIT: &str = "understudy-node.service";
/// The longest pause between two passes.
const TICK: Duration = Duration::from_secs(1);
/// The shortest.
const REST: Duration = Duration::from_millis(100);
/// How long the end of the agent waits for drivers to come to a point where they may stop. A guest that is
/// held is taken through its cutover first.
const GRACE: Duration = Duration::from_secs(90);
/// How long it waits for passes over guests that go on.
const LAST_PASSES: Duration = Duration::from_secs(1);
/// Of the time that systemd gives the agent to stop, what is not spent on saving.
const LAST_MOMENTS: Duration = Duration::from_secs(20);

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
    /// It is not known which node of a cluster this is.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The link to the API server could not be started.
    #[error(transparent)]
    Link(#[from] LinkError),
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

/// Runs the agent until SIGTERM or SIGINT. Guests run on afterwards; unless it is stopped because the host
/// goes down: then their sessions are saved first.
pub fn run(config: Config) -> Result<(), AgentError> {
    let started = host::moment();
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
    let (node, mut source) = open(config, store)?;
    // First of all: what was in flight decides who may touch its guest.
    let mut updates = HostUpdates::load(&node, started);
    operations::recover(&node);
    watch_power(&node);
    updates.recover();
    host_object::keep(&node)?;
    // Only now: what is driven is known.
    source.start(&node)?;
    notify("READY=1");

    let mut guests: HashMap<Key, JoinHandle<()>> = HashMap::new();
    let mut seen = 0;
    while !stop.load(Ordering::Relaxed) {
        source.scan();
        keep_guests(&node, &mut guests);
        updates.pass();
        operations::pass(&node);
        std::thread::sleep(REST);
        seen = node.objects.wait(seen, TICK);
    }
    notify("STOPPING=1");
    if let Some(how) = Systemctl::new(Path::new("systemctl")).shutdown() {
        save_before_shutdown(&node, &mut updates, how);
    }
    tracing::info!("stopping; guests run on");
    node.stop();
    let deadline = Instant::now() + GRACE;
    let is_busy = || node.is_busy() || node.work.is_busy();
    while is_busy() && Instant::now() < deadline {
        std::thread::sleep(REST);
    }
    // A pass over a guest may wait for an answer of one that is saved and paused: nothing is lost with it, and the
    // host's shutdown waits for us.
    let deadline = deadline.min(Instant::now() + LAST_PASSES);
    while guests.values().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        std::thread::sleep(REST);
    }
    source.stop();
    Ok(())
}

/// Where objects come from.
enum Source {
    /// Manifests.
    Manifests(Scanner, Store),
    /// An API server, once the link to it is started.
    Cluster(Arc<Cluster>, Option<Link>),
}

/// Opens the node as its configuration says.
fn open(config: Config, store: Store) -> Result<(Arc<Node>, Source), AgentError> {
    let version = env!("CARGO_PKG_VERSION");
    let state = config.state_dir.display().to_string();
    match config.mode {
        Mode::Standalone => {
            let scanner = Scanner::new(&config.manifests_dir, &config.state_dir);
            let objects = Arc::new(store.clone());
            let node = Node::open(host::name(), config, objects, HostIdentity::read())?;
            let manifests = node.config.manifests_dir.display();
            tracing::info!(node = node.name, version, state, %manifests, "stand-alone");
            Ok((node, Source::Manifests(scanner, store)))
        }
        Mode::Cluster => {
            // What the Pod wrote before the host's last reboot will do.
            let access = access::read(&config.state_dir)?;
            let cluster = Arc::new(Cluster::open(store, &config.state_dir, &access)?);
            let node = Node::open(access.node_name, config, cluster.clone(), HostIdentity::read())?;
            let server = access.server;
            tracing::info!(node = node.name, version, state, server, "on a cluster");
            Ok((node, Source::Cluster(cluster, None)))
        }
    }
}

impl Source {
    fn start(&mut self, node: &Arc<Node>) -> Result<(), AgentError> {
        let Source::Cluster(cluster, link) = self else {
            return Ok(());
        };
        let me = Arc::downgrade(node);
        // Without a node nothing is forgotten.
        let driven = move |uid: &str| me.upgrade().is_none_or(|node| node.is_driven(uid));
        let started = Link::start(cluster.clone(), &node.config.state_dir, Arc::new(driven))?;
        *link = Some(started);
        Ok(())
    }

    fn scan(&mut self) {
        if let Source::Manifests(scanner, store) = self
            && let Err(error) = scanner.scan(store)
        {
            tracing::error!(%error, "the problems of manifests could not be told");
        }
    }

    fn stop(self) {
        if let Source::Cluster(_, Some(link)) = self {
            link.stop();
        }
    }
}

/// Hears of the host's shutdowns from now on, and holds them up.
fn watch_power(node: &Arc<Node>) {
    let me = Arc::downgrade(node);
    let on_change = move || {
        if let Some(node) = me.upgrade() {
            node.work.wake();
            node.objects.wake();
        }
    };
    match Power::watch(None, on_change) {
        Ok(power) => node.work.watch(power),
        Err(error) => tracing::error!(%error, "a reboot that the host begins does not wait for sessions"),
    }
}

/// The service is stopped because the host goes down, and nobody has saved the sessions yet, or not all of
/// them: systemd waits for us now, as long as our unit says.
fn save_before_shutdown(node: &Arc<Node>, updates: &mut HostUpdates, how: Shutdown) {
    let systemctl = Systemctl::new(Path::new("systemctl"));
    let limit = systemctl
        .stop_timeout(UNIT)
        .unwrap_or(Duration::from_secs(node.config.host.save_timeout_seconds));
    // What is left is for our own end.
    let limit = limit.saturating_sub(LAST_MOMENTS);
    let micros = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX);
    node.work.stop_job(how, host::moment().plus(micros));
    tracing::warn!(
        how = how.as_str(),
        limit_s = limit.as_secs(),
        "the host goes down: sessions are saved before the agent ends"
    );
    let deadline = Instant::now() + limit;
    loop {
        updates.pass();
        if !node.work.stop_job_waits() || Instant::now() >= deadline {
            return;
        }
        std::thread::sleep(REST);
    }
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
