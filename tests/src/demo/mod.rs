//! The main job on real input: a stock Debian guest is rebooted into its new kernel while it serves, and
//! then, for comparison, rebooted the ordinary way.

pub mod host;
mod outcome;
mod place;
mod show;
mod table;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

pub use outcome::Outcome;
pub use place::Chosen;
pub use show::REBOOT_PHASES;
use show::Show;
pub use table::publish;

use crate::bed::{Stage, wait_until};
use crate::client::TICK;
use crate::load::Load;
use crate::machine::{LEDGER_PORT, Machine, condition_is};

/// Name of the guest.
pub const GUEST: &str = "web";
const REBOOT: &str = "web-new-kernel";
/// A guest boots in 30 s under emulation; twice that beside a busy machine; the rest is patience.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const REBOOT_LIMIT: Duration = Duration::from_secs(900);
const INSTALL_LIMIT: Duration = Duration::from_secs(600);
/// How long the client runs before and after, to see what is usual.
const QUIET: Duration = Duration::from_secs(10);

/// The MAC address of [`GUEST`].
pub const MAC: &str = "52:54:00:77:01:01";

/// A guest as its owner declares it; its disk is `NAME.img`. `more` is YAML of further fields.
pub fn guest_manifest(name: &str, mac: &str, more: &str) -> String {
    format!(
        r#"apiVersion: understudy.dev/v1alpha1
kind: Guest
metadata:
  name: {name}
spec:
  cpus: 1
  memory: 512Mi
  boot:
    fromDisk: {{}}
  disks:
    - name: root
      role: Root
      source: {name}.img
  networks:
    - bridge: br0
      mac: {mac}
{more}"#
    )
}

/// The reboot, with the kernel that is expected afterwards.
fn reboot_manifest(kernel: &str) -> String {
    format!(
        r#"apiVersion: understudy.dev/v1alpha1
kind: SeamlessReboot
metadata:
  name: {REBOOT}
spec:
  guestName: {GUEST}
  reason: a newer kernel is installed
  expect:
    kernelRelease: {kernel}
  services:
    hold:
      - ledger.service
  cutover:
    maxPause: 20s
  retainDormantFor: 1m
"#
    )
}

/// When a bench may look at the guest of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The guest serves the client, and nothing else goes on yet.
    Serving,
    /// The seamless reboot has succeeded; the dormant incarnation is still there.
    Rebooted,
}

/// What a bench does at these moments, with the machine and the guest's address.
pub type Watch<'a> = &'a mut dyn FnMut(Moment, &Machine, &str) -> Result<()>;

/// Runs the demo on a machine. Whatever fails is an error; the caller keeps the logs.
pub fn run(machine: &mut Machine, watch: Watch) -> Result<Outcome> {
    let started = Instant::now();
    let show = Show::new();
    let older = machine.images().older_kernel.clone();
    let newer = machine.images().newer_kernel.clone();

    let step = show.step("Clearing the stage");
    machine.clear()?;
    step.done(&machine.describe());

    let step = show.step("Bringing the guest's disk");
    machine.place_disk("web.img")?;
    step.done("stock Debian 12 with nginx and a ledger");

    let step = show.step("Starting the node agent");
    machine.start_agent()?;
    step.done("stand-alone, on a directory of manifests");

    let step = show.step("Booting the guest");
    machine.apply("guest.yaml", &guest_manifest(GUEST, MAC, ""))?;
    let address = machine.wait_for_guest(GUEST, BOOT_LIMIT)?;
    let before = guest_life(machine)?;
    ensure!(
        before.kernel == older,
        "the guest should run {older} and runs {}",
        before.kernel
    );
    step.done(&format!("kernel {older}, address {address}"));

    let step = show.step("Installing the newer kernel's package in it");
    let guest = machine.guest(&address);
    wait_until("ssh into the guest", BOOT_LIMIT, Duration::from_secs(1), || {
        Ok(guest.answers()?.then_some(()))
    })?;
    install_kernel(machine, &address)?;
    machine.wait_for(
        "Guest",
        GUEST,
        "to say that it waits for a reboot",
        Duration::from_secs(120),
        |guest| Ok(condition_is(guest, "RebootRequired", "True").then_some(())),
    )?;
    step.done(&format!("{newer} waits for a reboot"));

    let step = show.step("The client outside begins: page and ledger, every 10 ms");
    let run = format!("demo-{}", std::process::id());
    let mut client = Load::start(machine, &address, &run, TICK)?;
    client.mark("watch")?;
    watch(Moment::Serving, machine, &address)?;
    client.mark("quiet")?;
    std::thread::sleep(QUIET);
    step.done("");

    show.headline(&format!("Seamless reboot {older} → {newer}"));
    client.mark("seamless")?;
    let seamless = Instant::now();
    machine.apply("seamlessreboot.yaml", &reboot_manifest(&newer))?;
    let object = follow(machine, &show)?;
    let seamless = seamless.elapsed();
    client.mark("after")?;
    watch(Moment::Rebooted, machine, &address)?;
    std::thread::sleep(QUIET);
    let after = guest_life(machine)?;
    ensure!(
        after.kernel == newer,
        "after the seamless reboot the guest runs {} instead of {newer}",
        after.kernel
    );
    ensure!(
        after.boot_id != before.boot_id,
        "the guest's boot ID did not change"
    );

    show.headline(&format!(
        "Ordinary reboot of the same guest, into the same kernel {newer}"
    ));
    let step = show.step("`reboot` in the guest");
    client.mark("ordinary")?;
    let ordinary = Instant::now();
    guest.forget();
    let _ = guest.output("systemctl reboot");
    machine.wait_for("Guest", GUEST, "to have rebooted", BOOT_LIMIT, |guest| {
        let boot = guest["status"]["bootID"].as_str().unwrap_or_default();
        let fresh = !boot.is_empty() && boot != after.boot_id && condition_is(guest, "Ready", "True");
        Ok(fresh.then_some(()))
    })?;
    wait_for_services(machine, &address, &[80, LEDGER_PORT])?;
    let ordinary = ordinary.elapsed();
    client.mark("last")?;
    std::thread::sleep(QUIET / 2);
    step.done("");

    let step = show.step("Reading the ledger back");
    let report = client.finish()?;
    step.done(&format!(
        "{} lines acknowledged, {} found",
        report.acknowledged, report.found
    ));
    let again = guest_life(machine)?;
    ensure!(
        again.kernel == newer,
        "after the ordinary reboot the guest runs {} instead of {newer}",
        again.kernel
    );

    let outcome = Outcome::new(
        machine,
        &older,
        &newer,
        &object,
        report,
        seamless,
        ordinary,
        started.elapsed(),
    )?;
    outcome.check()?;
    Ok(outcome)
}

/// Kernel and boot of the guest, as its status tells.
struct Life {
    kernel: String,
    boot_id: String,
}

fn guest_life(machine: &Machine) -> Result<Life> {
    let guest = machine
        .object("Guest", GUEST)?
        .context("the agent knows no guest")?;
    let text = |field: &str| guest["status"][field].as_str().unwrap_or_default().to_owned();
    Ok(Life {
        kernel: text("kernelRelease"),
        boot_id: text("bootID"),
    })
}

/// Installs the package that waits in the guest's own cache, as its administrator would.
pub fn install_kernel(machine: &Machine, address: &str) -> Result<()> {
    let guest = machine.guest(address);
    let line = format!(
        "DEBIAN_FRONTEND=noninteractive timeout {} dpkg -i {} 2>&1",
        INSTALL_LIMIT.as_secs(),
        machine.images().newer_package
    );
    guest
        .run(&line)
        .context("installing the newer kernel in the guest")?;
    Ok(())
}

/// Waits until these ports take connections from outside.
fn wait_for_services(machine: &Machine, address: &str, ports: &[u16]) -> Result<()> {
    for port in ports {
        wait_until(
            &format!("port {port} of the guest"),
            BOOT_LIMIT,
            Duration::from_millis(500),
            || {
                let probe = machine
                    .netns()
                    .command("timeout")
                    .args(["2", "bash", "-c", &format!("exec 3<>/dev/tcp/{address}/{port}")])
                    .stderr(std::process::Stdio::null())
                    .status()
                    .context("cannot run bash")?;
                Ok(probe.success().then_some(()))
            },
        )?;
    }
    Ok(())
}

/// Shows the reboot's phases until it has ended; an error unless it succeeded.
fn follow(machine: &Machine, show: &Show) -> Result<Value> {
    let mut bar = show.phases(REBOOT_PHASES);
    let object = machine.wait_for("SeamlessReboot", REBOOT, "to end", REBOOT_LIMIT, |object| {
        bar.show(&object["status"]);
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        Ok(["Succeeded", "Failed", "Aborted"]
            .contains(&phase)
            .then(|| object.clone()))
    })?;
    bar.end();
    if object["status"]["phase"] != "Succeeded" {
        bail!(
            "the seamless reboot is {}: {}: {}",
            object["status"]["phase"].as_str().unwrap_or("?"),
            object["status"]["reason"].as_str().unwrap_or("?"),
            object["status"]["message"].as_str().unwrap_or("?")
        );
    }
    Ok(object)
}

/// Runs the demo and keeps every log in `logs` where it fails.
pub fn run_with_logs(chosen: &mut Chosen, logs: &Path, watch: Watch) -> Result<Outcome> {
    run(&mut chosen.machine, watch).inspect_err(|_| keep_logs(&chosen.machine, chosen.stage.as_ref(), logs))
}

/// Keeps the logs of all parts, and says where.
fn keep_logs(machine: &Machine, stage: Option<&Stage>, logs: &Path) {
    // Logs are on the node's disk, and it may be down.
    let powered = stage.map_or(Ok(()), Stage::power_on);
    match powered.and_then(|()| machine.collect_logs(logs)) {
        Ok(()) => eprintln!("The logs of all parts are in {}", logs.display()),
        Err(error) => eprintln!("The logs could not be collected: {error:#}"),
    }
}
