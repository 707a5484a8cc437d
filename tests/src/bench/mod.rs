//! What it costs, measured in one run: the interruption that a client sees, a disk's split, the guest's
//! freeze, the memory of a VMM, and an operator with a large cluster. Every figure stands beside what it is compared with, from the same run
//! on the same machine, since times alone mean nothing on another one.

pub mod freeze;
pub mod memory;
pub mod nature;
pub mod operator;
mod qemu;
pub mod sessions;
pub mod split;
pub mod statistics;
mod table;
mod vmm;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bed::{GUEST_IMAGE, NODE_BIN, repository};
use crate::demo::{self, Chosen, GUEST, Moment, Outcome};
use freeze::BareFreeze;
use memory::Footprint;
use nature::Nature;
use operator::OperatorFigures;
use sessions::{Given, Sessions};
use split::Splits;

/// Where a node VM keeps the disks of the splits.
const DIR_ON_NODE: &str = "/var/lib/understudy/bench";

/// What one run found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Findings {
    /// When it began, UTC.
    pub date: String,
    /// What was measured.
    pub commit: String,
    /// This machine.
    pub machine: Nature,
    /// The node VM in which the guests ran, where it was one.
    pub node: Option<Nature>,
    /// How often splits and bare freezes were repeated.
    pub repetitions: usize,
    /// Splits of empty disks of several sizes.
    pub splits: Vec<Splits>,
    /// Whether they were measured in the node VM, and not on this machine.
    pub splits_in_node: bool,
    /// Sessions of stock guests, saved and resumed, beside QEMU's.
    #[serde(default)]
    pub sessions: Vec<Sessions>,
    /// An operator with a large cluster.
    #[serde(default)]
    pub operator: Option<OperatorFigures>,
    /// How long the serving guest's block requests waited for the split of its disk, in microseconds.
    pub serving_split_held_us: Option<u64>,
    /// Bare freezes of the guest that was rebooted, before it was.
    pub bare_freeze: BareFreeze,
    /// The VMM processes while the guest served, and after its seamless reboot.
    pub memory: Vec<Footprint>,
    /// The seamless reboot and the ordinary one.
    pub reboots: Outcome,
}

/// Measures everything. Whatever fails is an error, and the logs are kept in `logs`.
pub fn run(chosen: &mut Chosen, repetitions: usize, logs: &Path) -> Result<Findings> {
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string();
    let machine = Nature::here(chosen.why_not_here.as_deref())?;
    let node = match chosen.machine.node() {
        Some(node) => Some(Nature::of_node(|line| node.ssh().run(line))?),
        None => None,
    };
    let splits_in_node = !Path::new("/dev/kvm").exists() && node.is_some();

    eprintln!(
        "Splitting disks of two sizes, {repetitions} times each, {}",
        if splits_in_node {
            "in the node VM"
        } else {
            "on this machine"
        }
    );
    let splits = if splits_in_node {
        splits_in_node_vm(chosen, repetitions)?
    } else {
        let dir = repository().join("target/bench");
        split::measure(&chosen.binaries.join("understudy-vmm"), &dir, repetitions)?
    };

    eprintln!("Saving and resuming guests of two sizes, by our VMM and by QEMU: some minutes");
    chosen.machine.clear()?;
    let sessions = measure_sessions(chosen)?;

    eprintln!("An operator with a large cluster, at a real API server: some minutes");
    let operator = operator::measure(&repository().join("target/bench/operator"))?;

    let mut bare_freeze = None;
    let mut memory = Vec::new();
    let reboots = demo::run_with_logs(chosen, logs, &mut |moment, machine, address| {
        match moment {
            Moment::Serving => {
                memory.extend(memory::measure(machine, "before the seamless reboot")?);
                bare_freeze = Some(freeze::measure(&machine.guest(address), repetitions)?);
            }
            Moment::Rebooted => memory.extend(memory::measure(machine, "after it")?),
        }
        Ok(())
    })?;
    Ok(Findings {
        date,
        commit: nature::commit(&repository()),
        machine,
        node,
        repetitions,
        splits,
        splits_in_node,
        sessions,
        operator: Some(operator),
        serving_split_held_us: held_in(&chosen.machine.guest_log(GUEST)?),
        bare_freeze: bare_freeze.context("the demo never said that the guest serves")?,
        memory,
        reboots,
    })
}

/// What the agent logged of the last split: `the disk is split held_us=N`.
fn held_in(log: &str) -> Option<u64> {
    let line = log.lines().rfind(|line| line.contains("the disk is split"))?;
    let (_, rest) = line.split_once("held_us=")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// This program measures the splits on the node by itself, since a VMM listens on a socket there.
fn splits_in_node_vm(chosen: &Chosen, repetitions: usize) -> Result<Vec<Splits>> {
    on_node(
        chosen,
        &format!("splits --dir {DIR_ON_NODE} --repetitions {repetitions}"),
    )
}

/// Sessions are measured where the guests run, by this program as well.
fn measure_sessions(chosen: &Chosen) -> Result<Vec<Sessions>> {
    let images = chosen.machine.images();
    let Some(node) = chosen.machine.node() else {
        let dir = repository().join("target/bench");
        qemu::gather(&images.qemu, &dir.join("qemu"))?;
        let given = Given {
            vmm: &chosen.binaries.join("understudy-vmm"),
            qemu: &dir.join("qemu"),
            image: &images.guest_disk(),
        };
        return sessions::measure(&given, &dir);
    };
    let there = format!("{DIR_ON_NODE}/qemu");
    qemu::bring(&images.qemu, node.ssh(), &there)?;
    on_node(
        chosen,
        &format!("sessions --dir {DIR_ON_NODE} --qemu {there} --image {GUEST_IMAGE}"),
    )
}

/// What this program prints as JSON when it is run on the node with these arguments.
fn on_node<T: DeserializeOwned>(chosen: &Chosen, arguments: &str) -> Result<T> {
    let node = chosen.machine.node().context("there is no node VM")?;
    let program = std::env::current_exe().context("cannot find this program's own path")?;
    let small = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    let status = Command::new("strip")
        .arg("-o")
        .args([small.path(), &program])
        .status();
    if !status.is_ok_and(|status| status.success()) {
        bail!("cannot run strip on {} (package binutils)", program.display());
    }
    let there = format!("{NODE_BIN}/understudy-bench");
    node.ssh().push(small.path(), &there, 0o755)?;
    let printed = node.ssh().run(&format!("{there} {arguments}"))?;
    serde_json::from_str(&printed).with_context(|| format!("the node printed: {printed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_split_in_the_agents_log_counts() {
        let log = "2026 INFO the disk is split held_us=9\n2026 INFO other held_us=1\n2026 INFO the disk is split held_us=31\n";
        assert_eq!(held_in(log), Some(31));
        assert_eq!(held_in("nothing"), None);
    }
}
