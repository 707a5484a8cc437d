//! The operator's binary at a real API server with the chart's rights, and agents that are played at the API: their
//! heartbeats, and what they write of objects on their nodes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};
use understudy_api::managers::AGENT;
use understudy_tests::bed::{Stage, repository};
use understudy_tests::chart::audit::{Used, used_by};
use understudy_tests::cluster::Context;
use understudy_tests::control_plane::{ControlPlane, Options, Programs};

use crate::link_bed::OURS;
use crate::link_server::{api, apply_status, make};

/// Where the chart is installed.
const NAMESPACE: &str = "understudy";
/// Agents are silent after 40 s, hosts away after a minute; a busy machine takes its time.
const LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(50);
/// How often an agent speaks. A real one does every 10 s.
const BEAT: Duration = Duration::from_secs(2);
/// Who the operator is.
const OPERATOR: &str = "system:serviceaccount:understudy:understudy-operator";
/// Everything that is asked of the API server is noted; only reads of others are left out.
const AUDIT: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    users: [\"system:serviceaccount:understudy:understudy-operator\"]
  - level: None
";

/// An API server with the chart.
pub struct Bed {
    plane: ControlPlane,
    dir: PathBuf,
    kubeconfig: PathBuf,
    admin: Client,
}

impl Bed {
    /// Starts it. Nothing runs there.
    pub async fn start(context: &Context<'_>) -> Result<Arc<Bed>> {
        let dir = context.dir.join("own");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let policy = dir.join("audit.yaml");
        fs::write(&policy, AUDIT).context("cannot write the audit policy")?;
        let log = dir.join("audit.log");
        let options = Options {
            api_server_arguments: vec![
                format!("--audit-policy-file={}", policy.display()),
                format!("--audit-log-path={}", log.display()),
                // What was answered is in the log.
                "--audit-log-mode=blocking".to_owned(),
            ],
            ..Options::default()
        };
        let plane = ControlPlane::start(&dir, options)?;
        let helm = Programs::build(&["helm"])?;
        let output = Command::new(helm.path("helm")?)
            .args([
                "install",
                "understudy",
                "--create-namespace",
                "--namespace",
                NAMESPACE,
            ])
            .arg(repository().join("charts/understudy"))
            .env("KUBECONFIG", plane.kubeconfig())
            .output()
            .context("cannot run helm")?;
        ensure!(
            output.status.success(),
            "helm install: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        plane.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "crd",
            "--selector=app.kubernetes.io/part-of=understudy",
        ])?;
        let token = plane.token(NAMESPACE, "understudy-operator")?;
        let kubeconfig = plane.write_token_kubeconfig("operator", &token)?;
        let admin = Kubeconfig::read_from(plane.kubeconfig())?;
        let admin = Config::from_custom_kubeconfig(admin, &KubeConfigOptions::default()).await?;
        Ok(Arc::new(Bed {
            dir: plane.dir().to_owned(),
            plane,
            kubeconfig,
            admin: Client::try_from(admin)?,
        }))
    }

    /// Starts an operator that calls itself so.
    pub fn operator(&self, identity: &str) -> Result<Operator> {
        let log = self.dir.join(format!("{identity}.log"));
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let process = Command::new(Stage::binaries()?.join("understudy"))
            .args(["run", "--namespace", NAMESPACE, "--listen", "127.0.0.1:0"])
            .args(["--identity", identity])
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start the operator")?;
        Ok(Operator(process))
    }

    /// Who holds the operators' Lease.
    pub async fn leader(&self) -> Result<Option<String>> {
        let leases = api(&self.admin, "coordination.k8s.io/v1", "Lease", Some(NAMESPACE));
        let lease = leases.get_opt("understudy-operator").await?;
        let holder = lease.and_then(|lease| lease.data["spec"]["holderIdentity"].as_str().map(str::to_owned));
        Ok(holder.filter(|holder| !holder.is_empty()))
    }

    /// Objects of ours of a kind, those of the namespace `default` where they have one.
    pub fn ours(&self, kind: &str) -> Api<DynamicObject> {
        let namespace = ["Guest", "SeamlessReboot"].contains(&kind).then_some("default");
        api(&self.admin, OURS, kind, namespace)
    }

    /// Objects of Kubernetes' own.
    pub fn core(&self, version: &str, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
        api(&self.admin, version, kind, namespace)
    }

    /// Makes an object of ours.
    pub async fn make(&self, kind: &str, name: &str, spec: Value) -> Result<DynamicObject> {
        let mut object = json!({"metadata": {"name": name}, "spec": spec});
        if ["Guest", "SeamlessReboot"].contains(&kind) {
            object["metadata"]["namespace"] = "default".into();
        }
        make(&self.admin, OURS, kind, object).await
    }

    /// Makes a guest of this node.
    pub async fn guest(&self, name: &str, node: Option<&str>) -> Result<DynamicObject> {
        let disk = json!({"name": "root", "role": "Root", "source": format!("{name}.img")});
        let mut spec = json!({"memory": "512Mi", "disks": [disk]});
        if let Some(node) = node {
            spec["nodeName"] = node.into();
        }
        self.make("Guest", name, spec).await
    }

    /// Makes a node; its UID.
    pub async fn node(&self, name: &str, labels: Value) -> Result<String> {
        let node = json!({"metadata": {"name": name, "labels": labels}});
        let node = make(&self.admin, "v1", "Node", node).await?;
        node.metadata.uid.context("a UID")
    }

    /// Changes an object as an administrator does.
    pub async fn merge(&self, api: &Api<DynamicObject>, name: &str, patch: Value) -> Result<DynamicObject> {
        let patched = api
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.with_context(|| format!("changing {name}"))
    }

    /// Waits until an object of ours is as `is` wants it, and returns it.
    pub async fn until(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        is: impl Fn(&Value) -> bool,
    ) -> Result<DynamicObject> {
        let api = self.ours(kind);
        until(&format!("{kind} {name}: {what}"), async || {
            let object = api.get(name).await?;
            match is(&object.data["status"]) {
                true => Ok(Ok(object)),
                false => Ok(Err(object.data["status"].to_string())),
            }
        })
        .await
    }

    /// Waits until an object is gone.
    pub async fn until_gone(&self, api: &Api<DynamicObject>, name: &str) -> Result<()> {
        until(&format!("the end of {name}"), async || {
            Ok(match api.get_opt(name).await? {
                None => Ok(()),
                Some(object) => Err(format!("{:?}", object.metadata.finalizers)),
            })
        })
        .await
    }

    /// What the operator has done, as the API server noted it.
    pub fn used(&self) -> Result<Used> {
        Ok(used_by(OPERATOR, &self.audit()?))
    }

    /// How often the operator has written, but for its Lease: answered requests `(verb, resource)`.
    pub fn writes(&self) -> Result<Vec<(String, String)>> {
        let mut writes = Vec::new();
        for line in self.audit()?.lines() {
            let Ok(event) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (verb, resource) = (text(&event["verb"]), text(&event["objectRef"]["resource"]));
            let is_read = ["get", "list", "watch"].contains(&verb.as_str());
            let is_done = event["responseStatus"]["code"]
                .as_u64()
                .is_some_and(|code| code < 300);
            if !is_read && is_done && resource != "leases" {
                writes.push((verb, format!("{resource} {}", text(&event["objectRef"]["name"]))));
            }
        }
        Ok(writes)
    }

    fn audit(&self) -> Result<String> {
        let log = self.dir.join("audit.log");
        fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))
    }

    /// Rights of the operator's roles: the cluster's, and those in its namespace.
    pub async fn rights(&self) -> Result<BTreeSet<understudy_tests::chart::audit::Right>> {
        let mut all = BTreeSet::new();
        for path in [
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/understudy-operator".to_owned(),
            format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/roles/understudy-operator"),
        ] {
            all.extend(crate::chart_rights::rights(&self.admin, &path).await);
        }
        Ok(all)
    }

    /// Ends the control plane.
    pub fn stop(self: Arc<Bed>) -> Result<()> {
        match Arc::try_unwrap(self) {
            Ok(bed) => bed.plane.stop(),
            Err(_) => bail!("the control plane is in use"),
        }
    }
}

/// An operator; killed when dropped.
pub struct Operator(Child);

impl Operator {
    /// Asks it to end, and waits for that.
    pub fn terminate(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("cannot ask it to end")?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the operator ended with {status}");
        Ok(())
    }

    /// Kills it.
    pub fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An agent that speaks until it is dropped.
pub struct Agent {
    bed: Arc<Bed>,
    /// Name of its node.
    pub node: String,
    uid: String,
    status: Arc<Mutex<Value>>,
    beats: Arc<Mutex<u64>>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// Begins to speak, from the Node of this UID.
    pub async fn start(bed: &Arc<Bed>, node: &str, uid: &str) -> Result<Agent> {
        let hosts = bed.ours("Host");
        if hosts.get_opt(node).await?.is_none() {
            let host: DynamicObject = serde_json::from_value(
                json!({"apiVersion": OURS, "kind": "Host", "metadata": {"name": node}, "spec": {}}),
            )?;
            hosts.create(&PostParams::default(), &host).await?;
        }
        let status = Arc::new(Mutex::new(json!({
            "observedGeneration": 1, "nodeUID": uid, "bootID": "boot-1", "bootedAt": "2026-01-01T00:00:00Z",
            "kernelRelease": "6.1.0-1", "agentVersion": "0.1.0",
        })));
        let beats = Arc::new(Mutex::new(0));
        let task = tokio::spawn({
            let (status, beats, node) = (status.clone(), beats.clone(), node.to_owned());
            async move {
                loop {
                    let mut now = lock(&status).clone();
                    now["heartbeat"] = json!(Timestamp::now().to_string());
                    if apply_status(&hosts, "Host", &node, AGENT, false, now)
                        .await
                        .is_ok()
                    {
                        *lock(&beats) += 1;
                    }
                    tokio::time::sleep(BEAT).await;
                }
            }
        });
        Ok(Agent {
            bed: bed.clone(),
            node: node.to_owned(),
            uid: uid.to_owned(),
            status,
            beats,
            task,
        })
    }

    /// Its Host says this as well from its next heartbeat on.
    pub fn says(&self, field: &str, value: Value) {
        lock(&self.status)[field] = value;
    }

    /// How often it has spoken.
    pub fn beats(&self) -> u64 {
        *lock(&self.beats)
    }

    /// Writes its part of an object's status, as the claim and what follows it.
    pub async fn writes(&self, kind: &str, name: &str, mut status: Value) -> Result<()> {
        status["observedGeneration"] = json!(1);
        let api = self.bed.ours(kind);
        apply_status(&api, kind, name, AGENT, true, status)
            .await
            .with_context(|| format!("the agent of {} writes {kind} {name}", self.node))?;
        Ok(())
    }

    /// UID of its Node.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// The node's kernel has changed: what kubelet and agent say of it from now on.
    pub async fn reboots(&self, kernel: &str) -> Result<()> {
        let boot = format!("boot-{kernel}");
        let info = json!({"status": {"nodeInfo": {
            "kernelVersion": kernel, "bootID": boot, "machineID": "m", "systemUUID": "s", "osImage": "", "architecture": "amd64",
            "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "", "operatingSystem": "linux",
        }}});
        let nodes = self.bed.core("v1", "Node", None);
        nodes
            .patch_status(&self.node, &PatchParams::default(), &Patch::Merge(info))
            .await?;
        self.says("bootID", json!(boot));
        self.says("kernelRelease", json!(kernel));
        self.says("bootedAt", json!(Timestamp::now().to_string()));
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A condition as an agent writes it.
pub fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": Timestamp::now().to_string()})
}

/// Whether a status has this condition, with status and reason.
pub fn has(status: &Value, kind: &str, is: &str, reason: &str) -> bool {
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.any(|there| there["type"] == kind && there["status"] == is && there["reason"] == reason)
}

/// Waits until `look` finds something; it tells what it saw in its place.
pub async fn until<T>(what: &str, look: impl AsyncFn() -> Result<Result<T, String>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    let mut saw = String::new();
    while Instant::now() < deadline {
        match look().await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(other)) => saw = other,
            Err(error) => saw = format!("{error:#}"),
        }
        tokio::time::sleep(POLL).await;
    }
    bail!("gave up waiting for {what}: {saw}")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
