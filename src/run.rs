//! Everything together: client, election, watches, controllers, and an orderly end.

use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use kube::{Client, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use understudy_api::{Guest, Host, HostUpdate, NodeUpdate, SeamlessReboot};

use crate::cli::Settings;
use crate::controller::{self, Context, PodName};
use crate::invalid;
use crate::lease::Candidate;
use crate::metrics::Metrics;
use crate::server::{self, Health};
use crate::world::World;
use crate::write::{Limit, Writer};

/// Why the operator has ended, other than being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No threads.
    #[error("the runtime could not be started: {0}")]
    Runtime(#[source] std::io::Error),
    /// Signals cannot be listened for.
    #[error("signals cannot be listened for: {0}")]
    Signals(#[source] std::io::Error),
    /// Neither in a cluster nor is there a kubeconfig.
    #[error("how to reach the API server is not known: {0}; run in a Pod, or set KUBECONFIG")]
    Config(#[source] kube::Error),
    /// The client cannot be made.
    #[error("the client could not be made: {0}")]
    Client(#[source] kube::Error),
    /// The address is taken, or not ours.
    #[error("cannot listen on {address} for health and metrics: {source}; see --listen")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The lease was lost. Another may lead; this process ends and begins anew as a candidate.
    #[error("the lease was lost; another process may lead")]
    LeaseLost,
    /// A task has ended that never does.
    #[error("a part of the operator has ended: {0}")]
    Task(String),
}

/// Runs the operator until it is asked to end or loses its lease.
pub async fn run(settings: Settings) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let metrics = Arc::new(Metrics::default());
    let health = Arc::new(Health::default());
    let address = settings.listen;
    let listener = server::bind(address)
        .await
        .map_err(|source| RunError::Listen { address, source })?;
    let mut tasks = JoinSet::new();
    tasks.spawn(health.clone().beat());
    {
        let (health, metrics) = (health.clone(), metrics.clone());
        tasks.spawn(async move {
            if let Err(error) = server::serve(listener, health, metrics).await {
                tracing::error!(%error, "health and metrics are not served any more");
            }
        });
    }
    let client = client().await?;
    let identity = identity(&settings);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        identity,
        "the operator begins"
    );
    let (mut candidate, fence) =
        Candidate::new(client.clone(), &settings.namespace, &settings.lease, &identity);
    let ended = {
        let work = async {
            let asked = async || client.apiserver_version().await;
            let answered = asked.retry(forever()).notify(|error, _| {
                tracing::warn!(%error, "the API server was not reached yet");
            });
            if let Ok(version) = answered.await {
                tracing::info!(server = version.git_version, "the API server answers");
            }
            health.is_ready(true);
            candidate.acquire().await;
            tracing::info!(lease = settings.lease, "leading");
            metrics.leads(true);
            let limit = Limit::new(settings.writes_per_second, settings.writes_per_second * 5);
            let (writer, notes) = Writer::new(client.clone(), fence, limit, &identity, metrics.clone());
            tasks.spawn(notes.publish());
            let pod = PodName {
                namespace: settings.namespace.clone(),
                name: identity.clone(),
            };
            begin(&client, writer, pod, &metrics, &mut tasks);
            tokio::select! {
                () = candidate.keep() => Err(RunError::LeaseLost),
                ended = tasks.join_next() => {
                    let how = ended.map(|ended| format!("{ended:?}")).unwrap_or_default();
                    Err(RunError::Task(how))
                }
            }
        };
        tokio::select! {
            ended = work => ended,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    };
    // Nothing writes any more before the lease is given back.
    tasks.shutdown().await;
    metrics.leads(false);
    candidate.release().await;
    if ended.is_ok() {
        tracing::info!("the operator was asked to end");
    }
    ended
}

/// Watches and controllers.
fn begin(client: &Client, writer: Writer, pod: PodName, metrics: &Arc<Metrics>, tasks: &mut JoinSet<()>) {
    let (world, queues) = World::watch(client, metrics, tasks);
    let context = Arc::new(Context {
        world: world.clone(),
        writer,
        pod,
    });
    // One waits for the stores and tells the others: a store wakes only the last who waits for it.
    let (told, known) = watch::channel(false);
    {
        let world = world.clone();
        tasks.spawn(async move {
            world.is_known().await;
            told.send_replace(true);
            told.closed().await;
        });
    }
    macro_rules! controllers {
        ($($kind:ty: $store:ident, $queue:ident;)*) => {$({
            let (world, context, metrics) = (world.clone(), context.clone(), metrics.clone());
            let mut known = known.clone();
            let queue = queues.$queue;
            tasks.spawn(async move {
                // What is not known yet would look as if it were not there.
                if known.wait_for(|known| *known).await.is_err() {
                    return;
                }
                controller::run::<$kind>(world.$store.clone(), queue, context, metrics).await;
            });
        })*};
    }
    controllers! {
        Guest: guests, guests;
        SeamlessReboot: reboots, reboots;
        Host: hosts, hosts;
        HostUpdate: host_updates, host_updates;
        NodeUpdate: node_updates, node_updates;
    }
    tasks.spawn(invalid::report(queues.invalid, context));
}

async fn client() -> Result<Client, RunError> {
    let mut config = Config::infer()
        .await
        .map_err(|error| RunError::Config(kube::Error::InferConfig(error)))?;
    // A watch is quiet for up to five minutes; anything else answers sooner.
    config.connect_timeout = Some(Duration::from_secs(10));
    config.write_timeout = Some(Duration::from_secs(30));
    // Controllers try again themselves, and a refused eviction (429) is an answer.
    config.default_retry = false;
    Client::try_from(config).map_err(RunError::Client)
}

fn identity(settings: &Settings) -> String {
    settings.identity.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        // Two on one machine are two.
        format!("{}-{}", host.trim(), std::process::id())
    })
}

fn forever() -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_max_delay(Duration::from_secs(5))
        .without_max_times()
        .with_jitter()
}
