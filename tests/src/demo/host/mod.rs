//! A host reboots into its newer kernel and the sessions of its guests go on; then, for comparison, it is
//! rebooted the ordinary way.

mod outcome;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub use outcome::{GuestOutcome, Interruption, Outcome};

use super::show::{self, Show};
use super::{QUIET, keep_logs, wait_for_services};
use crate::bed::{Node, Stage, wait_until};
use crate::machine::{COUNTER_PORT, LEDGER_PORT, Machine, all, condition_message, find};
use crate::pair::{Clients, Pair};
use crate::updates;

/// Name of the HostUpdate.
const UPDATE: &str = "newer-kernel";
/// An emulated node needs minutes to install a kernel, one to go down, and one to come up.
const UPDATE_LIMIT: Duration = Duration::from_secs(1800);
const HALT_LIMIT: Duration = Duration::from_secs(300);
/// A node that reboots is down for a minute or two.
pub const REBOOT_LIMIT: Duration = Duration::from_secs(900);
/// The longest that a connection is waited for after the reboot, beyond what a client may need.
const LONGEST_BACKOFF: Duration = Duration::from_secs(120);

/// The HostUpdate: the newer kernel's package, which waits on the host, is installed; it has to run afterwards.
fn host_update(package: &str, kernel: &str) -> String {
    // The node has no network beyond its guests; where there are package sources, apt-get does the same.
    let command = [
        "/usr/bin/env",
        "DEBIAN_FRONTEND=noninteractive",
        "dpkg",
        "--install",
        package,
    ];
    updates::manifest(UPDATE, Some(&command), Some(&format!("kernelRelease: {kernel}")))
}

/// What the runs on a node share.
struct Run<'a> {
    show: Show,
    machine: &'a mut Machine,
    node: Node,
    older: String,
    newer: String,
}

/// Runs the demo on the node VM of this name, whose root disk is made anew, and keeps every log in `logs` where it
/// fails.
pub fn run_with_logs(node: &str, binaries: &Path, logs: &Path) -> Result<Outcome> {
    let stage = Stage::set_anew(node, binaries)?;
    let mut machine = Machine::in_node(&stage, binaries);
    run(&mut machine, &stage).inspect_err(|_| keep_logs(&machine, Some(&stage), logs))
}

/// Runs the demo. Whatever fails is an error; the caller keeps the logs.
fn run(machine: &mut Machine, stage: &Stage) -> Result<Outcome> {
    let started = Instant::now();
    let mut run = Run {
        show: Show::new(),
        node: stage.node.clone(),
        older: machine.images().older_kernel.clone(),
        newer: machine.images().newer_kernel.clone(),
        machine,
    };
    run.ensure_kernel(&run.older)?;
    let pair = run.set_up()?;

    let step = run
        .show
        .step("The clients outside begin: a counted line, page and ledger, every 50 ms");
    let lives = pair.lives()?;
    let mut clients = pair.watch(run.machine, "demo-host")?;
    clients.mark("quiet")?;
    std::thread::sleep(QUIET);
    step.done("");

    run.show.headline(&format!(
        "Host update {} → {}, sessions go on",
        run.older, run.newer
    ));
    clients.mark("update")?;
    let began = Instant::now();
    let update = run.update()?;
    let update_took = began.elapsed();
    let step = run.show.step("Both guests are looked at");
    run.ensure_kernel(&run.newer)?;
    pair.ensure_same(&lives)?;
    step.done("the boot IDs and processes of before");
    run.watch_on(&mut clients, &update)?;

    run.show.headline(&format!(
        "Ordinary reboot of the same host, into the same kernel {}",
        run.newer
    ));
    clients.mark("ordinary")?;
    let began = Instant::now();
    run.reboot_the_ordinary_way(&pair)?;
    let ordinary_took = began.elapsed();
    std::thread::sleep(QUIET);
    clients.mark("last")?;
    run.ensure_kernel(&run.newer)?;

    let step = run.show.step("Reading the ledger back");
    let seen = clients.finish()?;
    step.done(&format!(
        "{} lines acknowledged, {} found",
        seen.load.acknowledged, seen.load.found
    ));
    let outcome = Outcome::new(
        run.machine.describe(),
        &update,
        seen,
        [update_took, ordinary_took, started.elapsed()],
    )?;
    outcome.check(&run.older, &run.newer)?;
    Ok(outcome)
}

impl Run<'_> {
    fn ensure_kernel(&self, expected: &str) -> Result<()> {
        let kernel = self.node.ssh().run("uname -r")?;
        ensure!(
            kernel.trim() == expected,
            "the host should run {expected} and runs {}",
            kernel.trim()
        );
        Ok(())
    }

    fn set_up(&mut self) -> Result<Pair> {
        let step = self.show.step("Clearing the stage");
        self.machine.clear()?;
        step.done(&self.machine.describe());

        let step = self.show.step("Bringing the guests' disks");
        Pair::place_disks(self.machine)?;
        step.done("two of stock Debian 12, with a counter, nginx and a ledger");

        let step = self.show.step("Starting the node agent");
        self.machine.start_agent()?;
        step.done("stand-alone, on a directory of manifests");

        let step = self.show.step("Booting both guests");
        Pair::declare(self.machine, "")?;
        let pair = Pair::reached(self.machine)?;
        for guest in &pair.guests {
            wait_for_services(self.machine, &guest.address, &[80, LEDGER_PORT, COUNTER_PORT])?;
        }
        let addresses = pair
            .guests
            .each_ref()
            .map(|guest| format!("{} {}", guest.name, guest.address));
        step.done(&addresses.join(", "));

        let step = self.show.step("Asking whether their sessions are safe here");
        let status = self.machine.status()?;
        let host = all(&status, "Host").next();
        step.done(&host.map_or("no Host is known".to_owned(), |host| {
            condition_message(host, "SessionsSafe")
        }));
        Ok(pair)
    }

    /// Applies the HostUpdate and shows its phases to the end; the NodeUpdate.
    fn update(&self) -> Result<Value> {
        let package = self.machine.images().newer_package.clone();
        self.machine
            .apply("hostupdate.yaml", &host_update(&package, &self.newer))?;
        let mut bar = self.show.phases(show::NODE_UPDATE);
        let update = updates::ended(
            self.machine,
            UPDATE_LIMIT,
            |status| updates::of_host_update(status, UPDATE),
            |status| bar.show(status),
        );
        bar.end();
        updates::resumed(update?)
    }

    /// Watches on until every client has had its chance to be answered, and then for a while.
    fn watch_on(&self, clients: &mut Clients, update: &Value) -> Result<()> {
        let step = self.show.step("The clients go on");
        let silent = update["status"]["result"]["guests"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|guest| guest["interruption"]["totalMilliseconds"].as_u64())
            .max()
            .unwrap_or_default();
        // A kernel before 6.15 doubles the pause between two tries: the next one comes after at most as long
        // again as there was silence.
        std::thread::sleep(QUIET.max(Duration::from_millis(silent).min(LONGEST_BACKOFF)));
        clients.mark("after")?;
        std::thread::sleep(QUIET);
        step.done("");
        Ok(())
    }

    /// As a host without Understudy is rebooted: its guests are shut down, and booted again afterwards.
    fn reboot_the_ordinary_way(&mut self, pair: &Pair) -> Result<()> {
        let step = self.show.step("Both guests are shut down, by their power button");
        let before = self.node.boot_id()?;
        Pair::declare(self.machine, "  runStrategy: Halted\n")?;
        for guest in &pair.guests {
            updates::guest_is(self.machine, guest.name, "Halted", HALT_LIMIT)?;
        }
        step.done("");

        let step = self.show.step("The host is rebooted");
        // Guests boot as soon as the agent does, and not before.
        self.machine.stop_agent()?;
        Pair::declare(self.machine, "")?;
        // The connection ends with the host.
        let _ = self.node.ssh().output("systemctl reboot");
        self.node.wait_for_reboot(&before, REBOOT_LIMIT)?;
        step.done("");

        let step = self.show.step("Both guests boot");
        pair.guests.iter().for_each(|guest| guest.ssh.forget());
        wait_until("the node agent to answer", REBOOT_LIMIT, QUIET / 20, || {
            let status = self.machine.status_if_up()?;
            Ok(status.and_then(|status| find(&status, "Guest", pair.web().name)))
        })
        .context("after the ordinary reboot")?;
        for guest in &pair.guests {
            updates::guest_is(self.machine, guest.name, "Running", REBOOT_LIMIT)?;
            wait_for_services(self.machine, &guest.address, &[80, LEDGER_PORT, COUNTER_PORT])?;
        }
        step.done("");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_installs_the_package_and_expects_its_kernel() {
        let text = host_update("/var/cache/apt/archives/linux.deb", "6.1.0-56-cloud-amd64");
        for line in [
            "kind: HostUpdate",
            "      - \"dpkg\"",
            "      - \"/var/cache/apt/archives/linux.deb\"",
            "    kernelRelease: 6.1.0-56-cloud-amd64",
        ] {
            assert!(
                text.lines().any(|there| there == line),
                "{line} is missing in\n{text}"
            );
        }
    }
}
