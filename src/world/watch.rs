//! One watch for each kind: into a store, and on to whoever is concerned.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus};
use kube::core::{DeserializeGuard, error_boundary::InvalidObject};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use super::route::{Routed, Router};
use crate::metrics::Metrics;
use crate::write::diff::trim_managed_fields;

/// What is watched.
pub trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    /// Takes out what nobody here asks: with thousands of objects it would be most of the memory.
    fn trim(&mut self) {
        trim_managed_fields(self.meta_mut());
        self.annotations_mut()
            .remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// Of a Node with hundreds of images little is asked.
pub fn trim_node(node: &mut Node) {
    node.metadata.managed_fields = None;
    if let Some(status) = &mut node.status {
        let node_info = status.node_info.take();
        // Without its times, which every heartbeat changes.
        let ready = status.conditions.take().into_iter().flatten();
        let ready = ready
            .filter(|there| there.type_ == "Ready")
            .map(|there| NodeCondition {
                type_: there.type_,
                status: there.status,
                ..NodeCondition::default()
            });
        let conditions = Some(ready.collect());
        *status = NodeStatus {
            node_info,
            conditions,
            ..NodeStatus::default()
        };
    }
}

/// Something was seen.
#[derive(Clone, Debug)]
pub enum Sight<K> {
    /// It is there.
    There {
        /// The object.
        object: Arc<K>,
        /// Whether it is one of the first list: others are looked at anyway.
        is_initial: bool,
    },
    /// It is gone.
    Gone(Arc<K>),
}

/// Watches `api` for good; what is seen is routed in order, after the store has it.
pub async fn follow<K: Routed>(
    api: Api<DeserializeGuard<K>>,
    mut writer: Writer<K>,
    metrics: Arc<Metrics>,
    router: Arc<Router>,
) {
    let kind = K::kind(&()).into_owned();
    let store: Store<K> = writer.as_reader();
    // Pages keep the first list of many objects from being in memory as a whole.
    let config = watch::Config::default().page_size(500);
    let mut events = watch::watcher(api, config).default_backoff().boxed();
    let mut is_first = true;
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                metrics.watch_failed(&kind);
                tracing::warn!(kind, %error, "a watch failed; it is begun anew");
                continue;
            }
        };
        let event = match read(event) {
            Ok(event) => event,
            Err(invalid) => {
                metrics.saw_invalid(&kind);
                tracing::error!(kind, name = ?invalid.metadata.name, error = invalid.error, "an object cannot be read");
                router.invalid::<K>(*invalid).await;
                continue;
            }
        };
        match event {
            Event::Apply(object) => {
                let object = Arc::new(object);
                writer.apply_watcher_event(&Event::Apply(K::clone(&object)));
                let is_initial = false;
                K::route(&router, Sight::There { object, is_initial }).await;
            }
            Event::Delete(object) => {
                let object = Arc::new(object);
                writer.apply_watcher_event(&Event::Delete(K::clone(&object)));
                K::route(&router, Sight::Gone(object)).await;
            }
            Event::Init => writer.apply_watcher_event(&Event::Init),
            Event::InitApply(object) => {
                // Before the store counts as complete.
                object.hear(&router);
                writer.apply_watcher_event(&Event::InitApply(object));
            }
            Event::InitDone => {
                let before = store.state();
                writer.apply_watcher_event(&Event::InitDone);
                listed(&before, &store, is_first, &router).await;
                is_first = false;
            }
        }
        metrics.known(&kind, store.len());
    }
}

/// A list is complete: what it has that is new, and what is gone since the watch was down.
async fn listed<K: Routed>(before: &[Arc<K>], store: &Store<K>, is_initial: bool, router: &Router) {
    let versions: HashMap<ObjectRef<K>, Option<String>> = before
        .iter()
        .map(|object| (ObjectRef::from_obj(&**object), object.resource_version()))
        .collect();
    for object in store.state() {
        if versions.get(&ObjectRef::from_obj(&*object)) != Some(&object.resource_version()) {
            K::route(router, Sight::There { object, is_initial }).await;
        }
    }
    for object in before {
        if store.get(&ObjectRef::from_obj(&**object)).is_none() {
            K::route(router, Sight::Gone(object.clone())).await;
        }
    }
}

fn read<K: Watched>(event: Event<DeserializeGuard<K>>) -> Result<Event<K>, Box<InvalidObject>> {
    let open = |guard: DeserializeGuard<K>| {
        let mut object = guard.0.map_err(Box::new)?;
        object.trim();
        Ok::<K, Box<InvalidObject>>(object)
    };
    Ok(match event {
        Event::Apply(object) => Event::Apply(open(object)?),
        Event::InitApply(object) => Event::InitApply(open(object)?),
        Event::Delete(object) => Event::Delete(open(object)?),
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    })
}
