//! A HostUpdate over two nodes with real kubelets: cordoned, drained, saved, rebooted into the newer kernel, resumed.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use understudy_tests::bed::{Firmware, Node, NodeOptions, Ssh, wait_until};
use understudy_tests::e2e::Context;
use understudy_tests::kubelet::{Kubelet, images};
use understudy_tests::load::Count;
use understudy_tests::machine::{Machine, condition_is};
use understudy_tests::updates;

use crate::kubelet::guest_on;
use crate::kubelet_bed::{Cluster, NODE, SOON};

/// The second node.
const OTHER: &str = "other";
/// An ordinary Pod's Deployment.
const SLEEPER: &str = "sleeper";
const UPDATE: &str = "kernel";
/// Two hosts, one after the other, under emulation.
const LIMIT: Duration = Duration::from_secs(2400);
const POLL: Duration = Duration::from_millis(500);

/// The second node VM, for one test.
struct Beside {
    node: Node,
    _firmware: Firmware,
    _lock: File,
}

impl Beside {
    fn up(context: &Context) -> Result<Beside> {
        let node = context.node().beside();
        let lock = node.lock()?;
        let images = &context.stage.images;
        let options = NodeOptions {
            memory_mib: 1536,
            ..NodeOptions::default()
        };
        node.up(images, &options, true)?;
        Ok(Beside {
            _firmware: Firmware::of(&node, images, &options),
            node,
            _lock: lock,
        })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Err(error) = self.node.remove() {
            eprintln!("warning: node {}: {error:#}", self.node.name());
        }
    }
}

/// `kubectl apply` of a HostUpdate: one node after the other is cordoned, its ordinary Pods go to the other one by
/// eviction, its guest's session is saved, it reboots into the newer kernel, the session goes on, and Pods may come
/// again. The only operator goes down with its host. The API server is away from when the first host saves until its
/// guest's session goes on.
pub fn a_host_update_takes_one_node_of_a_cluster_after_the_other(context: &Context) -> Result<()> {
    let mut machine = Machine::in_node(context.stage, &context.binaries);
    machine.clear()?;
    let beside = Beside::up(context)?;
    let mut cluster = Cluster::start(context)?;
    let other = Kubelet::join(&beside.node, &cluster.plane, OTHER, &cluster.archives)?;
    context.say("two nodes are Ready");
    cluster.helm("install", "")?;
    cluster.plane.apply(&sleeper().to_string())?;
    cluster.rolled_out()?;
    cluster.wait("Available", "deployment", SLEEPER, SOON)?;
    let guest = guest_on(&machine, &cluster)?;
    let life = guest.life()?;
    let sleepers = pod_of(&cluster)?;
    let mut count = Count::start(&machine, &guest.address)?;
    count.mark("update")?;
    context.say("the guest serves");

    let images = &context.stage.images;
    let command = [
        "/usr/bin/env",
        "DEBIAN_FRONTEND=noninteractive",
        "dpkg",
        "--install",
        &images.newer_package,
    ];
    cluster
        .plane
        .apply(&updates::manifest(UPDATE, Some(&command), None))?;
    while_the_api_server_is_away(context, &mut cluster, &guest.ssh)?;
    ensure!(guest.life()? == life, "the guest's session did not go on");
    let mut cordoned = BTreeSet::new();
    wait_until("the HostUpdate to be Ready", LIMIT, POLL, || {
        let nodes = cluster.plane.get(&["nodes"])?;
        let now: Vec<&str> = items(&nodes)
            .filter(|node| node["spec"]["unschedulable"] == true)
            .filter_map(|node| node["metadata"]["name"].as_str())
            .collect();
        ensure!(now.len() <= 1, "{now:?} are cordoned at once");
        for name in now {
            if cordoned.insert(name.to_owned()) {
                context.say(&format!("node {name} is cordoned"));
            }
        }
        let update = cluster.plane.get(&["hostupdate", UPDATE])?;
        ensure!(!condition_is(&update, "Stalled", "True"), "{}", update["status"]);
        Ok(condition_is(&update, "Ready", "True").then_some(()))
    })
    .with_context(|| {
        let told = cluster.plane.kubectl(&[
            "get",
            "hostupdates,nodeupdates,hosts,nodes,pods",
            "--all-namespaces",
        ]);
        told.unwrap_or_else(|error| format!("{error:#}"))
    })?;
    context.say(
        cluster
            .plane
            .kubectl(&["get", "hostupdates,nodeupdates,nodes"])?
            .trim_end(),
    );
    ensure!(cordoned.len() == 2, "of the nodes {cordoned:?} were cordoned");
    let nodes = cluster.plane.get(&["nodes"])?;
    for node in items(&nodes) {
        let (name, kernel) = (
            &node["metadata"]["name"],
            &node["status"]["nodeInfo"]["kernelVersion"],
        );
        ensure!(*kernel == images.newer_kernel.as_str(), "{name} runs {kernel}");
        ensure!(
            node["spec"]["unschedulable"].is_null(),
            "{name} is cordoned still"
        );
    }
    let passes = cluster.plane.get(&["nodeupdates"])?;
    for pass in items(&passes) {
        for condition in ["Cordoned", "Drained", "Uncordoned"] {
            ensure!(
                condition_is(pass, condition, "True"),
                "{condition}: {}",
                pass["status"]
            );
        }
    }
    ensure!(
        pod_of(&cluster)? != sleepers,
        "the ordinary Pod is the one that was evicted"
    );
    cluster.wait("Available", "deployment", SLEEPER, SOON)?;
    cluster.rolled_out()?;

    guest.ssh.forget();
    guest.ssh.wait(SOON, || Ok(()))?;
    ensure!(guest.life()? == life, "the guest's session did not go on");
    let count = count.finish()?;
    let seen = count.phases.get("update").context("nothing was watched")?;
    ensure!(seen.is_unbroken(), "{seen:?}; {:?}", count.faults);
    context.say("the guest's session went on");
    other.leave()?;
    cluster.kubelet.leave()?;
    machine.clear()
}

/// The guest's host goes down and is back, and its session goes on, while nobody can be asked.
fn while_the_api_server_is_away(context: &Context, cluster: &mut Cluster, guest: &Ssh) -> Result<()> {
    let boot = context.node().boot_id()?;
    wait_until("the guest's host to save", LIMIT, POLL, || {
        let updates = cluster.plane.get(&["nodeupdates"])?;
        let mut of_node = items(&updates).filter(|update| update["spec"]["nodeName"] == NODE);
        let has_begun = |update: &Value| {
            let phase = update["status"]["phase"].as_str().unwrap_or_default();
            ["Saving", "Acknowledged", "Rebooting"].contains(&phase)
        };
        Ok(of_node.any(has_begun).then_some(()))
    })?;
    cluster.plane.stop_api_server()?;
    context.say("the API server is away");
    context.node().wait_for_reboot(&boot, SOON)?;
    guest.forget();
    guest.wait(SOON, || Ok(()))?;
    context.say("the session goes on, and nobody has been asked");
    cluster.plane.start_api_server()
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

/// UID of the ordinary Pod.
fn pod_of(cluster: &Cluster) -> Result<Value> {
    let pods = cluster
        .plane
        .get(&["pods", &format!("--selector=app={SLEEPER}")])?;
    let mut there = items(&pods).filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let pod = there.next().context("there is no ordinary Pod")?;
    Ok(pod["metadata"]["uid"].clone())
}

/// An ordinary Pod that begins on the node with the guest, and may go anywhere.
fn sleeper() -> Value {
    let prefer = json!({"weight": 100, "preference": {"matchExpressions": [
        {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}]}});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": SLEEPER, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": SLEEPER}},
            "template": {
                "metadata": {"labels": {"app": SLEEPER}},
                "spec": {
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 5,
                    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [prefer]}},
                    "containers": [{
                        "name": SLEEPER,
                        "image": format!("{}/sleeper:1", images::REGISTRY),
                        "imagePullPolicy": "Never",
                    }],
                },
            },
        },
    })
}
