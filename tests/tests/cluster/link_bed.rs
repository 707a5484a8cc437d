//! An agent without engines at a real API server: their part is played by the tests.
#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use jiff::Timestamp;
use kube::api::{Api, DynamicObject};
use serde_json::{Value, json};
use understudy_api::conditions::{self, types};
use understudy_api::guest::GuestPhase;
use understudy_api::managers::OPERATOR;
use understudy_api::{Guest, SeamlessReboot};
use understudy_node::cluster::{Access, Cluster, Link, access};
use understudy_node::store::{Key, Object, Objects, Store};

use crate::link_server::{Server, api, apply_status, make};

const LIMIT: Duration = Duration::from_secs(60);
pub const OURS: &str = "understudy.dev/v1alpha1";

/// An agent without engines, and an administrator.
pub struct Bed<'run> {
    pub server: Arc<Server<'run>>,
    pub access: Access,
    pub admin: kube::Client,
    pub dir: tempfile::TempDir,
    pub cluster: Arc<Cluster>,
    pub link: Option<Link>,
}

impl<'run> Bed<'run> {
    pub async fn new(server: &Arc<Server<'run>>, node: &str) -> Result<Bed<'run>> {
        let access = server.node(node)?;
        let dir = tempfile::tempdir()?;
        access::write(dir.path(), &access)?;
        let cluster = open(&dir, &access)?;
        let mut bed = Bed {
            server: server.clone(),
            admin: server.admin()?,
            access,
            dir,
            cluster,
            link: None,
        };
        bed.start()?;
        Ok(bed)
    }

    pub fn start(&mut self) -> Result<()> {
        // As an agent that starts: from what is on disk.
        self.cluster = open(&self.dir, &self.access)?;
        self.link = Some(Link::start(
            self.cluster.clone(),
            self.dir.path(),
            Arc::new(|_: &str| false),
        )?);
        Ok(())
    }

    pub fn stop(&mut self) {
        if let Some(link) = self.link.take() {
            link.stop();
        }
    }

    pub fn writes(&self) -> u64 {
        self.link.as_ref().expect("started").health().writes
    }

    pub fn is_connected(&self) -> bool {
        self.link.as_ref().expect("started").health().connected
    }

    pub fn api(&self, kind: &str) -> Api<DynamicObject> {
        let namespace = ["Guest", "SeamlessReboot"].contains(&kind).then_some("default");
        api(&self.admin, OURS, kind, namespace)
    }

    /// A guest that the operator has assigned to the node.
    pub async fn guest(&self, name: &str) -> Result<Guest> {
        let guest = json!({"metadata": {"name": name, "namespace": "default", "finalizers": ["understudy.dev/guest"]},
            "spec": {"nodeName": self.access.node_name, "memory": "512Mi",
                "disks": [{"name": "root", "role": "Root", "source": format!("{name}.img")}]}});
        make(&self.admin, OURS, "Guest", guest).await?;
        self.assign("Guest", name).await?;
        self.local(&Key::new("default", name)).await
    }

    pub async fn reboot(&self, name: &str, guest: &str) -> Result<SeamlessReboot> {
        let reboot =
            json!({"metadata": {"name": name, "namespace": "default"}, "spec": {"guestName": guest}});
        make(&self.admin, OURS, "SeamlessReboot", reboot).await?;
        self.assign("SeamlessReboot", name).await?;
        self.local(&Key::new("default", name)).await
    }

    /// What the operator writes of an object before its agent has claimed it.
    pub async fn assign(&self, kind: &str, name: &str) -> Result<()> {
        let mut status = self.assignment();
        status["phase"] = "Pending".into();
        let conditions = status["conditions"].as_array_mut().expect("a list");
        conditions.push(condition("Ready", "False", "Pending"));
        apply_status(&self.api(kind), kind, name, OPERATOR, false, status).await?;
        Ok(())
    }

    pub fn assignment(&self) -> Value {
        json!({"nodeName": self.access.node_name, "nodeUID": self.access.node_uid,
            "conditions": [condition("Accepted", "True", "Assigned"), condition("AgentAvailable", "True", "AgentLives")]})
    }

    /// The local object, once it is there.
    pub async fn local<O: Object>(&self, key: &Key) -> Result<O> {
        until(&format!("{key} in the store"), async || {
            Ok(self.cluster.store().get::<O>(key)?)
        })
        .await
    }

    pub fn tell_guest(&self, guest: &Guest, phase: GuestPhase, address: Option<&str>) -> Result<()> {
        self.cluster
            .report_guest(&guest.key(), &guest.uid(), true, &mut |status| {
                status.phase = Some(phase);
                status.addresses = address.into_iter().map(str::to_owned).collect();
                let wanted = conditions::Wanted {
                    kind: types::READY,
                    status: Some(phase == GuestPhase::Running),
                    reason: "Test",
                    message: "",
                };
                conditions::set(&mut status.conditions, 1, Timestamp::now(), &[wanted]);
            })?;
        Ok(())
    }

    pub async fn reported(&self, kind: &str, name: &str, phase: &str) -> Result<DynamicObject> {
        let api = self.api(kind);
        until(&format!("{kind} {name} in {phase}"), async || {
            let object = api.get(name).await?;
            Ok((object.data["status"]["phase"] == phase).then_some(object))
        })
        .await
    }
}

pub fn open(dir: &tempfile::TempDir, access: &Access) -> Result<Arc<Cluster>> {
    Ok(Arc::new(Cluster::open(
        Store::open(dir.path())?,
        dir.path(),
        access,
    )?))
}

pub fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

pub fn has(object: &DynamicObject, kind: &str) -> bool {
    let mut conditions = object.data["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten();
    conditions.any(|there| there["type"] == kind && there["status"] == "True")
}

/// Waits until `look` finds something.
pub async fn until<T>(what: &str, look: impl AsyncFn() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    let mut trouble = String::new();
    while Instant::now() < deadline {
        match look().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => trouble = format!(" ({error:#})"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("gave up waiting for {what}{trouble}")
}
