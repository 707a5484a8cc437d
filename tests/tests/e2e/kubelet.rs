//! A whole cluster on one node VM: a real kubelet runs what the chart installs, and the agent comes to its host as users
//! get it, by the DaemonSet's Pod.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::demo::{MAC, guest_manifest};
use understudy_tests::e2e::Context;
use understudy_tests::kubelet::images;
use understudy_tests::load::{Count, Load};
use understudy_tests::machine::{Machine, condition_is};
use understudy_tests::pair;

use crate::guest::GUEST;
use crate::handover::{OFTEN, QUIET, REBOOT_LIMIT, reboot};
use crate::kubelet_bed::{Cluster, NAMESPACE, NODE, SOON};

/// The version that agents are upgraded to.
const NEXT: &str = "0.1.9";
const BOOT_LIMIT: Duration = Duration::from_secs(480);
const POLL: Duration = Duration::from_millis(500);

/// `helm install` on a node that knows nothing of us: the DaemonSet's Pod brings the agent, the operator's Pod leads, and
/// kubectl declares a guest. The agent's Pod, kubelet and API server die: the guest does not notice. It is rebooted, and
/// meanwhile `helm upgrade` replaces the agent: the reboot completes, and nothing that was acknowledged is lost. After
/// `helm uninstall` the guest serves on.
pub fn a_daemon_set_brings_the_agent_and_a_guest_is_rebooted_by_kubectl(context: &Context) -> Result<()> {
    let mut machine = Machine::in_node(context.stage, &context.binaries);
    machine.clear()?;
    let mut cluster = Cluster::start(context)?;
    context.say("the node is Ready");
    cluster.helm("install", "")?;
    cluster.rolled_out()?;
    context.say("operator and agent run, as Pods");
    let pod = cluster.agent_pod()?;
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
    wait_until("the service's log in that of its Pod", SOON, POLL, || {
        let log = cluster
            .plane
            .kubectl(&["logs", pod_name, "--namespace", NAMESPACE])?;
        Ok(log.contains("understudy-node").then_some(()))
    })?;
    let host = cluster.plane.get(&["host", NODE])?;
    ensure!(
        host["status"]["agentVersion"] == env!("CARGO_PKG_VERSION"),
        "the Host is {}",
        host["status"]
    );

    let guest = guest_on(&machine, &cluster)?;
    let life = guest.life()?;
    let mut load = Load::start(&machine, &guest.address, "kubelet", OFTEN)?;
    let mut count = Count::start(&machine, &guest.address)?;
    context.say("the guest serves");

    pods_and_nodes_programs_die(context, &mut cluster, &mut count, &pod)?;
    let count = count.finish()?;
    for phase in ["pod", "outage"] {
        let seen = count.phases.get(phase).context("a phase that was not watched")?;
        ensure!(
            seen.is_unbroken(),
            "in phase {phase}: {seen:?}; {:?}",
            count.faults
        );
    }
    ensure!(guest.life()? == life, "the guest was started anew");

    load.mark("reboot")?;
    the_agent_is_upgraded_under_a_reboot(context, &cluster)?;

    cluster.plane.helm(
        &["uninstall", "understudy", "--namespace", NAMESPACE, "--wait"],
        None,
    )?;
    wait_until("the Pods to be gone", SOON, POLL, || {
        let pods = cluster
            .plane
            .kubectl(&["get", "pods", "--namespace", NAMESPACE, "--output=name"])?;
        Ok(pods.trim().is_empty().then_some(()))
    })?;
    load.mark("uninstalled")?;
    std::thread::sleep(QUIET);
    let report = load.finish()?;
    report.ensure_nothing_lost()?;
    let answered = report
        .phases
        .get("uninstalled")
        .map_or(0, |seen| seen.page.answered);
    ensure!(answered > 0, "the page does not answer after the uninstall");
    ensure!(
        cluster.plane.get(&["guest", GUEST])?["metadata"]["name"] == GUEST,
        "the Guest is gone with the chart"
    );
    ensure!(
        machine.sh("systemctl is-active understudy-node.service")?.trim() == "active",
        "the service ended with the chart"
    );
    context.say(&format!(
        "uninstalled: the guest serves on; lines {} of {}",
        report.found, report.acknowledged
    ));
    cluster.kubelet.leave()?;
    machine.clear()
}

/// Declares the guest on the node VM of all tests, and waits until it serves.
pub fn guest_on(machine: &Machine, cluster: &Cluster) -> Result<pair::Guest> {
    machine.place_disk("web.img")?;
    let manifest = guest_manifest(GUEST, MAC, &format!("  nodeName: {NODE}\n"));
    cluster.plane.apply(&manifest)?;
    cluster.wait("Ready", "guest", GUEST, BOOT_LIMIT)?;
    cluster.wait("AgentConnected", "guest", GUEST, BOOT_LIMIT)?;
    let address = machine.wait_for_guest(GUEST, BOOT_LIMIT)?;
    let ssh = machine.guest(&address);
    ssh.wait(BOOT_LIMIT, || Ok(()))?;
    Ok(pair::Guest {
        name: GUEST,
        address,
        ssh,
    })
}

/// The agent's Pod is deleted; then kubelet and API server are killed, and come back: each is heard of again.
fn pods_and_nodes_programs_die(
    context: &Context,
    cluster: &mut Cluster,
    count: &mut Count,
    pod: &Value,
) -> Result<()> {
    count.mark("pod")?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    cluster
        .plane
        .kubectl(&["delete", "pod", name, "--namespace", NAMESPACE])?;
    wait_until("another Pod of the agent", SOON, POLL, || {
        let now = cluster.agent_pod().ok();
        Ok(now.filter(|now| now["metadata"]["uid"] != pod["metadata"]["uid"]))
    })?;
    cluster.rolled_out()?;
    let heard = cluster.heartbeat()?;
    // The token of the Pod that was deleted is refused: this is the new one's.
    wait_until("the service to use the new Pod's token", SOON, POLL, || {
        Ok((cluster.heartbeat()? != heard).then_some(()))
    })?;
    context.say("another Pod took over");

    count.mark("outage")?;
    cluster.plane.kill_api_server()?;
    cluster.kubelet.kill()?;
    std::thread::sleep(QUIET);
    cluster.plane.start_api_server()?;
    cluster.kubelet.start()?;
    let heard = cluster.heartbeat()?;
    wait_until("the agent to speak to the new API server", SOON, POLL, || {
        Ok((cluster.heartbeat()? != heard).then_some(()))
    })?;
    cluster.kubelet.wait_until_ready(&cluster.plane)?;
    cluster.rolled_out()?;
    context.say("kubelet and API server are back");
    count.mark("end")
}

/// While the clone boots, `helm upgrade` brings another version of the agent.
fn the_agent_is_upgraded_under_a_reboot(context: &Context, cluster: &Cluster) -> Result<()> {
    let next = images::next_agent(&context.binaries, &cluster.dir, NEXT)?;
    cluster.kubelet.import(&next)?;
    let plane = &cluster.plane;
    let before = plane.get(&["guest", GUEST])?;
    plane.apply(&reboot("kernel", ""))?;
    let phase = || -> Result<String> {
        let reboot = plane.get(&["seamlessreboot", "kernel"])?;
        Ok(reboot["status"]["phase"].as_str().unwrap_or_default().to_owned())
    };
    wait_until("kubectl to say Rebooting", REBOOT_LIMIT, POLL, || {
        Ok((phase()? == "Rebooting").then_some(()))
    })?;
    cluster.helm("upgrade", NEXT)?;
    wait_until("the next version of the agent", SOON, POLL, || {
        let host = plane.get(&["host", NODE])?;
        Ok((host["status"]["agentVersion"] == NEXT).then_some(()))
    })?;
    let during = phase()?;
    ensure!(during != "Succeeded", "the reboot was over before the upgrade");
    context.say(&format!("another version of the agent took over during {during}"));
    cluster.wait("Complete", "seamlessreboot", "kernel", REBOOT_LIMIT)?;
    cluster.rolled_out()?;
    let guest = wait_until("the guest's new boot in its status", SOON, POLL, || {
        let guest = plane.get(&["guest", GUEST])?;
        Ok((guest["status"]["bootID"] != before["status"]["bootID"]).then_some(guest))
    })?;
    ensure!(condition_is(&guest, "Ready", "True"), "{}", guest["status"]);
    context.say(
        plane
            .kubectl(&["get", "guests,seamlessreboots,hosts"])?
            .trim_end(),
    );
    Ok(())
}
