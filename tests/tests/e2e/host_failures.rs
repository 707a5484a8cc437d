//! What cannot be resumed after the host went down: power cuts, and damaged checkpoints.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::demo::GUEST;
use understudy_tests::e2e::Context;
use understudy_tests::machine::{condition_message, find};
use understudy_tests::pair::{COUNTER, Pair};
use understudy_tests::updates;

use crate::host::{Host, LIMIT, POLL, UNTIL_MEMORY_IS_WRITTEN};

/// Lost at the next boot, like everything beneath /run.
const NO_RESTART: &str = "mkdir -p /run/systemd/system/understudy-node.service.d && printf '[Service]\\nRestart=no\\n' >/run/systemd/system/understudy-node.service.d/e2e.conf && systemctl daemon-reload";

/// A change to the checkpoint of a guest (`$CHECKPOINT`, with that of the other beside it as `$OTHER`), the
/// reasons that may be told for it, and the file that is named.
struct Damage {
    what: &'static str,
    change: &'static str,
    reasons: &'static [&'static str],
    file: &'static str,
}

const DAMAGES: [Damage; 4] = [
    Damage {
        what: "one bit of its state is another",
        change: "printf '\\x55' | dd of=$CHECKPOINT/state bs=1 seek=4000 conv=notrunc status=none",
        reasons: &["CheckpointDamaged"],
        file: "/state",
    },
    Damage {
        what: "its index is truncated",
        change: "truncate -s -24 $CHECKPOINT/index",
        reasons: &["CheckpointDamaged"],
        file: "/index",
    },
    Damage {
        what: "its manifest is torn",
        change: "truncate -s -200 $CHECKPOINT/manifest.json",
        reasons: &["CheckpointDamaged"],
        file: "/manifest.json",
    },
    Damage {
        what: "its manifest is that of another guest",
        change: "cp $OTHER/manifest.json $CHECKPOINT/manifest.json",
        reasons: &["CheckpointForeign", "CheckpointKey"],
        file: "/manifest.json",
    },
];

impl Host {
    /// Begins an update whose agent dies at `point` and stays dead.
    fn dies_at(&self, name: &str, point: &str) -> Result<()> {
        self.machine.sh(NO_RESTART)?;
        self.machine.halt_at(&[point])?;
        self.update(name, None)?;
        wait_until(&format!("the agent to die at {point}"), LIMIT, POLL / 5, || {
            Ok(self.machine.halts_left()?.is_empty().then_some(()))
        })
    }
}

/// Before the manifest of a session is in place there is no session: the guest boots anew, as after any power cut.
/// From then on it goes on.
pub fn a_power_cut_loses_only_sessions_that_were_not_saved(context: &Context) -> Result<()> {
    let mut host = Host::running(context)?;
    let lives = host.pair.lives()?;
    host.wait_for_clean_disk()?;
    let clients = host.pair.watch(&host.machine, "cut-early")?;
    host.update("cut-early", None)?;
    context.ssh().run(UNTIL_MEMORY_IS_WRITTEN)?;
    context.node().kill()?;
    context.say("the power is cut while memory is written");
    context.stage.power_on()?;
    let update = host.ended("cut-early")?;
    let said = updates::explain(&update);
    context.say(&said);
    for name in [COUNTER, GUEST] {
        let session = updates::session(&update, name)?;
        ensure!(session["state"] == "Lost", "session of {name}: {session}");
        ensure!(
            said.contains(&format!("default/{name}")),
            "it should name {name}: {said}"
        );
    }
    host.pair = Pair::reached(&host.machine)?;
    for (before, after) in lives.iter().zip(host.pair.lives()?) {
        ensure!(
            before.boot_id != after.boot_id,
            "a guest runs that should have booted anew"
        );
    }
    let seen = clients.finish()?;
    seen.load.ensure_nothing_lost()?;
    context.say("both guests booted anew; no acknowledged line is lost");
    host.machine.forget_reboots()?;

    let lives = host.pair.lives()?;
    let mut clients = host.pair.watch(&host.machine, "cut-late")?;
    clients.mark("cut")?;
    host.dies_at("cut-late", "HostAcknowledge:before")?;
    context.node().kill()?;
    context.say("the power is cut when both are saved, before anybody asked for a reboot");
    context.stage.power_on()?;
    let update = host.ended("cut-late")?;
    context.say(&updates::explain(&update));
    for name in [COUNTER, GUEST] {
        let session = updates::session(&update, name)?;
        ensure!(session["state"] == "Resumed", "session of {name}: {session}");
    }
    host.pair.ensure_same(&lives)?;
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(POLL * 10);
    clients.finish()?.ensure_unbroken(&["cut", "after"])
}

/// Promise 6: whatever happened to a checkpoint, it is refused, the reason is told, nothing of it is changed, the
/// guest is not booted past it, and the others go on. Mended, it is resumed.
pub fn a_damaged_checkpoint_is_refused_and_kept(context: &Context) -> Result<()> {
    let host = Host::running(context)?;
    let lives = host.pair.lives()?;
    let mut clients = host.pair.watch(&host.machine, "damaged")?;
    clients.mark("damaged")?;
    host.dies_at("damaged", "HostAcknowledge:before")?;
    let checkpoint = checkpoint_of(context, &host, COUNTER)?;
    let (sound, other) = (format!("{}/sound", context.dir), format!("{}/other", context.dir));
    let small = "state index manifest.json";
    context.ssh().run(&format!(
        "set -e; mkdir -p {sound} {other}; cd {checkpoint} && cp {small} {sound}; cd {} && cp {small} {other}; sync",
        checkpoint_of(context, &host, GUEST)?
    ))?;
    let run = |change: &str| {
        context.ssh().run(&format!(
            "set -e; CHECKPOINT={checkpoint}; OTHER={other}; {change}; sync"
        ))
    };
    let sums = || run("cd $CHECKPOINT && sha256sum *");

    for (number, damage) in DAMAGES.iter().enumerate() {
        run(damage.change)?;
        let damaged = sums()?;
        if number == 0 {
            context.node().kill()?;
            context.stage.power_on()?;
        } else {
            context.ssh().run("systemctl restart understudy-node.service")?;
        }
        let mut said = String::new();
        wait_until(damage.what, LIMIT, POLL, || {
            let status = host.machine.status_if_up()?;
            let Some(guest) = status.and_then(|status| find(&status, "Guest", COUNTER)) else {
                return Ok(None);
            };
            said = condition_message(&guest, "Ready");
            let told = damage.reasons.iter().any(|reason| said.starts_with(reason))
                && said.contains(&format!("{checkpoint}{}", damage.file));
            Ok((guest["status"]["phase"] == "Saved" && told).then_some(()))
        })
        .with_context(|| format!("{}: the guest says {said:?}", damage.what))?;
        context.say(&format!("{}: {said}", damage.what));
        ensure!(sums()? == damaged, "{}: the checkpoint was changed", damage.what);
        run(&format!("cp {sound}/* $CHECKPOINT/"))?;
        if number == 0 {
            let update = host.ended("damaged")?;
            let web = updates::session(&update, GUEST)?;
            ensure!(web["state"] == "Resumed", "the session of the other guest: {web}");
            ensure!(
                host.pair.web().life()? == lives[1],
                "the other guest is not who it was"
            );
            context.say("the other guest goes on meanwhile");
        }
    }

    context.ssh().run("systemctl restart understudy-node.service")?;
    updates::guest_is(&host.machine, COUNTER, "Running", LIMIT)?;
    host.pair.ensure_same(&lives)?;
    context.say("mended, it is resumed");
    let update = updates::until(
        &host.machine,
        "the session to be told as resumed",
        LIMIT,
        |status: &Value| updates::of_host_update(status, "damaged"),
        |update| updates::session(update, COUNTER).is_ok_and(|session| session["state"] == "Resumed"),
    )?;
    host.settle(&update);
    clients.mark("after")?;
    std::thread::sleep(POLL * 10);
    clients.finish()?.ensure_unbroken(&["damaged", "after"])
}

/// Where the checkpoint of a guest is.
fn checkpoint_of(context: &Context, host: &Host, name: &str) -> Result<String> {
    let guest = host
        .machine
        .object("Guest", name)?
        .with_context(|| format!("the agent knows no guest {name}"))?;
    let uid = guest["metadata"]["uid"].as_str().unwrap_or_default();
    let found = context.ssh().run(&format!(
        "dirname /var/lib/understudy/sessions/{uid}/*/manifest.json"
    ))?;
    Ok(found.trim().to_owned())
}
