//! Reboots of the host under two running guests whose sessions go on, watched from outside.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::demo::GUEST;
use understudy_tests::demo::host::REBOOT_LIMIT;
use understudy_tests::e2e::Context;
use understudy_tests::machine::{Machine, condition_is, find};
use understudy_tests::pair::{COUNTER, Pair};
use understudy_tests::updates;

/// An emulated host goes down and comes up within two minutes; saving beside a busy machine takes as long again.
pub const LIMIT: Duration = Duration::from_secs(1200);
pub const POLL: Duration = Duration::from_millis(500);
const QUIET: Duration = Duration::from_secs(5);
/// How long a client's kernel may wait before it tries its connection again, where it is one before 6.15.
const BACKOFF: Duration = Duration::from_secs(120);
/// How far a guest's clock may be off after it was stepped.
const CLOCK: u64 = 10;

/// Phases of an update that goes well.
const PHASES: [&str; 8] = [
    "Pending",
    "Notified",
    "Saving",
    "Acknowledged",
    "Rebooting",
    "LoggingOn",
    "Resuming",
    "Resumed",
];

/// Steps at which the agent dies, before and after; the host is asked for its reboot in the midst of them.
const STEPS: [&str; 12] = [
    "Inspect",
    "RunCommand",
    "Quiesce",
    "Preflight",
    "RegisterKeys",
    "Save",
    "Verify",
    "Acknowledge",
    "Reboot",
    "LogOn",
    "Resume",
    "Release",
];

/// Waits, on the host, until the memory of a session begins to be written.
pub const UNTIL_MEMORY_IS_WRITTEN: &str = "until [ \"$(du -ck /var/lib/understudy/sessions/*/*/memory 2>/dev/null | tail -n 1 | cut -f 1)\" -gt 1024 ]; do sleep 0.05; done";

/// What a kernel says that has lost an interrupt, a request, or time. That it does not trust the TSC is no complaint: its
/// watchdog measures that against kvm-clock, which it uses, and a vCPU that waits for a processor of the host between the
/// two readings is enough for it.
pub const UNHEALTHY: &str = "dmesg | grep -E 'self-detected stall|soft lockup|blocked for more than|EXT4-fs (error|warning)|I/O error|rcu.*stall|kvm-clock.*as unstable|BUG:|WARNING:' || true";
/// The clock that a guest goes by.
const CLOCKSOURCE: &str = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";

/// A host with its two guests.
pub struct Host {
    /// The host.
    pub machine: Machine,
    /// The guests.
    pub pair: Pair,
}

impl Host {
    /// Those that an earlier test left running, else fresh ones.
    pub fn running(context: &Context) -> Result<Host> {
        let mut machine = Machine::in_node(context.stage, &context.binaries);
        let serve = machine.status().is_ok_and(|status| {
            [COUNTER, GUEST].iter().all(|name| {
                find(&status, "Guest", name).is_some_and(|guest| condition_is(&guest, "Ready", "True"))
            })
        });
        if serve {
            machine.halt_at(&[])?;
            machine.forget_reboots()?;
            machine.start_agent()?;
        } else {
            machine.clear()?;
            Pair::place_disks(&machine)?;
            machine.start_agent()?;
            Pair::declare(&machine, "")?;
        }
        let pair = Pair::reached(&machine)?;
        context.say(if serve {
            "the guests of an earlier test serve on"
        } else {
            "both guests serve"
        });
        Ok(Host { machine, pair })
    }

    /// Applies a HostUpdate of this name, for which the host has to be rebooted in any case.
    pub fn update(&self, name: &str, command: Option<&[&str]>) -> Result<()> {
        self.machine
            .apply("hostupdate.yaml", &updates::manifest(name, command, None))
    }

    /// The end of its NodeUpdate, over the reboot.
    pub fn ended(&self, name: &str) -> Result<Value> {
        let of = |status: &Value| updates::of_host_update(status, name);
        updates::ended(&self.machine, LIMIT, of, |_| {})
    }

    /// Waits until clients may be expected to have found their guests again after an update.
    pub fn settle(&self, update: &Value) {
        let silent = update["status"]["result"]["guests"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|guest| guest["interruption"]["totalMilliseconds"].as_u64())
            .max()
            .unwrap_or_default();
        std::thread::sleep(QUIET.max(Duration::from_millis(silent).min(BACKOFF)));
    }

    /// What the guests' kernels have complained of since they booted.
    fn complaints(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for guest in &self.pair.guests {
            let lines = guest.ssh.run(UNHEALTHY)?;
            all.extend(lines.lines().map(|line| format!("{}: {line}", guest.name)));
        }
        Ok(all)
    }

    /// Waits until nothing of used sessions is left on the disk, so that what is found there next is of the next save.
    pub fn wait_for_clean_disk(&self) -> Result<()> {
        let what = "find /var/lib/understudy/sessions /var/lib/understudy/credentials /run/understudy/keys -type f ! -name bytes-per-second.json 2>/dev/null || true";
        let mut left = String::new();
        wait_until("used sessions and keys to be destroyed", LIMIT, POLL, || {
            left = self.machine.sh(what)?;
            Ok(left.trim().is_empty().then_some(()))
        })
        .with_context(|| format!("left are:\n{left}"))
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Promise 5 from the manifest to the end, in the order that the patent has: the command, the saves, the
/// acknowledgement, the reboot because of it, the logon, the sessions.
pub fn a_host_update_resumes_every_session(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let complaints = host.complaints()?;
    let boot = context.node().boot_id()?;
    let mut clients = host.pair.watch(&host.machine, "update")?;
    clients.mark("update")?;
    let ran = format!("{}/ran", context.dir);
    host.update(
        "every",
        Some(&["/bin/sh", "-c", &format!("echo once >>{ran} && sync")]),
    )?;
    let update = updates::resumed(host.ended("every")?)?;
    context.say(&updates::explain(&update));

    let result = &update["status"]["result"];
    ensure!(
        result["sessions"] == 2,
        "there were {} sessions",
        result["sessions"]
    );
    ensure!(
        result["before"]["bootID"] == boot.as_str() && context.node().boot_id()? != boot,
        "the host has not rebooted: {result}"
    );
    ensure!(
        update["spec"]["origin"] == "HostUpdate",
        "{}",
        update["spec"]["origin"]
    );
    let transitions = update["status"]["phaseTransitions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let phases: Vec<&str> = transitions.iter().filter_map(|t| t["phase"].as_str()).collect();
    ensure!(phases == PHASES, "its phases were {phases:?}");
    let times: Vec<&str> = transitions
        .iter()
        .filter_map(|t| t["transitionTime"].as_str())
        .collect();
    ensure!(times.is_sorted(), "its phases went back in time: {times:?}");
    ensure!(
        context.ssh().run(&format!("cat {ran}"))? == "once\n",
        "the command did not run once"
    );

    host.pair.ensure_same(&lives)?;
    for guest in &host.pair.guests {
        let source = guest.ssh.run(CLOCKSOURCE)?;
        ensure!(
            source.trim() == "kvm-clock",
            "guest {} goes by {source}",
            guest.name
        );
        let clock: u64 = guest.ssh.run("date +%s")?.trim().parse()?;
        ensure!(
            clock.abs_diff(now()) <= CLOCK,
            "the clock of guest {} is {} s off",
            guest.name,
            clock.abs_diff(now())
        );
    }
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(QUIET);
    let seen = clients.finish()?;
    seen.ensure_unbroken(&["update", "after"])?;
    let after = host.complaints()?;
    let new: Vec<&String> = after.difference(&complaints).collect();
    ensure!(
        new.is_empty(),
        "kernels of guests complain: {new:#?}\nbefore they had: {complaints:#?}"
    );
    context.say("same kernels, same processes, same connections; every line is there");
    host.wait_for_clean_disk()?;
    context.say("sessions and keys are destroyed");
    Ok(())
}

/// An administrator types `reboot`: the same happens, and it is told who began it.
pub fn a_plain_reboot_typed_on_the_host_loses_no_session(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let boot = context.node().boot_id()?;
    let mut clients = host.pair.watch(&host.machine, "typed")?;
    clients.mark("typed")?;
    // The connection ends with the host.
    let _ = context.ssh().output("systemctl reboot");
    context.node().wait_for_reboot(&boot, REBOOT_LIMIT)?;
    let of = |status: &Value| updates::of_host(status, &boot);
    let update = updates::resumed(updates::ended(&host.machine, LIMIT, of, |_| {})?)?;
    context.say(&updates::explain(&update));
    ensure!(
        update["spec"]["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("reboot")),
        "its reason is {}",
        update["spec"]["reason"]
    );
    let name = update["metadata"]["name"].as_str().unwrap_or_default();
    let table = host.machine.sh(&host.machine.agent_command("status"))?;
    let line = table
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_default();
    context.say(line);
    ensure!(
        line.contains("host (reboot"),
        "status does not say who began it:\n{table}"
    );
    host.pair.ensure_same(&lives)?;
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(QUIET);
    clients.finish()?.ensure_unbroken(&["typed", "after"])
}

/// Not enough space, and space that runs out while it is saved: it is told which guest and why, the host stays up,
/// and nobody notices.
pub fn a_failed_save_says_why_and_every_guest_goes_on(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let boot = context.node().boot_id()?;
    let mut clients = host.pair.watch(&host.machine, "full")?;
    clients.mark("full")?;

    // A file system of its own, so that guests' disks have room whatever happens to sessions.
    let sessions = "/var/lib/understudy/sessions";
    let disk = format!("{}/sessions.ext4", context.dir);
    host.machine.sh(&format!(
        "set -e; mkdir -p {sessions}; truncate -s 4G {disk}; mke2fs -q -t ext4 -m 0 {disk}; mount -o loop {disk} {sessions}"
    ))?;
    let result = without_room(context, &host);
    host.machine.sh(&format!("umount -l {sessions}; rm {disk}"))?;
    result?;

    ensure!(context.node().boot_id()? == boot, "the host was rebooted");
    host.pair.ensure_same(&lives)?;
    clients.mark("after")?;
    std::thread::sleep(QUIET);
    clients.finish()?.ensure_unbroken(&["full", "after"])
}

fn without_room(context: &Context, host: &Host) -> Result<()> {
    let fill = "/var/lib/understudy/sessions/fill";
    let free = "$(($(stat -f -c '%f * %S' /var/lib/understudy/sessions) - LEFT))";
    let take = |left: &str| format!("fallocate -l {} {fill}", free.replace("LEFT", left));
    host.machine.sh(&take("67108864"))?;
    host.update("no-room", None)?;
    let update = host.ended("no-room")?;
    let said = updates::explain(&update);
    context.say(&said);
    ensure!(
        update["status"]["phase"] == "Failed" && said.contains("MiB are missing"),
        "it should say how much room is missing, and says {said}"
    );

    host.machine.sh(&format!("rm {fill}"))?;
    // The room goes as soon as the first memory is written.
    let filler = format!("{UNTIL_MEMORY_IS_WRITTEN}; until {}; do :; done", take("1048576"));
    let mut filler = context.ssh().spawn(&filler)?;
    host.update("runs-out", None)?;
    let update = host.ended("runs-out")?;
    ensure!(filler.wait()?.success(), "the disk was not filled");
    host.machine.sh(&format!("rm {fill}"))?;
    let said = updates::explain(&update);
    context.say(&said);
    let named = [COUNTER, GUEST]
        .iter()
        .any(|name| said.contains(&format!("default/{name}")));
    ensure!(
        update["status"]["phase"] == "Failed" && update["status"]["reason"] == "SaveFailed" && named,
        "it should name the guest that could not be saved, and says {said}"
    );
    for name in [COUNTER, GUEST] {
        let state = &updates::session(&update, name)?["state"];
        ensure!(state == "RunsOn", "the session of {name} is {state}");
    }
    Ok(())
}

/// Promise 7: `kill -9` of the agent before and after each step of one host update. Each new agent, in this boot and
/// the next, goes on where the record says.
pub fn the_agent_may_die_at_every_phase_of_a_host_update(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let mut clients = host.pair.watch(&host.machine, "killed")?;
    clients.mark("killed")?;
    let points: Vec<String> = STEPS
        .iter()
        .flat_map(|step| [format!("Host{step}:before"), format!("Host{step}:after")])
        .collect();
    let points: Vec<&str> = points.iter().map(String::as_str).collect();
    host.machine.halt_at(&points)?;
    host.update("killed", Some(&["/bin/true"]))?;
    let update = updates::resumed(host.ended("killed")?)?;
    context.say(&updates::explain(&update));
    wait_until("the agent to die at every point", LIMIT, POLL, || {
        Ok(host.machine.halts_left()?.is_empty().then_some(()))
    })
    .with_context(|| format!("it was not killed at {:?}", host.machine.halts_left()))?;
    context.say(&format!("killed {} times: every session goes on", points.len()));
    host.pair.ensure_same(&lives)?;
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(QUIET);
    clients.finish()?.ensure_unbroken(&["killed", "after"])
}
