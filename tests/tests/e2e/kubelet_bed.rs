//! A whole cluster on node VMs: control plane, kubelets, and the chart.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use understudy_tests::bed::{GATEWAY, repository};
use understudy_tests::control_plane::{self, ControlPlane, Options};
use understudy_tests::e2e::Context;
use understudy_tests::kubelet::{Kubelet, images};

/// Where the chart is installed.
pub const NAMESPACE: &str = "understudy";
/// The Node's name: that of its host.
pub const NODE: &str = "node";
/// Until Pods are replaced, or a controller or an agent has done what it does at once.
pub const SOON: Duration = Duration::from_secs(300);

/// The cluster of a test.
pub struct Cluster {
    /// API server, etcd, controllers, scheduler.
    pub plane: ControlPlane,
    /// On the node VM of all tests.
    pub kubelet: Kubelet,
    /// Archives with the images that were imported from the start.
    pub archives: [PathBuf; 2],
    /// Where files of the test may be.
    pub dir: PathBuf,
}

impl Cluster {
    /// Control plane, kubelet and images; nothing of ours is installed.
    pub fn start(context: &Context) -> Result<Cluster> {
        let dir = repository().join("target/e2e/kubelet");
        if dir.exists() {
            // What a run left that was killed.
            control_plane::stop(&dir)?;
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        let archives = [
            images::bed(&context.binaries, &dir)?,
            images::ours(&context.binaries, &dir)?,
        ];
        let options = Options {
            address: GATEWAY.to_owned(),
            netns: Some(context.node().netns().clone()),
            controllers: true,
            pods: true,
            ..Options::default()
        };
        let plane = ControlPlane::start(&dir, options)?;
        context.say("control plane");
        let kubelet = Kubelet::join(context.node(), &plane, NODE, &archives)?;
        Ok(Cluster {
            plane,
            kubelet,
            archives,
            dir,
        })
    }

    /// `helm install` or `upgrade` of the chart, with an agent of this version.
    pub fn helm(&self, verb: &str, agent: &str) -> Result<()> {
        // Nothing can be pulled here, as on nodes without a network.
        let values = json!({
            "operator": {"replicas": 1, "image": {"pullPolicy": "Never"}},
            "agent": {
                "image": {"pullPolicy": "Never", "tag": agent},
                "config": {"namespaces": {"default": {"bridges": ["br0"]}}},
            },
        });
        let chart = repository().join("charts/understudy").display().to_string();
        let arguments = [
            verb,
            "understudy",
            &chart,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
        ];
        let count = if verb == "install" { 6 } else { 5 };
        self.plane.helm(&arguments[..count], Some(&values))?;
        Ok(())
    }

    /// Waits until the workloads are as the chart says, Pod by Pod.
    pub fn rolled_out(&self) -> Result<()> {
        for workload in ["daemonset/understudy-agent", "deployment/understudy-operator"] {
            let limit = format!("--timeout={}s", SOON.as_secs());
            let rolled =
                self.plane
                    .kubectl(&["rollout", "status", workload, "--namespace", NAMESPACE, &limit]);
            rolled.with_context(|| {
                let told = self.plane.kubectl(&["get", "pods,events", "--all-namespaces"]);
                told.unwrap_or_else(|error| format!("{error:#}"))
            })?;
        }
        Ok(())
    }

    /// `kubectl wait` for a condition.
    pub fn wait(&self, what: &str, kind: &str, name: &str, limit: Duration) -> Result<()> {
        self.plane.kubectl(&[
            "wait",
            &format!("--for=condition={what}"),
            &format!("--timeout={}s", limit.as_secs()),
            kind,
            name,
        ])?;
        Ok(())
    }

    /// The agent's Pod that is not about to end.
    pub fn agent_pod(&self) -> Result<Value> {
        let selector = "--selector=app.kubernetes.io/component=agent";
        let pods = self.plane.get(&["pods", "--namespace", NAMESPACE, selector])?;
        let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        ensure!(pods.len() == 1, "there are {} agents' Pods", pods.len());
        Ok(pods.remove(0))
    }

    /// The agent's last sign of life, as the API server knows it.
    pub fn heartbeat(&self) -> Result<String> {
        let host = self.plane.get(&["host", NODE])?;
        Ok(host["status"]["heartbeat"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }
}
