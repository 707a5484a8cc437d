//! What there is: a store for each kind, kept by one watch each, and who is told of what.

pub mod liveness;
mod route;
pub mod watch;

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use understudy_api::{Guest, Host, HostUpdate, NodeUpdate, SeamlessReboot};

use crate::metrics::Metrics;
use crate::place::Place;
use liveness::Liveness;
use route::{Routed, Router};
use watch::{Watched, follow};

impl Watched for Guest {}
impl Watched for SeamlessReboot {}
impl Watched for HostUpdate {}
impl Watched for NodeUpdate {}
impl Watched for Host {}
impl Watched for Node {
    fn trim(&mut self) {
        watch::trim_node(self);
    }
}

/// How many objects may wait for a controller before a watch waits with them.
const QUEUE: usize = 1024;

/// Stores of all kinds.
pub struct World {
    /// Guests.
    pub guests: Store<Guest>,
    /// SeamlessReboots.
    pub reboots: Store<SeamlessReboot>,
    /// HostUpdates.
    pub host_updates: Store<HostUpdate>,
    /// NodeUpdates.
    pub node_updates: Store<NodeUpdate>,
    /// Hosts.
    pub hosts: Store<Host>,
    /// Nodes.
    pub nodes: Store<Node>,
    /// Which agents speak.
    pub liveness: Liveness,
}

/// What each controller shall look at.
pub struct Queues {
    /// Guests.
    pub guests: mpsc::Receiver<ObjectRef<Guest>>,
    /// SeamlessReboots.
    pub reboots: mpsc::Receiver<ObjectRef<SeamlessReboot>>,
    /// HostUpdates.
    pub host_updates: mpsc::Receiver<ObjectRef<HostUpdate>>,
    /// NodeUpdates.
    pub node_updates: mpsc::Receiver<ObjectRef<NodeUpdate>>,
    /// Hosts.
    pub hosts: mpsc::Receiver<ObjectRef<Host>>,
    /// Objects that cannot be read.
    pub invalid: mpsc::Receiver<Invalid>,
}

/// An object that cannot be read.
pub struct Invalid {
    /// Its kind.
    pub kind: String,
    /// Its plural, as in the API's paths.
    pub plural: String,
    /// What was read of it.
    pub object: kube::core::error_boundary::InvalidObject,
}

impl World {
    /// Begins the watches, each on a task of its own, that end with `tasks`.
    pub fn watch(
        client: &Client,
        metrics: &Arc<Metrics>,
        tasks: &mut tokio::task::JoinSet<()>,
    ) -> (Arc<World>, Queues) {
        let (guests, guest_writer) = store();
        let (reboots, reboot_writer) = store();
        let (host_updates, host_update_writer) = store();
        let (node_updates, node_update_writer) = store();
        let (hosts, host_writer) = store();
        let (nodes, node_writer) = store();
        let world = Arc::new(World {
            guests,
            reboots,
            host_updates,
            node_updates,
            hosts,
            nodes,
            liveness: Liveness::default(),
        });
        let (router, queues) = Router::new(world.clone(), QUEUE);
        let router = Arc::new(router);
        let begin = Begin {
            client,
            metrics,
            router: &router,
        };
        begin.watch(tasks, node_writer);
        begin.watch(tasks, host_writer);
        begin.watch(tasks, guest_writer);
        begin.watch(tasks, reboot_writer);
        begin.watch(tasks, host_update_writer);
        begin.watch(tasks, node_update_writer);
        tasks.spawn(async move { router.listen_for_silence().await });
        (world, queues)
    }

    /// Returns once every kind was listed.
    pub async fn is_known(&self) {
        // A store is dropped with its watch, and that one ends with the process.
        let _ = tokio::join!(
            self.nodes.wait_until_ready(),
            self.hosts.wait_until_ready(),
            self.guests.wait_until_ready(),
            self.reboots.wait_until_ready(),
            self.host_updates.wait_until_ready(),
            self.node_updates.wait_until_ready(),
        );
    }

    /// What is known of a node.
    pub fn place(&self, name: &str) -> Place {
        let node = self.nodes.get(&ObjectRef::new(name));
        let host = self.hosts.get(&ObjectRef::new(name));
        let is_silent = self.liveness.is_silent(name, Instant::now());
        Place::new(name, node.as_deref(), host.as_deref(), is_silent)
    }

    /// NodeUpdates of a node.
    pub fn node_updates_of(&self, node: &str) -> Vec<Arc<NodeUpdate>> {
        self.node_updates
            .state_filter(|update| update.spec.node_name == node)
    }

    fn heard(&self, host: &Host) {
        let beat = host.status.as_ref().and_then(|status| status.heartbeat.as_ref());
        self.liveness.heard(
            &host.name_any(),
            beat.map(|time| time.0),
            Timestamp::now(),
            Instant::now(),
        )
    }
}

fn store<K: Watched>() -> (Store<K>, Writer<K>) {
    let writer = Writer::new(());
    (writer.as_reader(), writer)
}

struct Begin<'a> {
    client: &'a Client,
    metrics: &'a Arc<Metrics>,
    router: &'a Arc<Router>,
}

impl Begin<'_> {
    fn watch<K: Routed>(&self, tasks: &mut tokio::task::JoinSet<()>, writer: Writer<K>) {
        let api: Api<DeserializeGuard<K>> = Api::all(self.client.clone());
        tasks.spawn(follow(api, writer, self.metrics.clone(), self.router.clone()));
    }
}
