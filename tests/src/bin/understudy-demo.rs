//! `make demo`: the main job on real input.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use understudy_tests::bed::{Stage, repository};
use understudy_tests::demo::{Chosen, publish, run_with_logs};

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
    let mut chosen = Chosen::new(arguments.node.as_deref(), &binaries)?;
    let outcome = run_with_logs(&mut chosen, &target.join("demo-logs"), &mut |_, _, _| Ok(()))?;
    let json = arguments.json.unwrap_or_else(|| target.join("demo.json"));
    publish(&outcome, &outcome.table(), &json)
}
