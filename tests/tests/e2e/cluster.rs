//! A cluster around the node VM: a real API server, the chart's rights, the operator's binary, and the agent as a host
//! service with the token of its Pod. What is not there is a kubelet: nobody runs that Pod.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use understudy_tests::bed::{GATEWAY, repository, wait_until};
use understudy_tests::control_plane::{ControlPlane, Options};
use understudy_tests::demo::REBOOT_PHASES;
use understudy_tests::demo::{MAC, guest_manifest, install_kernel};
use understudy_tests::e2e::Context;
use understudy_tests::load::Load;
use understudy_tests::machine::{Machine, condition_is};

use crate::guest::GUEST;
use crate::handover::{OFTEN, QUIET, REBOOT_LIMIT, reboot};

/// Where the chart is installed.
pub const NAMESPACE: &str = "understudy";
/// The Node's name.
pub const NODE: &str = "node";
pub const BOOT_LIMIT: Duration = Duration::from_secs(480);
pub const POLL: Duration = Duration::from_millis(500);
/// Until a controller or an agent has done what it does at once.
pub const SOON: Duration = Duration::from_secs(60);

/// The operator as a process; it ends with this.
pub struct Operator {
    command: Command,
    process: Child,
}

impl Operator {
    fn start(mut command: Command) -> Result<Operator> {
        let process = command.spawn().context("cannot start the operator")?;
        Ok(Operator { command, process })
    }

    /// Starts it again where it has ended, as a kubelet does: one that cannot renew its lease ends.
    pub fn restart_where_ended(&mut self) -> Result<()> {
        if self
            .process
            .try_wait()
            .context("waiting for the operator")?
            .is_some()
        {
            self.process = self.command.spawn().context("cannot start the operator")?;
        }
        Ok(())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The cluster of one test.
pub struct Cluster {
    /// The control plane.
    pub plane: ControlPlane,
    /// The operator.
    pub operator: Operator,
}

impl Cluster {
    /// API server, chart, Node and operator.
    pub fn start(context: &Context) -> Result<Cluster> {
        let dir = repository().join("target/e2e/cluster");
        if dir.exists() {
            // What a run left that was killed.
            understudy_tests::control_plane::stop(&dir)?;
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        let netns = context.node().netns().clone();
        let options = Options {
            address: GATEWAY.to_owned(),
            netns: Some(netns.clone()),
            ..Options::default()
        };
        let plane = ControlPlane::start(&dir, options)?;
        plane.helm(
            &[
                "install",
                "understudy",
                &repository().join("charts/understudy").display().to_string(),
                "--create-namespace",
                "--namespace",
                NAMESPACE,
            ],
            None,
        )?;
        plane.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "crd",
            "--selector=app.kubernetes.io/part-of=understudy",
        ])?;
        plane.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}).to_string())?;
        let token = plane.token(NAMESPACE, "understudy-operator")?;
        let kubeconfig = plane.write_token_kubeconfig("operator", &token)?;
        let log = File::create(dir.join("operator.log")).context("cannot write the operator's log")?;
        let mut operator = netns.command(context.binaries.join("understudy"));
        operator
            .args(["run", "--namespace", NAMESPACE, "--listen", "127.0.0.1:8080"])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Cluster {
            plane,
            operator: Operator::start(operator)?,
        })
    }

    /// What the agent's Pod would put on its host.
    pub fn access(&self) -> Result<Value> {
        let ca = self.plane.authority()?.certificate().certificate;
        let node = self.plane.get(&["node", NODE])?;
        Ok(json!({
            "server": self.plane.server(),
            "caData": fs::read_to_string(&ca).with_context(|| format!("cannot read {}", ca.display()))?,
            "token": self.plane.token_on_node(NAMESPACE, "understudy-agent", NODE)?,
            "nodeName": NODE,
            "nodeUID": node["metadata"]["uid"],
            "namespace": NAMESPACE,
        }))
    }
}

/// `kubectl apply` of a Guest and a SeamlessReboot, and `kubectl wait`. The API server is killed while the clone boots: the
/// reboot goes on to its end, which is told when it is back. Deleted, the guest is powered off, and leaves its disk.
pub fn a_guest_of_a_cluster_is_rebooted_while_its_api_server_is_away(context: &Context) -> Result<()> {
    let mut machine = Machine::in_node(context.stage, &context.binaries);
    machine.clear()?;
    machine.place_disk("web.img")?;
    let mut cluster = Cluster::start(context)?;
    context.say("API server, chart and operator");
    machine.start_agent_on_cluster(&cluster.access()?)?;
    let plane = &cluster.plane;
    plane.apply(&guest_manifest(GUEST, MAC, &format!("  nodeName: {NODE}\n")))?;
    let wait = |what: &str, kind: &str, name: &str, limit: Duration| {
        plane.kubectl(&[
            "wait",
            &format!("--for=condition={what}"),
            &format!("--timeout={}s", limit.as_secs()),
            kind,
            name,
        ])
    };
    wait("Accepted", "guest", GUEST, SOON)?;
    wait("Ready", "guest", GUEST, BOOT_LIMIT)?;
    wait("AgentConnected", "guest", GUEST, BOOT_LIMIT)?;
    let address = machine.wait_for_guest(GUEST, BOOT_LIMIT)?;
    let before = plane.get(&["guest", GUEST])?;
    context.say("the guest serves; kubectl says so");

    install_kernel(&machine, &address)?;
    wait("RebootRequired", "guest", GUEST, QUIET * 24)?;
    let mut load = Load::start(&machine, &address, "cluster", OFTEN)?;
    load.mark("reboot")?;
    plane.apply(&reboot("kernel", ""))?;
    let phase_is = |object: &Value, phases: &[&str]| {
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        phases.contains(&phase).then_some(())
    };
    wait_until("kubectl to say Rebooting", REBOOT_LIMIT, POLL, || {
        Ok(phase_is(
            &plane.get(&["seamlessreboot", "kernel"])?,
            &["Rebooting"],
        ))
    })?;
    cluster.plane.kill_api_server()?;
    machine.wait_for(
        "SeamlessReboot",
        "kernel",
        "to end without its API server",
        REBOOT_LIMIT,
        |object| Ok(phase_is(object, &["Succeeded", "Failed", "Aborted"])),
    )?;
    context.say("the reboot has ended while the API server was away");
    cluster.plane.start_api_server()?;
    cluster.operator.restart_where_ended()?;
    let plane = &cluster.plane;
    plane.kubectl(&[
        "wait",
        "--for=condition=Complete",
        "--timeout=120s",
        "seamlessreboot",
        "kernel",
    ])?;
    load.mark("after")?;
    std::thread::sleep(QUIET);
    let report = load.finish()?;
    report.ensure_nothing_lost()?;

    let reboot = plane.get(&["seamlessreboot", "kernel"])?;
    let transitions = reboot["status"]["phaseTransitions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let mut phases: Vec<&str> = transitions.iter().filter_map(|t| t["phase"].as_str()).collect();
    // A cutover that was taken back is integrated once more.
    phases.dedup();
    ensure!(
        phases.starts_with(&REBOOT_PHASES[..5]) && phases.ends_with(&REBOOT_PHASES[5..]),
        "its phases were {phases:?}"
    );
    let guest = wait_until("the guest's new boot in its status", SOON, POLL, || {
        let guest = plane.get(&["guest", GUEST])?;
        Ok((guest["status"]["bootID"] != before["status"]["bootID"]).then_some(guest))
    })?;
    let newer = machine.images().newer_kernel.clone();
    ensure!(
        guest["status"]["kernelRelease"] == newer.as_str(),
        "it runs {}",
        guest["status"]["kernelRelease"]
    );
    ensure!(
        condition_is(&guest, "AgentAvailable", "True"),
        "{}",
        guest["status"]
    );
    context.say(
        plane
            .kubectl(&["get", "guests,seamlessreboots,hosts"])?
            .trim_end(),
    );
    context.say(&format!(
        "interruption {} ms; lines {} of {}",
        reboot["status"]["result"]["interruptionMilliseconds"], report.found, report.acknowledged
    ));
    let events = plane.get(&["events.events.k8s.io"])?;
    let told = events["items"].as_array().into_iter().flatten();
    ensure!(
        told.clone()
            .any(|event| event["regarding"]["kind"] == "SeamlessReboot" && event["reason"] == "Succeeded"),
        "no event tells of the end: {:?}",
        told.map(|event| &event["reason"]).collect::<Vec<_>>()
    );

    // By default it waits until the object is gone, which is when nothing runs any more.
    plane.kubectl(&["delete", "guest", GUEST, "--timeout=120s"])?;
    let left =
        machine.sh("ls /var/lib/understudy/disks/default/web.img; pgrep -xc understudy-vmm || true")?;
    ensure!(
        left.trim_end().ends_with("\n0"),
        "after its deletion there is {left}"
    );
    context.say("deleted: powered off, its disk is there");
    machine.stop_agent()
}
