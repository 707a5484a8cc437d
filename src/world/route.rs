//! What concerns whom: from something that was seen to the objects that must be looked at.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use understudy_api::{Guest, Host, HostUpdate, NodeUpdate, SeamlessReboot};

use super::watch::{Sight, Watched};
use super::{Invalid, Queues, World};
use crate::place::NodeView;

/// How often it is looked for agents that have fallen silent.
const LISTEN: Duration = Duration::from_secs(1);

/// A kind that concerns others.
pub trait Routed: Watched {
    /// Takes note of it before it is told to anybody.
    fn hear(&self, _router: &Router) {}

    /// Tells those whom it concerns.
    fn route(router: &Router, sight: Sight<Self>) -> impl Future<Output = ()> + Send;
}

/// Sends references to the controllers' queues.
pub struct Router {
    world: Arc<World>,
    guests: mpsc::Sender<ObjectRef<Guest>>,
    reboots: mpsc::Sender<ObjectRef<SeamlessReboot>>,
    host_updates: mpsc::Sender<ObjectRef<HostUpdate>>,
    node_updates: mpsc::Sender<ObjectRef<NodeUpdate>>,
    hosts: mpsc::Sender<ObjectRef<Host>>,
    invalid: mpsc::Sender<Invalid>,
    /// What others ask of nodes and hosts, hashed: heartbeats concern nobody.
    faces: Mutex<HashMap<(&'static str, String), u64>>,
}

impl Router {
    /// A router over `world`, and the queues behind it, of `size` each.
    pub fn new(world: Arc<World>, size: usize) -> (Router, Queues) {
        let (guests, guests_queue) = mpsc::channel(size);
        let (reboots, reboots_queue) = mpsc::channel(size);
        let (host_updates, host_updates_queue) = mpsc::channel(size);
        let (node_updates, node_updates_queue) = mpsc::channel(size);
        let (hosts, hosts_queue) = mpsc::channel(size);
        let (invalid, invalid_queue) = mpsc::channel(size);
        let router = Router {
            world,
            guests,
            reboots,
            host_updates,
            node_updates,
            hosts,
            invalid,
            faces: Mutex::default(),
        };
        let queues = Queues {
            guests: guests_queue,
            reboots: reboots_queue,
            host_updates: host_updates_queue,
            node_updates: node_updates_queue,
            hosts: hosts_queue,
            invalid: invalid_queue,
        };
        (router, queues)
    }

    /// An object cannot be read.
    pub async fn invalid<K: Resource<DynamicType = ()>>(&self, object: InvalidObject) {
        let invalid = Invalid {
            kind: K::kind(&()).into_owned(),
            plural: K::plural(&()).into_owned(),
            object,
        };
        // A queue is closed only while the process ends.
        let _ = self.invalid.send(invalid).await;
    }

    /// Tells, for good, of agents that have fallen silent.
    pub async fn listen_for_silence(&self) {
        loop {
            sleep(LISTEN).await;
            for host in self.world.liveness.fallen_silent(Instant::now()) {
                tracing::warn!(node = host, "the agent of a node has fallen silent");
                self.place_changed(&host).await;
            }
        }
    }

    /// Whether what others ask of this object is other than it was.
    fn is_new_face(&self, kind: &'static str, name: &str, face: impl Hash) -> bool {
        let mut hasher = DefaultHasher::new();
        face.hash(&mut hasher);
        let hash = hasher.finish();
        let mut faces = self.faces.lock().unwrap_or_else(PoisonError::into_inner);
        faces.insert((kind, name.to_owned()), hash) != Some(hash)
    }

    fn lose_face(&self, kind: &'static str, name: &str) {
        let mut faces = self.faces.lock().unwrap_or_else(PoisonError::into_inner);
        faces.remove(&(kind, name.to_owned()));
    }

    /// Node, Host or the agent's voice has changed.
    async fn place_changed(&self, node: &str) {
        let world = &self.world;
        let at = |name: Option<&String>| name.is_some_and(|name| name == node);
        let guests = world.guests.state_filter(|guest| {
            at(guest.spec.node_name.as_ref())
                || at(guest.status.as_ref().and_then(|status| status.node_name.as_ref()))
        });
        // Reboots that are not assigned yet wait for the node of their Guest.
        let reboots = world.reboots.state_filter(|reboot| {
            let assigned = reboot
                .status
                .as_ref()
                .and_then(|status| status.node_name.as_ref());
            at(assigned)
                || (assigned.is_none()
                    && guests.iter().any(|guest| {
                        guest.namespace() == reboot.namespace() && guest.name_any() == reboot.spec.guest_name
                    }))
        });
        // One whose Node is gone does not stay.
        if let Some(host) = world.hosts.get(&ObjectRef::new(node)) {
            send(&self.hosts, &[host]).await;
        }
        send(&self.guests, &guests).await;
        send(&self.reboots, &reboots).await;
        send(&self.node_updates, &world.node_updates_of(node)).await;
        self.all(&self.host_updates, &world.host_updates).await;
    }

    async fn all<K: Resource<DynamicType = ()> + Clone>(
        &self,
        queue: &mpsc::Sender<ObjectRef<K>>,
        store: &Store<K>,
    ) {
        send(queue, &store.state()).await;
    }
}

async fn send<K: Resource<DynamicType = ()>>(queue: &mpsc::Sender<ObjectRef<K>>, objects: &[Arc<K>]) {
    for object in objects {
        // A queue is closed only while the process ends.
        let _ = queue.send(ObjectRef::from_obj(&**object)).await;
    }
}

impl Routed for Node {
    async fn route(router: &Router, sight: Sight<Node>) {
        match sight {
            Sight::There { object, is_initial } => {
                let name = object.name_any();
                if router.is_new_face("Node", &name, NodeView::from(&*object)) && !is_initial {
                    router.place_changed(&name).await;
                }
            }
            Sight::Gone(object) => {
                router.lose_face("Node", &object.name_any());
                router.place_changed(&object.name_any()).await;
            }
        }
    }
}

impl Routed for Host {
    fn hear(&self, router: &Router) {
        router.world.heard(self);
    }

    async fn route(router: &Router, sight: Sight<Host>) {
        match sight {
            Sight::There { object, is_initial } => {
                let name = object.name_any();
                router.world.heard(&object);
                let speaks_again = router.world.liveness.is_news(&name, Instant::now());
                let status = object.status.as_ref();
                let request = status.and_then(|status| status.reboot_request.as_ref());
                let request = request.and_then(|request| request.node_update.clone());
                if router.is_new_face("request", &name, (&request, object.annotations())) {
                    send(&router.hosts, std::slice::from_ref(&object)).await;
                }
                let booted = status.and_then(|status| status.booted_at.as_ref());
                let face = (
                    status.and_then(|status| status.node_uid.clone()),
                    status.and_then(|status| status.boot_id.clone()),
                    booted.map(|time| time.0.as_microsecond()),
                );
                if (router.is_new_face("Host", &name, face) || speaks_again) && !is_initial {
                    router.place_changed(&name).await;
                }
            }
            Sight::Gone(object) => {
                let name = object.name_any();
                router.world.liveness.forget(&name);
                router.lose_face("Host", &name);
                router.lose_face("request", &name);
                router.place_changed(&name).await;
            }
        }
    }
}

impl Routed for Guest {
    async fn route(router: &Router, sight: Sight<Guest>) {
        let (object, is_initial) = match sight {
            Sight::There { object, is_initial } => {
                send(&router.guests, std::slice::from_ref(&object)).await;
                (object, is_initial)
            }
            Sight::Gone(object) => (object, false),
        };
        if !is_initial {
            let reboots = router.world.reboots.state_filter(|reboot| {
                reboot.spec.guest_name == object.name_any() && reboot.namespace() == object.namespace()
            });
            send(&router.reboots, &reboots).await;
        }
    }
}

impl Routed for SeamlessReboot {
    async fn route(router: &Router, sight: Sight<SeamlessReboot>) {
        if let Sight::There { object, .. } = sight {
            send(&router.reboots, &[object]).await;
        }
    }
}

impl Routed for HostUpdate {
    async fn route(router: &Router, sight: Sight<HostUpdate>) {
        if let Sight::There { object, .. } = sight {
            send(&router.host_updates, &[object]).await;
        }
    }
}

impl Routed for NodeUpdate {
    async fn route(router: &Router, sight: Sight<NodeUpdate>) {
        let is_initial = matches!(sight, Sight::There { is_initial: true, .. });
        let (Sight::There { object, .. } | Sight::Gone(object)) = sight;
        if is_initial {
            send(&router.node_updates, &[object]).await;
            return;
        }
        // The node's others wait for it, and HostUpdates for its end.
        send(
            &router.node_updates,
            &router.world.node_updates_of(&object.spec.node_name),
        )
        .await;
        router.all(&router.host_updates, &router.world.host_updates).await;
    }
}
