//! Node agents as the operator sees them: Nodes, and Hosts with a heartbeat. What agents do with objects is the test's.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use kube::Client;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use understudy_api::managers::AGENT;
use understudy_api::{API_VERSION, ResourceExt};

use crate::control_plane::objects::{api, apply_status, make};

/// A machine in one of its boots.
#[derive(Clone, Debug)]
pub struct Machine {
    /// UID of its Node.
    pub uid: String,
    /// Its boot.
    pub boot_id: String,
    /// Kernel release.
    pub kernel: String,
    booted_at: Timestamp,
    /// What its agent asks for: `status.rebootRequest` of its Host.
    request: Option<Value>,
}

struct Agent {
    machine: Machine,
    /// Absent: it is silent.
    voice: Option<JoinHandle<()>>,
}

/// The agents of a cluster. Those that speak tell of themselves every `every`.
pub struct Agents {
    client: Client,
    every: Duration,
    agents: Mutex<BTreeMap<String, Agent>>,
    beats: Arc<AtomicU64>,
}

impl Agents {
    /// None yet.
    pub fn new(client: &Client, every: Duration) -> Agents {
        Agents {
            client: client.clone(),
            every,
            agents: Mutex::default(),
            beats: Arc::default(),
        }
    }

    /// Heartbeats that were written so far, of all of them.
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Makes a Node whose kubelet tells of this kernel, and no agent on it.
    pub async fn node(&self, name: &str, kernel: &str, labels: Value) -> Result<Machine> {
        let node = json!({"metadata": {"name": name, "labels": labels}});
        let node = make(&self.client, "v1", "Node", node).await?;
        let machine = Machine {
            uid: node.uid().context("a Node without a UID")?,
            boot_id: uuid::Uuid::new_v4().to_string(),
            kernel: kernel.to_owned(),
            booted_at: Timestamp::now(),
            request: None,
        };
        self.tell_node(name, &machine).await?;
        Ok(machine)
    }

    /// A Node with an agent that speaks.
    pub async fn join(&self, name: &str, kernel: &str, labels: Value) -> Result<Machine> {
        let machine = self.node(name, kernel, labels).await?;
        self.begin(name, machine.clone()).await?;
        Ok(machine)
    }

    /// The agent of `machine` begins to speak: returns when it has done so once.
    pub async fn begin(&self, name: &str, machine: Machine) -> Result<()> {
        self.silence(name);
        // As an agent does: its Host is made where it is not there.
        let hosts = api(&self.client, API_VERSION, "Host", None);
        if hosts.get_opt(name).await?.is_none() {
            make(
                &self.client,
                API_VERSION,
                "Host",
                json!({"metadata": {"name": name}, "spec": {}}),
            )
            .await?;
        }
        beat(&self.client, name, &machine).await?;
        let (client, every, beats) = (self.client.clone(), self.every, self.beats.clone());
        let (of, told) = (name.to_owned(), machine.clone());
        let voice = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                // One that fails is followed by the next, as an agent's.
                if beat(&client, &of, &told).await.is_ok() {
                    beats.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let agent = Agent {
            machine,
            voice: Some(voice),
        };
        self.lock().insert(name.to_owned(), agent);
        Ok(())
    }

    /// The agent falls silent.
    pub fn silence(&self, name: &str) {
        let voice = self.lock().get_mut(name).and_then(|agent| agent.voice.take());
        if let Some(voice) = voice {
            voice.abort();
        }
    }

    /// It speaks again, in the same boot.
    pub async fn speak(&self, name: &str) -> Result<()> {
        self.begin(name, self.machine(name)?).await
    }

    /// What is known of a machine.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        let agents = self.lock();
        let agent = agents
            .get(name)
            .with_context(|| format!("no agent was on {name}"))?;
        Ok(agent.machine.clone())
    }

    /// The machine boots with this kernel; kubelet and agent speak from the new boot.
    pub async fn boot(&self, name: &str, kernel: &str) -> Result<()> {
        let machine = Machine {
            boot_id: uuid::Uuid::new_v4().to_string(),
            kernel: kernel.to_owned(),
            booted_at: Timestamp::now(),
            request: None,
            ..self.machine(name)?
        };
        self.tell_node(name, &machine).await?;
        self.begin(name, machine).await
    }

    /// The host goes down by itself: its agent tells of the NodeUpdate that it has begun.
    pub async fn ask(&self, name: &str, node_update: &str) -> Result<()> {
        let request = json!({"reason": "reboot", "requestedAt": Timestamp::now().to_string(), "nodeUpdate": node_update});
        let machine = Machine {
            request: Some(request),
            ..self.machine(name)?
        };
        self.begin(name, machine).await
    }

    async fn tell_node(&self, name: &str, machine: &Machine) -> Result<()> {
        let info = json!({"kernelVersion": machine.kernel, "bootID": machine.boot_id, "machineID": machine.uid,
            "systemUUID": machine.uid, "architecture": "amd64", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12",
            "kubeletVersion": "v1.36.3", "kubeProxyVersion": "", "containerRuntimeVersion": "containerd://2.4.2"});
        let patch = Patch::Merge(json!({"status": {"nodeInfo": info}}));
        let nodes = api(&self.client, "v1", "Node", None);
        let told = nodes.patch_status(name, &PatchParams::default(), &patch).await;
        told.with_context(|| format!("the status of Node {name}"))?;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Agent>> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        for agent in self.lock().values_mut() {
            if let Some(voice) = agent.voice.take() {
                voice.abort();
            }
        }
    }
}

/// One heartbeat.
async fn beat(client: &Client, name: &str, machine: &Machine) -> kube::Result<()> {
    let mut status = json!({"observedGeneration": 1, "nodeUID": machine.uid, "machineID": machine.uid, "bootID": machine.boot_id,
        "bootedAt": machine.booted_at.to_string(), "kernelRelease": machine.kernel, "agentVersion": "0.1.0",
        "heartbeat": Timestamp::now().to_string()});
    if let Some(request) = &machine.request {
        status["rebootRequest"] = request.clone();
    }
    let hosts = api(client, API_VERSION, "Host", None);
    apply_status(&hosts, "Host", name, AGENT, true, status)
        .await
        .map(drop)
}
