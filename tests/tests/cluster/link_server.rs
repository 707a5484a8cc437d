//! An API server for agents' links: the rights that an agent has by the chart, nodes, and tokens of Pods on them.

use std::fs;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};
use understudy_node::cluster::Access;
use understudy_tests::cluster::Context;
pub use understudy_tests::control_plane::objects::{api, apply_status, make};
use understudy_tests::control_plane::{ControlPlane, Options};

/// Where the agents' Pods are.
pub const NAMESPACE: &str = "understudy-system";

/// What an agent may do, and nothing else.
const RIGHTS: &[(&str, &[&str], &[&str])] = &[
    (
        "understudy.dev",
        &["guests", "seamlessreboots", "nodeupdates"],
        &["get", "list", "watch"],
    ),
    (
        "understudy.dev",
        &[
            "guests/status",
            "seamlessreboots/status",
            "nodeupdates/status",
            "hosts/status",
        ],
        &["patch"],
    ),
    ("understudy.dev", &["hosts"], &["get", "create"]),
    ("events.k8s.io", &["events"], &["create"]),
];

/// An API server with our CRDs and the agents' ServiceAccount.
pub struct Server<'run> {
    plane: Plane<'run>,
    config: Config,
}

enum Plane<'run> {
    Shared(&'run ControlPlane),
    Own(Box<Mutex<ControlPlane>>),
}

impl<'run> Server<'run> {
    /// The control plane that all tests share.
    pub async fn shared(context: &Context<'run>) -> Result<Server<'run>> {
        Server::prepare(Plane::Shared(context.plane)).await
    }

    /// One for this test alone, which may stop it.
    pub async fn own(context: &Context<'run>) -> Result<Server<'run>> {
        let plane = ControlPlane::start(&context.dir.join("own"), Options::default())?;
        plane.apply_crds()?;
        Server::prepare(Plane::Own(Box::new(Mutex::new(plane)))).await
    }

    async fn prepare(plane: Plane<'run>) -> Result<Server<'run>> {
        let kubeconfig = with(&plane, |plane| Kubeconfig::read_from(plane.kubeconfig()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let rules: Vec<Value> = RIGHTS
            .iter()
            .map(|(group, resources, verbs)| json!({"apiGroups": [group], "resources": resources, "verbs": verbs}))
            .collect();
        let rbac = "rbac.authorization.k8s.io/v1";
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent", "namespace": NAMESPACE}},
            {"apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": "agent"}, "rules": rules},
            {"apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "agent"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "agent"},
                "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": NAMESPACE}]},
        ]});
        // Several tests may do so at once; whoever comes second changes nothing.
        with(&plane, |plane| {
            plane.kubectl_with(&["apply", "--server-side", "--filename=-"], &objects.to_string())
        })?;
        Ok(Server { plane, config })
    }

    /// Stops the API server, which must be this test's own.
    pub fn stop_api(&self) -> Result<()> {
        self.own_plane()?.stop_api_server()
    }

    /// Starts it again.
    pub fn start_api(&self) -> Result<()> {
        self.own_plane()?.start_api_server()
    }

    fn own_plane(&self) -> Result<std::sync::MutexGuard<'_, ControlPlane>> {
        match &self.plane {
            Plane::Own(plane) => Ok(plane.lock().unwrap_or_else(PoisonError::into_inner)),
            Plane::Shared(_) => anyhow::bail!("other tests need this API server"),
        }
    }

    /// A client of an administrator.
    pub fn admin(&self) -> Result<Client> {
        Ok(Client::try_from(self.config.clone())?)
    }

    /// A node, and the access of its agent: the token is of a Pod on it, as the kubelet asks for.
    pub fn node(&self, name: &str) -> Result<Access> {
        with(&self.plane, |plane| {
            plane.apply(
                &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}).to_string(),
            )?;
            let node = plane.get(&["node", name])?;
            let ca = plane.authority()?.certificate().certificate;
            Ok(Access {
                server: plane.server(),
                ca_data: fs::read_to_string(&ca).with_context(|| format!("cannot read {}", ca.display()))?,
                token: plane.token_on_node(NAMESPACE, "agent", name)?,
                node_name: name.to_owned(),
                node_uid: node["metadata"]["uid"].as_str().context("a UID")?.to_owned(),
                namespace: NAMESPACE.to_owned(),
            })
        })
    }
}

fn with<T>(plane: &Plane<'_>, look: impl FnOnce(&ControlPlane) -> T) -> T {
    match plane {
        Plane::Shared(plane) => look(plane),
        Plane::Own(plane) => look(&plane.lock().unwrap_or_else(PoisonError::into_inner)),
    }
}
