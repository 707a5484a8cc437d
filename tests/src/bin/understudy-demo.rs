//! `make demo`: the main job on real input.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use understudy_tests::bed::{Images, Stage, repository};
use understudy_tests::demo;
use understudy_tests::machine::Machine;

/// Reboots a serving Debian guest into its new kernel, then reboots it the ordinary way, and compares.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Use the node VM of this name even where this machine's KVM would do.
    #[arg(long)]
    node: Option<String>,
    /// Where the outcome is written as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let binaries = Stage::binaries()?;
    let target = repository().join("target");
    let why_not = match &arguments.node {
        Some(name) => Some(format!("node VM {name} was asked for")),
        None => Machine::why_not_here(&binaries)?,
    };
    // Held to the end: the node VM is ours alone meanwhile.
    let stage;
    let mut machine = match why_not {
        None => Machine::here(&Images::build(&binaries, &[])?, &binaries)?,
        Some(reason) => {
            eprintln!("Not on this machine's /dev/kvm: {reason}");
            eprintln!("In a node VM instead (QEMU, emulated SVM): slow, but real KVM.");
            stage = Stage::set(arguments.node.as_deref().unwrap_or("node"), &binaries)?;
            Machine::in_node(&stage, &binaries)
        }
    };
    let outcome = demo::run_with_logs(&mut machine, &target.join("demo-logs"))?;
    let json = arguments.json.unwrap_or_else(|| target.join("demo.json"));
    std::fs::write(&json, serde_json::to_vec_pretty(&outcome)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    println!("\n{}\n  also as JSON: {}", outcome.table(), json.display());
    Ok(())
}
