//! Objects that cannot be read: told on the object itself, once for each error, and never in the way of others.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use understudy_api::conditions::{reasons, types};
use understudy_api::managers::OPERATOR;
use understudy_api::{GROUP, VERSION};

use crate::controller::Context;
use crate::error::Error;
use crate::world::Invalid;

/// So many are remembered at most; after that they are told again when they are seen again.
const REMEMBERED: usize = 10_000;

/// Tells of every object that comes through `queue`.
pub async fn report(mut queue: mpsc::Receiver<Invalid>, context: Arc<Context>) {
    // By UID: what was told of it.
    let mut told: HashMap<String, String> = HashMap::new();
    while let Some(invalid) = queue.recv().await {
        let Some(uid) = invalid.object.metadata.uid.clone() else {
            continue;
        };
        // Telling changes the object, and it is seen again.
        if told.get(&uid) == Some(&invalid.object.error) {
            continue;
        }
        // Nodes are not ours to write on.
        if invalid.kind != "Node"
            && let Err(error) = tell(&invalid, &context).await
        {
            // It is tried again when the object is seen again: with the next listing at the latest.
            let name = invalid.object.metadata.name.as_deref();
            tracing::warn!(kind = invalid.kind, name, %error, "that an object is invalid could not be told on it");
            continue;
        }
        if told.len() >= REMEMBERED {
            told.clear();
        }
        told.insert(uid, invalid.object.error.clone());
    }
}

async fn tell(invalid: &Invalid, context: &Context) -> Result<(), Error> {
    let kind = GroupVersionKind::gvk(GROUP, VERSION, &invalid.kind);
    let resource = ApiResource::from_gvk_with_plural(&kind, &invalid.plural);
    let mut object = DynamicObject::new("", &resource);
    object.metadata = invalid.object.metadata.clone();
    let name = object.name_any();
    let client = context.writer.client().clone();
    let api: Api<DynamicObject> = match object.namespace() {
        Some(namespace) => Api::namespaced_with(client, &namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    let action = format!("telling that {} {name} is invalid", invalid.kind);
    let parameters = PatchParams::apply(OPERATOR);
    let patch = Patch::Apply(status(&object, invalid));
    let write = api.patch_status(&name, &parameters, &patch);
    context.writer.fenced(&action, write).await.map(drop)
}

fn status(object: &DynamicObject, invalid: &Invalid) -> Value {
    let message = format!(
        "the object cannot be read: {}; correct it or delete it",
        invalid.object.error
    );
    let conditions: Vec<Value> = [
        (types::READY, "False"),
        (types::RECONCILING, "False"),
        (types::STALLED, "True"),
    ]
    .into_iter()
    .map(|(kind, status)| {
        json!({"type": kind, "status": status, "reason": reasons::INVALID, "message": message,
               "observedGeneration": object.metadata.generation, "lastTransitionTime": Timestamp::now().to_string()})
    })
    .collect();
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": invalid.kind,
        "metadata": {"name": object.name_any(), "namespace": object.namespace(), "uid": object.uid()},
        "status": {"conditions": conditions},
    })
}
