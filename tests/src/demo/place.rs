//! Where a run takes place: on this machine where its KVM can run stock kernels, else in a node VM.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::bed::{Images, Stage};
use crate::machine::Machine;

/// The machine of a run.
pub struct Chosen {
    /// The machine.
    pub machine: Machine,
    /// Why this machine's own KVM does not do; `None` where the run takes place on it.
    pub why_not_here: Option<String>,
    /// The directory of our programs.
    pub binaries: PathBuf,
    /// The node VM, which is ours alone meanwhile, where the run takes place in one.
    pub stage: Option<Stage>,
}

impl Chosen {
    /// This machine, unless it cannot or the node VM of a name is asked for; says so where it is a node VM.
    pub fn new(node: Option<&str>, binaries: &Path) -> Result<Chosen> {
        let unable = Machine::why_not_here(binaries)?;
        let reason = match node {
            Some(name) => Some(format!("node VM {name} was asked for")),
            None => unable.clone(),
        };
        let (machine, stage) = match reason {
            None => (Machine::here(&Images::build(binaries, &[])?, binaries)?, None),
            Some(reason) => {
                eprintln!("Not on this machine's /dev/kvm: {reason}");
                eprintln!("In a node VM instead (QEMU, emulated SVM): slow, but real KVM.");
                let stage = Stage::set(node.unwrap_or("node"), binaries)?;
                (Machine::in_node(&stage, binaries), Some(stage))
            }
        };
        Ok(Chosen {
            machine,
            why_not_here: unable,
            binaries: binaries.to_path_buf(),
            stage,
        })
    }
}
