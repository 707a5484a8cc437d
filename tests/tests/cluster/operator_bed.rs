//! What the tests of the operator share: objects as users and agents write them, and waiting for what the operator makes of
//! them. Agents' engines, kubelets and controllers are played by the tests; all else is real.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use understudy_api::API_VERSION;
use understudy_api::managers::AGENT;

use understudy_tests::control_plane::objects::{api, apply_status, make};
use understudy_tests::operator::Agents;

/// Until the operator has done something: an agent counts as silent after 40 s, and the machine may be busy.
const LIMIT: Duration = Duration::from_secs(150);
/// Kernel release of machines before an update, and after it.
pub const OLD: &str = "6.1.0-47-amd64";
pub const NEW: &str = "6.1.0-56-amd64";

/// The operator's Pod, and so what it calls itself.
pub const OPERATOR: &str = "alone";

/// A scenario, by its name.
pub type Scenario = (&'static str, fn(Rc<Bed>) -> Played);
/// What becomes of it.
pub type Played = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Functions over a [`Bed`] as a list of scenarios.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), |bed| Box::pin(async move { $name(&bed).await }))),*]
    };
}

/// A cluster in which an operator leads.
pub struct Bed {
    /// An administrator.
    pub admin: Client,
    /// The agents.
    pub agents: Agents,
}

impl Bed {
    pub fn new(admin: Client) -> Bed {
        // Oftener than real ones, so that a change of theirs is seen soon.
        let agents = Agents::new(&admin, Duration::from_secs(2));
        Bed { admin, agents }
    }

    pub fn api(&self, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let namespace = (!namespace.is_empty()).then_some(namespace);
        match kind {
            "Node" | "Pod" | "Namespace" | "Secret" | "ServiceAccount" => {
                api(&self.admin, "v1", kind, namespace)
            }
            "PodDisruptionBudget" => api(&self.admin, "policy/v1", kind, namespace),
            "Event" => api(&self.admin, "events.k8s.io/v1", kind, namespace),
            "Lease" => api(&self.admin, "coordination.k8s.io/v1", kind, namespace),
            _ => api(&self.admin, API_VERSION, kind, namespace),
        }
    }

    /// A namespace with the account that Pods there get.
    pub async fn namespace(&self, name: &str) -> Result<()> {
        make(
            &self.admin,
            "v1",
            "Namespace",
            json!({"metadata": {"name": name}}),
        )
        .await?;
        self.account(name).await
    }

    /// The account that Pods of a namespace have; no controller makes it here.
    pub async fn account(&self, namespace: &str) -> Result<()> {
        let account = json!({"metadata": {"name": "default", "namespace": namespace}});
        make(&self.admin, "v1", "ServiceAccount", account).await?;
        Ok(())
    }

    pub async fn guest(&self, namespace: &str, name: &str, node: Option<&str>) -> Result<()> {
        let mut spec = json!({"memory": "512Mi", "disks": [{"name": "root", "role": "Root", "source": format!("{name}.img")}]});
        if let Some(node) = node {
            spec["nodeName"] = json!(node);
        }
        self.make("Guest", namespace, name, spec).await
    }

    /// A guest that its agent runs.
    pub async fn running_guest(&self, namespace: &str, name: &str, node: &str) -> Result<()> {
        self.guest(namespace, name, Some(node)).await?;
        self.until("Guest", namespace, name, "be assigned", |guest| {
            guest["status"]["nodeName"] == node
        })
        .await?;
        let status = json!({"observedGeneration": 1, "phase": "Running", "conditions": [condition("Ready", "True", "Running")]});
        self.agent_writes("Guest", namespace, name, status).await
    }

    pub async fn reboot(&self, namespace: &str, name: &str, guest: &str, rest: Value) -> Result<()> {
        let mut spec = json!({"guestName": guest});
        merge(&mut spec, rest);
        self.make("SeamlessReboot", namespace, name, spec).await
    }

    pub async fn host_update(&self, name: &str, rest: Value) -> Result<()> {
        // Those of this scenario alone.
        let mut spec =
            json!({"nodeSelector": {"matchLabels": {"scenario": name}}, "expect": {"kernelRelease": NEW}});
        merge(&mut spec, rest);
        self.make("HostUpdate", "", name, spec).await
    }

    pub async fn make(&self, kind: &str, namespace: &str, name: &str, spec: Value) -> Result<()> {
        let mut object = json!({"metadata": {"name": name}, "spec": spec});
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = json!(namespace);
        }
        make(&self.admin, API_VERSION, kind, object).await.map(drop)
    }

    pub async fn patch(&self, kind: &str, namespace: &str, name: &str, patch: Value) -> Result<()> {
        let api = self.api(kind, namespace);
        let patched = api
            .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        patched
            .map(drop)
            .with_context(|| format!("patching {kind} {name} with {patch}"))
    }

    pub async fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let mut parameters = DeleteParams::background();
        if kind == "Pod" {
            parameters.grace_period_seconds = Some(0);
        }
        let api = self.api(kind, namespace);
        let deleted = api.delete(name, &parameters).await;
        deleted
            .map(drop)
            .with_context(|| format!("deleting {kind} {name}"))
    }

    /// The claim of an agent, and what it writes later: all its fields of the status.
    pub async fn agent_writes(&self, kind: &str, namespace: &str, name: &str, status: Value) -> Result<()> {
        let api = self.api(kind, namespace);
        let written = apply_status(&api, kind, name, AGENT, true, status.clone()).await;
        written
            .map(drop)
            .with_context(|| format!("the agent's {kind} {name}: {status}"))
    }

    /// The agent brings a SeamlessReboot or NodeUpdate into a phase, as if it had been in it `ago`.
    pub async fn phase(&self, kind: &str, namespace: &str, name: &str, phase: &str, ago: i64) -> Result<()> {
        let there = self.get(kind, namespace, name).await?;
        let since = Timestamp::now() - jiff::SignedDuration::from_secs(ago);
        let before = there["status"]["phaseTransitions"].as_array();
        let mut transitions = before.cloned().unwrap_or_default();
        transitions.push(json!({"phase": phase, "transitionTime": since.to_string()}));
        let (ready, ended) = match phase {
            "Succeeded" | "Resumed" => ("True", "Complete"),
            "Failed" | "Aborted" => ("False", "Failed"),
            _ => ("False", ""),
        };
        let is = |kind: &str| if kind == ended { "True" } else { "False" };
        let status = json!({"observedGeneration": 1, "phase": phase, "reason": "Played", "message": "by a test",
            "phaseTransitions": transitions, "conditions": [condition("Ready", ready, "Played"),
                condition("Complete", is("Complete"), "Played"), condition("Failed", is("Failed"), "Played")]});
        self.agent_writes(kind, namespace, name, status).await
    }

    pub async fn get(&self, kind: &str, namespace: &str, name: &str) -> Result<Value> {
        let object = self.api(kind, namespace).get(name).await;
        Ok(serde_json::to_value(
            object.with_context(|| format!("reading {kind} {name}"))?,
        )?)
    }

    pub async fn is_there(&self, kind: &str, namespace: &str, name: &str) -> Result<bool> {
        Ok(self.api(kind, namespace).get_opt(name).await?.is_some())
    }

    /// Waits until an object is as `is` says; the object.
    pub async fn until(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        what: &str,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let api = self.api(kind, namespace);
        let mut last = Value::Null;
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            // Away for a moment, perhaps: a CRD is being changed.
            if let Ok(there) = api.get_opt(name).await {
                last = serde_json::to_value(there)?;
                if !last.is_null() && is(&last) {
                    return Ok(last);
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if let Some(metadata) = last["metadata"].as_object_mut() {
            metadata.remove("managedFields");
        }
        bail!("gave up waiting for {kind} {name} to {what}; it is {last:#}")
    }

    pub async fn until_gone(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.until_true(&format!("{kind} {name} to be gone"), async || {
            Ok(!self.is_there(kind, namespace, name).await?)
        })
        .await
    }

    pub async fn until_true(&self, what: &str, is: impl AsyncFn() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            if is().await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("gave up waiting for {what}")
    }

    /// Waits for a condition to have a status and a reason: `False NodeNotFound`.
    pub async fn until_condition(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        condition: &str,
        value: &str,
    ) -> Result<Value> {
        let what = format!("have {condition} {value}");
        self.until(kind, namespace, name, &what, |there| {
            condition_of(there, condition) == value
        })
        .await
    }

    /// The NodeUpdates of a HostUpdate, by generation.
    pub async fn passes(&self, update: &str) -> Result<Vec<Value>> {
        let all = self.api("NodeUpdate", "").list(&Default::default()).await?;
        let mut passes = Vec::new();
        for pass in all {
            let pass = serde_json::to_value(pass)?;
            if pass["spec"]["hostUpdate"]["name"] == update {
                passes.push(pass);
            }
        }
        passes.sort_by_key(|pass| pass["spec"]["hostUpdate"]["generation"].as_i64());
        Ok(passes)
    }

    /// Waits until a HostUpdate has a NodeUpdate of this node that is not over; its name.
    pub async fn pass_of(&self, update: &str, node: &str) -> Result<String> {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            let passes = self.passes(update).await?;
            let found = passes
                .iter()
                .find(|pass| pass["spec"]["nodeName"] == node && !is_over(pass));
            if let Some(pass) = found {
                return Ok(text(&pass["metadata"]["name"]));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let there = self.get("HostUpdate", "", update).await?;
        bail!(
            "HostUpdate {update} has no NodeUpdate of {node}: {:#}",
            there["status"]
        )
    }

    /// The agent's part of a NodeUpdate, up to the new kernel.
    pub async fn update_node(&self, pass: &str, node: &str) -> Result<()> {
        self.until("NodeUpdate", "", pass, "be drained", |there| {
            condition_of(there, "Drained").starts_with("True ")
        })
        .await?;
        for phase in ["Notified", "Saving", "Acknowledged", "Rebooting"] {
            self.phase("NodeUpdate", "", pass, phase, 0).await?;
        }
        self.agents.boot(node, NEW).await?;
        for phase in ["LoggingOn", "Resuming", "Resumed"] {
            self.phase("NodeUpdate", "", pass, phase, 0).await?;
        }
        Ok(())
    }

    /// Whether Pods are kept from a node, and for which NodeUpdate the operator did so.
    pub async fn cordon(&self, node: &str) -> Result<(bool, Option<String>)> {
        let node = self.get("Node", "", node).await?;
        let note = node["metadata"]["annotations"]["understudy.dev/cordoned-for"].as_str();
        Ok((node["spec"]["unschedulable"] == true, note.map(str::to_owned)))
    }

    pub async fn until_free(&self, node: &str) -> Result<()> {
        self.until_true(&format!("node {node} to be uncordoned"), async || {
            Ok(self.cordon(node).await? == (false, None))
        })
        .await
    }

    /// A Pod that runs on a node, as its kubelet tells.
    pub async fn pod(&self, namespace: &str, name: &str, node: &str, metadata: Value) -> Result<()> {
        let mut pod = json!({"metadata": {"name": name, "namespace": namespace}, "spec": {"nodeName": node,
            "automountServiceAccountToken": false, "containers": [{"name": "c", "image": "none.invalid/c"}]}});
        merge(&mut pod["metadata"], metadata);
        make(&self.admin, "v1", "Pod", pod).await?;
        let status =
            json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        let pods = self.api("Pod", namespace);
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
        Ok(())
    }
}

pub fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// Status and reason of a condition: `False NodeNotFound`.
pub fn condition_of(object: &Value, kind: &str) -> String {
    let mut all = object["status"]["conditions"].as_array().into_iter().flatten();
    all.find(|there| there["type"] == kind)
        .map(|there| format!("{} {}", text(&there["status"]), text(&there["reason"])))
        .unwrap_or_default()
}

/// What a condition says to people.
pub fn message_of(object: &Value, kind: &str) -> String {
    let mut all = object["status"]["conditions"].as_array().into_iter().flatten();
    all.find(|there| there["type"] == kind)
        .map(|there| text(&there["message"]))
        .unwrap_or_default()
}

/// What a HostUpdate tells of a node.
pub fn node_of(update: &Value, node: &str) -> Value {
    let mut all = update["status"]["nodes"].as_array().into_iter().flatten();
    all.find(|there| there["name"] == node)
        .cloned()
        .unwrap_or_default()
}

pub fn is_over(object: &Value) -> bool {
    let phase = object["status"]["phase"].as_str().unwrap_or_default();
    ["Succeeded", "Resumed", "Failed", "Aborted"].contains(&phase)
}

pub fn has_finalizers(object: &Value) -> bool {
    object["metadata"]["finalizers"]
        .as_array()
        .is_some_and(|all| !all.is_empty())
}

/// The managers of an object's status that own a field of it.
pub fn owners(object: &Value, field: &str) -> Vec<String> {
    let entries = object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten();
    entries
        .filter(|entry| {
            entry["subresource"] == "status" && !entry["fieldsV1"]["f:status"][format!("f:{field}")].is_null()
        })
        .map(|entry| text(&entry["manager"]))
        .collect()
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn merge(into: &mut Value, from: Value) {
    if let (Some(into), Value::Object(from)) = (into.as_object_mut(), from) {
        into.extend(from);
    }
}
