//! A host that must go while its guests are in trouble, or amid reboots of their own.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use understudy_tests::demo::GUEST;
use understudy_tests::demo::host::REBOOT_LIMIT;
use understudy_tests::e2e::Context;
use understudy_tests::pair::COUNTER;
use understudy_tests::updates;

use crate::handover;
use crate::host::{Host, LIMIT, POLL, UNTIL_MEMORY_IS_WRITTEN};

/// A session is saved and resumed by its VMM, whatever becomes of the guest agent in it. With the VMM the session
/// ends: that is told, the host is not rebooted, the other guest goes on, and this one boots anew.
pub fn a_session_needs_its_vmm_and_not_its_guest_agent(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let mut clients = host.pair.watch(&host.machine, "hung")?;
    clients.mark("hung")?;
    host.pair
        .web()
        .ssh
        .run("systemctl kill -s STOP understudy-guest")?;
    host.update("hung", None)?;
    let update = updates::resumed(host.ended("hung")?)?;
    context.say(&updates::explain(&update));
    host.pair.ensure_same(&lives)?;
    host.pair
        .web()
        .ssh
        .run("systemctl kill -s CONT understudy-guest")?;
    context.say("the session of a guest whose agent hangs goes on");
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(POLL * 10);
    clients.finish()?.ensure_unbroken(&["hung", "after"])?;

    host.wait_for_clean_disk()?;
    let boot = context.node().boot_id()?;
    let killer =
        format!("{UNTIL_MEMORY_IS_WRITTEN}; systemctl kill -s KILL 'understudy-vmm-default-{COUNTER}-*'");
    let mut killer = context.ssh().spawn(&killer)?;
    host.update("killed", None)?;
    let update = host.ended("killed")?;
    ensure!(killer.wait()?.success(), "the VMM was not killed");
    let said = updates::explain(&update);
    context.say(&said);
    ensure!(
        update["status"]["phase"] == "Failed"
            && update["status"]["reason"] == "GuestDied"
            && said.contains(&format!("default/{COUNTER}")),
        "it should name the guest that died, and says {said}"
    );
    let other = updates::session(&update, GUEST)?;
    ensure!(
        other["state"] == "RunsOn",
        "the session of the other guest: {other}"
    );
    ensure!(context.node().boot_id()? == boot, "the host was rebooted");
    updates::guest_is(&host.machine, COUNTER, "Running", LIMIT)?;
    let [counter, web] = host.pair.lives()?;
    ensure!(web == lives[1], "the other guest is not who it was");
    ensure!(counter.boot_id != lives[0].boot_id, "the guest did not boot anew");
    Ok(())
}

/// A seamless reboot whose clone still boots is given up for a host that insists, and finished for a HostUpdate. In
/// both cases the guest that serves goes on after the host's reboot.
pub fn a_seamless_reboot_in_flight_is_aborted_or_waited_for_when_the_host_must_go(
    context: &Context,
) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let boot = context.node().boot_id()?;
    let mut clients = host.pair.watch(&host.machine, "insists")?;
    clients.mark("insists")?;
    clone_boots(&host, "given-up")?;
    // The connection ends with the host.
    let _ = context.ssh().output("systemctl reboot");
    context.node().wait_for_reboot(&boot, REBOOT_LIMIT)?;
    let of = |status: &Value| updates::of_host(status, &boot);
    let update = updates::resumed(updates::ended(&host.machine, LIMIT, of, |_| {})?)?;
    context.say(&updates::explain(&update));
    let reboot = handover::ended(&host.machine, "given-up")?;
    context.say(&format!("the seamless reboot: {}", updates::explain(&reboot)));
    ensure!(
        reboot["status"]["phase"] == "Aborted",
        "the seamless reboot is {}",
        reboot["status"]["phase"]
    );
    host.pair.ensure_same(&lives)?;
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(POLL * 10);
    clients.finish()?.ensure_unbroken(&["insists", "after"])?;
    host.machine.forget_reboots()?;

    clone_boots(&host, "finished")?;
    host.update("waits", None)?;
    let update = updates::resumed(host.ended("waits")?)?;
    context.say(&updates::explain(&update));
    let reboot = handover::ended(&host.machine, "finished")?;
    context.say(&format!("the seamless reboot: {}", updates::explain(&reboot)));
    ensure!(
        reboot["status"]["phase"] == "Succeeded",
        "the seamless reboot is {}",
        reboot["status"]["phase"]
    );
    let [counter, web] = host.pair.lives()?;
    ensure!(counter == lives[0], "the other guest is not who it was");
    ensure!(
        web.boot_id != lives[1].boot_id,
        "the guest runs whose clone had taken over"
    );
    Ok(())
}

/// Begins a seamless reboot of the guest with the page, and waits until its clone boots.
fn clone_boots(host: &Host, name: &str) -> Result<()> {
    host.machine.apply("reboot.yaml", &handover::reboot(name, ""))?;
    host.machine
        .wait_for("SeamlessReboot", name, "to boot its clone", LIMIT, |object| {
            Ok((object["status"]["phase"] == "Rebooting").then_some(()))
        })
        .context("before the host has to go")
}
