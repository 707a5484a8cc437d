//! What a machine is, without which no figure means anything.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A machine on which something was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Nature {
    /// Processors that it has.
    pub cores: u32,
    /// What its processors call themselves.
    pub processor: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Release of its kernel.
    pub kernel: String,
    /// What its `/dev/kvm` is.
    pub kvm: String,
    /// How many tasks wanted its processors in the minute before: figures of a busy machine are worth less.
    pub load: f64,
}

/// Prints what [`Nature`] wants to know, a line each. `lscpu` knows no more than these files.
const QUESTIONS: &str = "nproc
grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2
awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo
uname -r
[ -e /dev/kvm ] && echo kvm || echo none
grep -m 1 -qw hypervisor /proc/cpuinfo && echo virtual || echo physical
cut -d ' ' -f 1 /proc/loadavg";

impl Nature {
    /// Of this machine. `why_not` tells why its KVM cannot run stock kernels; `None` where it can.
    pub fn here(why_not: Option<&str>) -> Result<Nature> {
        let output = Command::new("sh")
            .args(["-c", QUESTIONS])
            .output()
            .context("cannot run sh")?;
        Self::read(
            &String::from_utf8_lossy(&output.stdout),
            |there, virtual_machine| match (there, why_not, virtual_machine) {
                (false, ..) => "none".to_owned(),
                (true, Some(_), _) => "software (runs small payloads, no stock kernel)".to_owned(),
                (true, None, true) => "real, nested in a virtual machine".to_owned(),
                (true, None, false) => "real".to_owned(),
            },
        )
    }

    /// Of a node VM, whose processors QEMU emulates. `run` runs a shell command line there.
    pub fn of_node(run: impl FnOnce(&str) -> Result<String>) -> Result<Nature> {
        Self::read(&run(QUESTIONS)?, |there, _| {
            match there {
                true => "real, on processors with SVM that QEMU emulates",
                false => "none",
            }
            .to_owned()
        })
    }

    fn read(answers: &str, kvm: impl FnOnce(bool, bool) -> String) -> Result<Nature> {
        let lines: Vec<&str> = answers.lines().map(str::trim).collect();
        let [cores, processor, memory, kernel, there, level, load] = lines[..] else {
            bail!("the machine should tell seven things of itself and said: {answers}");
        };
        Ok(Nature {
            cores: cores.parse().with_context(|| format!("nproc said {cores}"))?,
            processor: processor.to_owned(),
            memory_mib: memory
                .parse()
                .with_context(|| format!("/proc/meminfo said {memory}"))?,
            kernel: kernel.to_owned(),
            kvm: kvm(there == "kvm", level == "virtual"),
            load: load
                .parse()
                .with_context(|| format!("/proc/loadavg said {load}"))?,
        })
    }

    /// In a line.
    pub fn describe(&self) -> String {
        format!(
            "{} cores ({}), load {:.1} at the start, {:.1} GiB, Linux {}, KVM {}",
            self.cores,
            self.processor,
            self.load,
            self.memory_mib as f64 / 1024.0,
            self.kernel,
            self.kvm
        )
    }
}

/// The commit that this was built from, as far as Git tells, and whether anything was changed beside it.
pub fn commit(repository: &std::path::Path) -> String {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"])
        .current_dir(repository)
        .output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}
