//! Cutovers that are rehearsed, approved and rolled back, under a client's eyes.

use anyhow::{Result, ensure};
use serde_json::Value;
use understudy_tests::e2e::Context;
use understudy_tests::load::Load;
use understudy_tests::machine::Machine;

use crate::guest::{GUEST, Guest};
use crate::handover::{OFTEN, QUIET, REBOOT_LIMIT, ended, reboot};

/// A SeamlessReboot of the guest in another mode than `Automatic`.
fn in_mode(name: &str, mode: &str) -> String {
    reboot(name, "")
        .replace("  cutover:\n", &format!("  cutover:\n    mode: {mode}\n"))
        .replace("retainDormantFor: 10s", "retainDormantFor: 1h")
}

/// A rehearsal whose clone is asked whether its page answers, and something else.
fn rehearsal(name: &str, other: &str) -> String {
    in_mode(name, "Rehearse").replace(
        "    mode:",
        &format!(
            "    readiness:\n    - name: page\n      httpGet:\n        port: 80\n      periodSeconds: 2\n      timeoutSeconds: 20\n      \
             failureThreshold: 10\n    - name: other\n      {other}\n      periodSeconds: 1\n      timeoutSeconds: 20\n    mode:"
        ),
    )
}

/// How the probes of a rehearsal ended.
fn readiness(object: &Value) -> Vec<Option<bool>> {
    let probes = object["status"]["result"]["readiness"].as_array();
    let probes = probes.into_iter().flatten();
    probes.map(|probe| probe["ready"].as_bool()).collect()
}

fn ensure_ended(object: &Value, phase: &str, reason: &str) -> Result<()> {
    let status = &object["status"];
    ensure!(
        status["phase"] == phase && status["reason"] == reason,
        "it is {} because of {}: {}",
        status["phase"],
        status["reason"],
        status["message"]
    );
    Ok(())
}

/// Waits until the reboot is in this phase.
fn reaches(machine: &Machine, name: &str, phase: &str) -> Result<Value> {
    machine.wait_for("SeamlessReboot", name, phase, REBOOT_LIMIT, |object| {
        Ok((object["status"]["phase"] == phase).then(|| object.clone()))
    })
}

/// A rehearsal moves nothing. A manual cutover waits, is approved by an edit of its manifest that is taken out again,
/// and is rolled back: the guest goes on where it was, and what its clone had changed is gone.
pub fn a_rehearsal_leaves_the_guest_alone_and_an_approved_cutover_is_rolled_back_while_it_serves(
    context: &Context,
) -> Result<()> {
    // Not that of an earlier run, whose guest agent may know no probes.
    let guest = Guest::fresh(context)?;
    let machine = &guest.machine;
    let run = |name: &str| format!("{name}-{}", std::process::id());
    let boot_id = guest.status("bootID")?;
    let life = "cat /proc/sys/kernel/random/boot_id; systemctl show --property MainPID ledger.service";
    let before = guest.ssh.run(life)?;
    let load = Load::start(machine, &guest.address, &run("rehearsed"), OFTEN)?;
    let fine =
        "exec:\n        command: [/bin/sh, -c, 'test -e /proc/self && ! systemctl is-active ledger.service']";
    machine.apply("rehearsal.yaml", &rehearsal("rehearsal", fine))?;
    let object = ended(machine, "rehearsal")?;
    ensure_ended(&object, "Succeeded", "Rehearsed")?;
    let result = &object["status"]["result"];
    ensure!(
        result["after"]["kernelRelease"].is_string() && result["rounds"].as_i64() > Some(0),
        "its result is {result}"
    );
    ensure!(
        readiness(&object) == [Some(true), Some(true)],
        "its probes: {}",
        result["readiness"]
    );
    // The ledger is held on a clone.
    machine.apply(
        "unready.yaml",
        &rehearsal("unready", "tcpSocket:\n        port: 7000"),
    )?;
    let object_of_unready = ended(machine, "unready")?;
    ensure_ended(&object_of_unready, "Failed", "NotReady")?;
    ensure!(
        readiness(&object_of_unready) == [Some(true), Some(false)],
        "its probes: {}",
        object_of_unready["status"]["result"]["readiness"]
    );
    context.say(&format!(
        "not ready: {}",
        object_of_unready["status"]["message"]
            .as_str()
            .unwrap_or_default()
    ));
    load.finish()?.ensure_nothing_lost()?;
    ensure!(guest.ssh.run(life)? == before, "a rehearsal has moved the guest");
    context.say(&format!(
        "rehearsed: {}",
        object["status"]["message"].as_str().unwrap_or_default()
    ));

    let load = Load::start(machine, &guest.address, &run("approved"), OFTEN)?;
    let manifest = in_mode("manual", "Manual");
    machine.apply("manual.yaml", &manifest)?;
    let object = reaches(machine, "manual", "AwaitingCutover")?;
    ensure!(
        object["status"]["reason"] == "ApprovalRequired",
        "it waits because of {}",
        object["status"]["reason"]
    );
    ensure!(
        guest.status("bootID")? == boot_id,
        "it was cut over without approval"
    );
    machine.apply(
        "manual.yaml",
        &format!("{manifest}  action:\n    type: Proceed\n"),
    )?;
    machine.wait_for("SeamlessReboot", "manual", "approved", REBOOT_LIMIT, |object| {
        Ok((object["status"]["action"]["type"] == "Proceed").then_some(()))
    })?;
    machine.apply("manual.yaml", &manifest)?;
    let object = ended(machine, "manual")?;
    ensure_ended(&object, "Succeeded", "Rebooted")?;
    load.finish()?.ensure_nothing_lost()?;
    let clone_boot_id = guest.status("bootID")?;
    ensure!(clone_boot_id != boot_id, "its boot ID is the old one");
    context.say(&format!(
        "approved: interruption {} ms",
        object["status"]["result"]["interruptionMilliseconds"]
    ));

    guest.ssh.run("echo changed >/root/on-the-clone && sync")?;
    let mut load = Load::start(machine, &guest.address, &run("rolled-back"), OFTEN)?;
    load.mark("rollback")?;
    let said = machine.sh(&machine.agent_command("rollback manual --discard-changes"))?;
    context.say(said.trim());
    load.mark("after")?;
    std::thread::sleep(QUIET);
    // What was acknowledged between the cutover and its rollback is lost, as was asked for.
    let report = load.finish()?;
    let after = report.phases.get("after").map_or(0, |seen| seen.page.answered);
    ensure!(after > 0, "the page does not answer after the rollback");
    let object = ended(machine, "manual")?;
    ensure_ended(&object, "RolledBack", "RolledBack")?;
    let interruption = &object["status"]["result"]["rollbackInterruptionMilliseconds"];
    ensure!(
        interruption.is_i64(),
        "its result is {}",
        object["status"]["result"]
    );
    context.say(&format!("rolled back: interruption {interruption} ms"));
    machine.wait_for("Guest", GUEST, "the boot ID of before", QUIET * 12, |object| {
        let status = &object["status"];
        Ok((status["bootID"] == boot_id.as_str() && status["dormant"].is_null()).then_some(()))
    })?;
    // The same kernel and the same process: it went on, and did not boot.
    let now = guest.ssh.run(life)?;
    ensure!(now == before, "it was {before:?}, and is {now:?}");
    let left = guest
        .ssh
        .run("ls /root/on-the-clone 2>/dev/null || echo it is gone")?;
    ensure!(left.trim() == "it is gone", "{left}");

    let load = Load::start(machine, &guest.address, &run("goes-on"), OFTEN)?;
    std::thread::sleep(QUIET);
    load.finish()?.ensure_nothing_lost()?;
    let said = machine.sh(&format!(
        "{} 2>&1 || true",
        machine.agent_command("rollback rehearsal --discard-changes")
    ))?;
    ensure!(said.contains("no dormant incarnation"), "it says {said}");
    Ok(())
}
