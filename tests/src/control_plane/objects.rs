//! Objects as programs read and write them, without kubectl.

use anyhow::{Context, Result};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

use super::ControlPlane;

impl ControlPlane {
    /// How an administrator's client reaches it.
    pub async fn admin(&self) -> Result<Config> {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        config.context("the administrator's kubeconfig is not one")
    }
}

/// The API of a kind, as an administrator uses it. `version` is as in `apiVersion`.
pub fn api(client: &Client, version: &str, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Makes an object.
pub async fn make(client: &Client, version: &str, kind: &str, mut object: Value) -> Result<DynamicObject> {
    object["apiVersion"] = version.into();
    object["kind"] = kind.into();
    let object: DynamicObject = serde_json::from_value(object)?;
    let api = api(client, version, kind, object.metadata.namespace.as_deref());
    let made = api.create(&PostParams::default(), &object).await;
    made.with_context(|| format!("making {kind} {:?}", object.metadata.name))
}

/// Applies a status of one of our kinds as one manager does.
pub async fn apply_status(
    api: &Api<DynamicObject>,
    kind: &str,
    name: &str,
    manager: &str,
    force: bool,
    status: Value,
) -> kube::Result<DynamicObject> {
    let mut params = PatchParams::apply(manager);
    params.force = force;
    let body = json!({"apiVersion": "understudy.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "status": status});
    api.patch_status(name, &params, &Patch::Apply(body)).await
}
