//! Sessions of a stock guest under load, saved and resumed again and again by the VMM alone.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use understudy_tests::bed::{Ssh, wait_until};
use understudy_tests::e2e::Context;
use understudy_vmm_control::session::{Resume, SaveRequest};
use uuid::Uuid;

use crate::host::UNHEALTHY;
use crate::vmm::{self, POLL, Vmm};

/// Saves and resumes.
const CYCLES: u32 = 50;
/// A busy guest, emulated, on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Lines of the guest, files it has written: so many more are waited for in each life.
const MORE: usize = 10;

/// Writes files and their sums, durably, and reads back from the disk what it wrote some files ago.
const WRITER: &str = r#"#!/bin/bash
mkdir -p /var/tmp/load && cd /var/tmp/load || exit 1
for ((n = 0; ; n++)); do
    f=$((n % 16)); g=$(((n + 5) % 16))
    head -c 131072 /dev/urandom >new && sha256sum <new >new.sum && sync -d new new.sum && mv new $f && mv new.sum $f.sum
    if [ -f $g ] && ! dd if=$g iflag=direct bs=128k status=none | sha256sum | cmp -s - $g.sum; then echo "file $g, at $n" >>wrong; fi
    echo $n >count.new && mv count.new count
    sleep 0.1
done
"#;

/// Counts on one connection: number, seconds of monotonic time.
const COUNTER: &str = "n=0; while read up rest </proc/uptime; do echo $n $up; n=$((n + 1)); sleep 0.05; done";

/// Disk writes that are verified, a TCP connection that counts, all vCPUs busy: after fifty saves and resumes there is no
/// stall, lost interrupt, file system error, gap or backward clock.
pub fn a_guest_under_load_is_healthy_after_fifty_saves(context: &Context) -> Result<()> {
    let mut config = vmm::config(context, 2)?;
    // What is saved competes with the guest for the same emulated processors. Less is too little: Debian's 6.1.192 dereferences
    // a null pointer in `ext4_mb_load_buddy_gfp` once it has to give up the pages of ext4's buddy cache.
    config.memory_mib = 256;
    let vmm = Vmm::start(context, &config)?;
    let guest = vmm::shell(&vmm, &vmm::address(context)?)?;
    let boot = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    guest.write("/usr/local/bin/load", WRITER)?;
    // Half of their time: a save finds vCPUs that run and vCPUs that are halted, and gets processors itself.
    guest.run(
        "chmod +x /usr/local/bin/load; systemctl is-system-running --wait; systemd-run --quiet --unit=load /usr/local/bin/load
         for cpu in $(seq $(nproc)); do systemd-run --quiet --unit=busy-$cpu -p Nice=10 -p CPUQuota=50% /bin/sh -c 'while :; do :; done'; done",
    )?;
    let lines = Lines::of(guest.spawn(COUNTER)?)?;
    let complaints = guest.run(UNHEALTHY)?;
    context.say("under load");
    for cycle in 0..CYCLES {
        lines.more(MORE)?;
        let resume = save(context, &vmm, cycle)?;
        vmm.kill()?;
        let directory = resume.directory.clone();
        config.resume = Some(resume);
        vmm.run(&config)?;
        complete(&vmm).with_context(|| format!("in cycle {cycle}"))?;
        context.ssh().run(&format!("rm -r {}", directory.display()))?;
        if cycle % 10 == 9 {
            context.say(&format!("{} cycles, {} lines", cycle + 1, lines.count()?));
        }
    }
    lines.more(MORE)?;
    written(&guest)?;

    ensure!(
        guest.run("cat /proc/sys/kernel/random/boot_id")? == boot,
        "the guest has booted"
    );
    let wrong = guest.run("cat /var/tmp/load/wrong 2>/dev/null || true")?;
    ensure!(wrong.is_empty(), "files are not what was written: {wrong}");
    let after = guest.run(UNHEALTHY)?;
    ensure!(after == complaints, "the guest's kernel complains:\n{after}");
    let units =
        guest.run("systemctl is-active load busy-1 busy-2; systemctl --failed --plain --no-legend")?;
    ensure!(units == "active\nactive\nactive\n", "units are {units}");
    context.say(&format!("healthy; {} lines without a gap", lines.count()?));
    guest.forget();
    Ok(())
}

/// Saves the session, and tells how to resume it.
fn save(context: &Context, vmm: &Vmm, cycle: u32) -> Result<Resume> {
    let directory = PathBuf::from(format!("{}/session-{cycle}", context.dir));
    let key = PathBuf::from(format!("{}/key", context.dir));
    context.ssh().run(&format!(
        "mkdir {} && head -c 32 /dev/urandom >{}",
        directory.display(),
        key.display()
    ))?;
    let request = SaveRequest {
        checkpoint: Uuid::new_v4(),
        directory,
        key,
        guest_uid: "web".to_owned(),
        host_boot_id: format!("boot {cycle}"),
        machine_id: "node".to_owned(),
        target_pause_ms: 30,
        hold: false,
        lease_ms: 600_000,
    };
    vmm.put("/v1/save", &json!(request))?;
    wait_until("the session to be saved", LIMIT, POLL, || {
        let info = vmm.get("/v1/save")?;
        match info["state"].as_str() {
            Some("Saved") => Ok(Some(())),
            Some("Failed" | "Cancelled") => bail!("the save ended: {info}"),
            _ => Ok(None),
        }
    })?;
    Ok(Resume {
        checkpoint: request.checkpoint,
        directory: request.directory,
        key: request.key,
        guest_uid: request.guest_uid,
        host_boot_id: format!("boot {}", cycle + 1),
        machine_id: request.machine_id,
    })
}

/// Waits until the guest is resumed and its checkpoint is needed no more.
fn complete(vmm: &Vmm) -> Result<()> {
    wait_until("all memory to be there", LIMIT, POLL, || {
        vmm.must_run()?;
        let info = vmm.get("/v1/vm").unwrap_or_default();
        Ok((info["resume"]["pendingBytes"] == 0).then_some(()))
    })
}

/// Waits until the guest has written each of its files again.
fn written(guest: &Ssh) -> Result<()> {
    let count = || -> Result<u64> { Ok(guest.run("cat /var/tmp/load/count")?.trim().parse()?) };
    let from = count()?;
    wait_until("the guest to write its files", LIMIT, POLL, || {
        Ok((count()? >= from + 16).then_some(()))
    })
}

/// What a command in the guest prints.
struct Lines {
    child: Child,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Lines {
    fn of(mut child: Child) -> Result<Lines> {
        let output = child.stdout.take().context("no output")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let lines = seen.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Lines { child, seen })
    }

    /// How many there are; each has the next number, and no clock goes back.
    fn count(&self) -> Result<usize> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = 0.0;
        for (number, line) in seen.iter().enumerate() {
            let (n, up) = line.split_once(' ').context("a line without time")?;
            ensure!(n.parse() == Ok(number), "line {number} is '{line}'");
            let up: f64 = up.parse()?;
            ensure!(
                up >= last,
                "the clock went back from {last} to {up} at line {number}"
            );
            last = up;
        }
        Ok(seen.len())
    }

    /// Waits for so many more.
    fn more(&self, lines: usize) -> Result<()> {
        let from = self.count()?;
        wait_until("the guest to count on", LIMIT, POLL, || {
            Ok((self.count()? >= from + lines).then_some(()))
        })
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
