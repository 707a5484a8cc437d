//! Seamless reboots of stock guests on real KVM, under the node agent, watched from outside.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::demo::install_kernel;
use understudy_tests::e2e::Context;
use understudy_tests::load::Load;
use understudy_tests::machine::{Machine, condition_is};

use crate::guest::{GUEST, Guest};

/// A clone boots in a minute beside its busy guest under emulation.
pub const REBOOT_LIMIT: Duration = Duration::from_secs(900);
pub const QUIET: Duration = Duration::from_secs(5);
/// The client's requests: often enough to see what happens, seldom enough that an emulated guest has time for
/// something else.
pub const OFTEN: Duration = Duration::from_millis(50);

/// Steps before the commit point: the agent dies before and after each of them. Not here: `Split`, whose
/// outcome a new agent does not trust, and what holds the guest, which is taken back each time, of which
/// there may be four.
const FORWARD: [&str; 7] = [
    "Preflight",
    "Confirm",
    "PrepareSplit",
    "PrepareClone",
    "BootClone",
    "AwaitBoot",
    "Integrate",
];
const TAKEN_BACK: [&str; 4] = [
    "FreezeUserland:after",
    "FinalIntegrate:after",
    "Pause:after",
    "Commit:before",
];
/// What is committed is finished, whoever dies.
const COMMITTED: [&str; 8] = [
    "Commit:after",
    "HandOverNetwork:before",
    "HandOverNetwork:after",
    "ActivateClone:before",
    "ActivateClone:after",
    "ActivateAgent:before",
    "Retire:before",
    "Retire:after",
];

/// A SeamlessReboot of [`GUEST`], with further YAML in its spec.
pub fn reboot(name: &str, more: &str) -> String {
    format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: SeamlessReboot\nmetadata:\n  name: {name}\nspec:\n  guestName: {GUEST}\n  reason: a test\n  \
         services:\n    hold: [ledger.service]\n  cutover:\n    maxPause: 20s\n  retainDormantFor: 10s\n{more}"
    )
}

/// Waits until the reboot has ended; its object.
pub fn ended(machine: &Machine, name: &str) -> Result<Value> {
    machine.wait_for("SeamlessReboot", name, "to end", REBOOT_LIMIT, |object| {
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        Ok(["Succeeded", "RolledBack", "Failed", "Aborted"]
            .contains(&phase)
            .then(|| object.clone()))
    })
}

fn succeeded(machine: &Machine, name: &str) -> Result<Value> {
    let object = ended(machine, name)?;
    let status = &object["status"];
    if status["phase"] != "Succeeded" {
        bail!(
            "{name} is {}: {}: {}",
            status["phase"],
            status["reason"],
            status["message"]
        );
    }
    Ok(object)
}

/// Claim 1 of the patent from the guest's own mouth to the end: the newer kernel is installed in it, it asks
/// to stay active through its reboot, and does.
pub fn a_guest_that_asks_is_rebooted_into_its_new_kernel_while_it_serves(context: &Context) -> Result<()> {
    let guest = Guest::fresh(context)?;
    let machine = &guest.machine;
    let (older, newer) = (
        machine.images().older_kernel.clone(),
        machine.images().newer_kernel.clone(),
    );
    ensure!(
        guest.status("kernelRelease")? == older,
        "the guest should run {older}"
    );
    install_kernel(machine, &guest.address)?;
    machine.wait_for("Guest", GUEST, "RebootRequired", QUIET * 24, |object| {
        Ok(condition_is(object, "RebootRequired", "True").then_some(()))
    })?;
    context.say("the newer kernel waits for a reboot");
    let mut load = Load::start(machine, &guest.address, "asked", OFTEN)?;
    load.mark("reboot")?;
    let boot_id = guest.status("bootID")?;
    let said = guest
        .ssh
        .run("understudy-guest request-reboot --reason 'a newer kernel'")?;
    context.say(said.trim());
    let name = wait_until(
        "a SeamlessReboot in the guest's name",
        QUIET * 12,
        QUIET / 10,
        || {
            let status = machine.status()?;
            let items = status["items"].as_array().cloned().unwrap_or_default();
            Ok(items
                .iter()
                .find(|o| o["kind"] == "SeamlessReboot" && o["spec"]["guestName"] == GUEST)
                .and_then(|o| o["metadata"]["name"].as_str().map(str::to_owned)))
        },
    )?;
    let object = succeeded(machine, &name)?;
    ensure!(
        object["spec"]["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("a newer kernel")),
        "its reason is {}",
        object["spec"]["reason"]
    );
    load.mark("after")?;
    std::thread::sleep(QUIET);
    let report = load.finish()?;
    let result = &object["status"]["result"];
    context.say(&format!(
        "interruption {} ms; lines {} of {}",
        result["interruptionMilliseconds"], report.found, report.acknowledged
    ));
    report.ensure_nothing_lost()?;
    let answered = report.phases.get("after").map_or(0, |seen| seen.page.answered);
    ensure!(answered > 0, "the page does not answer after the reboot");
    ensure!(
        guest.status("kernelRelease")? == newer,
        "it should run {newer} now"
    );
    ensure!(guest.status("bootID")? != boot_id, "its boot ID is the old one");
    let kernel = guest.ssh.run("uname -r")?;
    ensure!(kernel.trim() == newer, "uname says {kernel}");
    Ok(())
}

/// Promises 1, 2 and 7: `kill -9` of the agent before and after each step of one reboot. Each new agent goes
/// on, takes back, or finishes; the guest serves.
pub fn the_agent_may_die_at_every_step(context: &Context) -> Result<()> {
    let guest = Guest::running(context)?;
    let machine = &guest.machine;
    let mut load = Load::start(
        machine,
        &guest.address,
        &format!("killed-{}", std::process::id()),
        OFTEN,
    )?;

    // A split that nobody can vouch for ends the reboot, and costs the guest nothing.
    let boot_id = guest.status("bootID")?;
    machine.halt_at(&["Split:before", "Split:after"])?;
    machine.apply("split.yaml", &reboot("killed-in-split", ""))?;
    let object = ended(machine, "killed-in-split")?;
    ensure!(
        object["status"]["phase"] == "Failed",
        "it is {}",
        object["status"]["phase"]
    );
    ensure!(
        machine.halts_left()?.is_empty(),
        "the agent was not killed at {:?}",
        machine.halts_left()?
    );
    ensure!(guest.status("bootID")? == boot_id, "the guest was rebooted");
    context.say("killed around the split: failed, and the guest serves on");

    let mut points: Vec<String> = FORWARD
        .iter()
        .flat_map(|step| [format!("{step}:before"), format!("{step}:after")])
        .collect();
    points.extend(
        TAKEN_BACK
            .iter()
            .chain(&COMMITTED)
            .map(|point| (*point).to_owned()),
    );
    let points: Vec<&str> = points.iter().map(String::as_str).collect();
    machine.halt_at(&points)?;
    // After a cutover that was taken back the guest has twice this to itself, each time longer.
    let impatient = reboot("killed-everywhere", "").replace("maxPause: 20s", "maxPause: 5s");
    machine.apply("killed.yaml", &impatient)?;
    let object = succeeded(machine, "killed-everywhere")?;
    let left = machine.halts_left()?;
    ensure!(left.is_empty(), "the agent was not killed at {left:?}");
    let result = &object["status"]["result"];
    ensure!(
        result["takenBack"].as_u64() == Some(TAKEN_BACK.len() as u64),
        "taken back {} times",
        result["takenBack"]
    );
    context.say(&format!(
        "killed {} times, taken back {} times: succeeded, interruption {} ms",
        points.len(),
        result["takenBack"],
        result["interruptionMilliseconds"]
    ));
    ensure!(guest.status("bootID")? != boot_id, "the guest was not rebooted");
    load.mark("after")?;
    std::thread::sleep(QUIET);
    let report = load.finish()?;
    context.say(&format!("lines {} of {}", report.found, report.acknowledged));
    report.ensure_nothing_lost()?;
    let answered = report.phases.get("after").map_or(0, |seen| seen.page.answered);
    ensure!(answered > 0, "the page does not answer after the reboot");

    // The dormant goes at its deadline; then the disk is the file that the user named, and no layers.
    machine.wait_for("Guest", GUEST, "no dormant incarnation", REBOOT_LIMIT, |object| {
        Ok(object["status"]["dormant"].is_null().then_some(()))
    })?;
    let layers = "ls /var/lib/understudy/disks/default/web.img.understudy/ | grep -c layer || true";
    wait_until("the layers to be merged", REBOOT_LIMIT, QUIET / 5, || {
        Ok((machine.sh(layers)?.trim() == "0").then_some(()))
    })
    .with_context(|| {
        machine
            .sh("ls -l /var/lib/understudy/disks/default/web.img.understudy/")
            .unwrap_or_default()
    })?;
    context.say("the dormant is gone, its layers are merged");
    Ok(())
}

/// A clone that does not come up costs nothing (promise 1): its kernel panics; it never reports.
pub fn a_clone_that_panics_or_stays_silent_costs_nothing(context: &Context) -> Result<()> {
    let guest = Guest::running(context)?;
    let machine = &guest.machine;
    let load = Load::start(
        machine,
        &guest.address,
        &format!("panic-{}", std::process::id()),
        OFTEN,
    )?;
    let boot_id = guest.status("bootID")?;
    let initrd = "initrd=$(ls -v /boot/initrd.img-* | tail -n 1)";

    guest.ssh.run(&format!(
        "{initrd}; mv $initrd /root/initrd && echo nothing >$initrd && sync"
    ))?;
    machine.apply("panics.yaml", &reboot("panics", ""))?;
    let object = ended(machine, "panics");
    guest
        .ssh
        .run(&format!("{initrd}; mv /root/initrd $initrd && sync"))?;
    let status = &object?["status"];
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(
        status["phase"] == "Failed" && status["reason"] == "CloneDied" && message.contains("panic"),
        "it is {} because of {}: {message}",
        status["phase"],
        status["reason"]
    );
    context.say(&format!("a clone that panics: {message}"));

    guest.ssh.run("systemctl mask understudy-guest.service && sync")?;
    let more = "  timeouts:\n    rebooting: 20s\n";
    machine.apply("silent.yaml", &reboot("silent", more))?;
    let object = ended(machine, "silent");
    guest
        .ssh
        .run("systemctl unmask understudy-guest.service && sync")?;
    let status = &object?["status"];
    ensure!(
        status["phase"] == "Failed" && status["reason"] == "CloneSilent",
        "it is {} because of {}: {}",
        status["phase"],
        status["reason"],
        status["message"]
    );
    context.say(&format!(
        "a clone that never reports: {}",
        status["message"].as_str().unwrap_or_default()
    ));
    ensure!(guest.status("bootID")? == boot_id, "the guest was rebooted");
    load.finish()?.ensure_nothing_lost()
}
