//! The link between the store and the API server, on a thread of its own: specs come in by watches, statuses go
//! out by server-side apply. Nothing else of the agent waits for it, or knows whether the API server answers.

mod client;
mod desk;
mod desks;
mod events;
mod health;
mod session;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;
use understudy_api::Host;
use uuid::Uuid;

pub use health::{Health, path as health_path};

use self::client::{Trouble, client};
use self::desks::Desks;
use self::health::Keeper;
use self::session::{End, Signals};
use super::access::{Access, AccessFile};
use super::objects::Cluster;
use crate::store::Objects;

/// Whether a driver runs, or a record waits for one, for the object of a UID.
pub type Driven = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The longest wait of the thread that hears of changes.
const TICK: Duration = Duration::from_secs(1);
/// Pauses between tries to reach an API server that is away.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(20);

/// The link. It ends with [`Link::stop`]; dropped, it goes on.
pub struct Link {
    signals: Arc<Signals>,
    health: Arc<Keeper>,
    cluster: Arc<Cluster>,
    thread: JoinHandle<()>,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
#[error("starting the link to the API server: {0}")]
pub struct LinkError(#[from] std::io::Error);

impl Link {
    /// Starts the link of an agent with this state directory, in which its access is looked for.
    pub fn start(cluster: Arc<Cluster>, state_dir: &Path, driven: Driven) -> Result<Link, LinkError> {
        let signals = Arc::new(Signals {
            bell: tokio::sync::Notify::new(),
            stopping: false.into(),
        });
        let health = Arc::new(Keeper::new(state_dir));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()?;
        std::thread::Builder::new().name("link bell".into()).spawn({
            let (signals, cluster) = (signals.clone(), cluster.clone());
            move || {
                let mut seen = 0;
                while !signals.stopping.load(Ordering::Relaxed) {
                    seen = cluster.wait(seen, TICK);
                    signals.bell.notify_one();
                }
            }
        })?;
        let connector = Connector {
            file: AccessFile::new(state_dir),
            access: None,
            state_dir: state_dir.to_owned(),
            cluster: cluster.clone(),
            driven,
            signals: signals.clone(),
            health: health.clone(),
            pause: FIRST_PAUSE,
        };
        let thread = std::thread::Builder::new()
            .name("link".into())
            .spawn(move || runtime.block_on(connector.run()))?;
        Ok(Link {
            signals,
            health,
            cluster,
            thread,
        })
    }

    /// How it is.
    pub fn health(&self) -> Health {
        self.health.get()
    }

    /// Ends the link. What is to be told is told before, where the API server answers at once.
    pub fn stop(self) {
        self.signals.stopping.store(true, Ordering::Relaxed);
        self.cluster.wake();
        self.signals.bell.notify_one();
        if self.thread.join().is_err() {
            tracing::error!("the link to the API server has panicked");
        }
    }
}

/// Makes connections, one after the other.
struct Connector {
    file: AccessFile,
    access: Option<Access>,
    state_dir: PathBuf,
    cluster: Arc<Cluster>,
    driven: Driven,
    signals: Arc<Signals>,
    health: Arc<Keeper>,
    pause: Duration,
}

impl Connector {
    async fn run(mut self) {
        let mut desks = None;
        while !self.is_stopping() {
            self.look();
            let Some(access) = self.access.clone() else {
                let path = super::access::path(&self.state_dir);
                let why = format!("there is no access for this node in {}", path.display());
                self.health.is_away("", &why);
                self.signals.bell.notified().await;
                continue;
            };
            let connected = tokio::select! {
                connected = connect(&access) => connected,
                () = stopped(&self.signals) => return,
            };
            let (client, host) = match connected {
                Ok(connected) => connected,
                Err(why) => {
                    self.health.is_away(&access.server, &why);
                    self.rest().await;
                    continue;
                }
            };
            self.health.answers(&access.server);
            let mut these = desks
                .take()
                .unwrap_or_else(|| Desks::new(self.cluster.clone(), self.driven.clone()));
            these.connected(host);
            let began = Instant::now();
            let (signals, health) = (self.signals.clone(), self.health.clone());
            let end;
            (desks, end) = session::run(these, &client, &access.node_name, &signals, &health, || {
                self.look()
            })
            .await;
            if began.elapsed() > LAST_PAUSE {
                self.pause = FIRST_PAUSE;
            }
            match end {
                End::Stopped => return,
                End::Access | End::NoHost => {}
                End::Away(why) => {
                    self.health.is_away(&access.server, &why);
                    self.rest().await;
                }
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.signals.stopping.load(Ordering::Relaxed)
    }

    /// Looks for another access. Returns whether there is one.
    fn look(&mut self) -> bool {
        let access = match self.file.changed() {
            Ok(Some(access)) => access,
            Ok(None) => return false,
            Err(error) => {
                tracing::error!(%error, "the access to the API server cannot be read; the last one is used on");
                return false;
            }
        };
        let name = self.cluster.node_name();
        if access.node_name != name {
            tracing::error!(
                node = name,
                new = access.node_name,
                "the access to the API server is of another node and is not used; to give this host another name, restart the agent"
            );
            return false;
        }
        if access.node_uid != self.cluster.node_uid() {
            tracing::warn!(
                node = name,
                uid = access.node_uid,
                "the Node was made anew: what was assigned to the one before is not ours any more, and goes on"
            );
            self.cluster.set_node_uid(&access.node_uid);
        }
        if self.access.as_ref() == Some(&access) {
            return false;
        }
        tracing::info!(?access, "access to the API server");
        self.access = Some(access);
        self.pause = FIRST_PAUSE;
        true
    }

    /// Waits before the next try; not when there is a new access.
    async fn rest(&mut self) {
        // Agents of a whole cluster do not come back at the same instant.
        let spread = u32::from(Uuid::new_v4().as_bytes()[0]);
        let pause = self.pause + self.pause * spread / 512;
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        let deadline = Instant::now() + pause;
        while !self.is_stopping() && !self.look() {
            let bell = self.signals.bell.notified();
            if tokio::time::timeout_at(deadline, bell).await.is_err() {
                return;
            }
        }
    }
}

/// Waits for the end of the link.
async fn stopped(signals: &Signals) {
    while !signals.stopping.load(Ordering::Relaxed) {
        signals.bell.notified().await;
    }
}

/// Reaches the API server, and finds or makes the node's Host.
async fn connect(access: &Access) -> Result<(kube::Client, Host), String> {
    let client = client(access).map_err(|error| error.to_string())?;
    match session::host(&client, &access.node_name).await {
        Ok(host) => Ok((client, host)),
        Err(Trouble::Away(why)) => Err(why),
        Err(Trouble::Answer(answer)) => Err(format!("the Host cannot be had: {answer:?}")),
    }
}
