//! `make demo-host`: a host reboots into its new kernel, and the sessions of its guests go on.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use understudy_tests::bed::{Stage, repository};
use understudy_tests::demo::{host, publish};

/// Reboots a node VM into its newer kernel under two running guests, whose sessions go on; then reboots it the
/// ordinary way, and compares.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The node VM; its root disk is made anew. This machine itself is never rebooted.
    #[arg(long, env = "UNDERSTUDY_NODE", default_value = "node")]
    node: String,
    /// Where the outcome is written as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let target = repository().join("target");
    let outcome = host::run_with_logs(
        &arguments.node,
        &Stage::binaries()?,
        &target.join("demo-host-logs"),
    )?;
    let json = arguments.json.unwrap_or_else(|| target.join("demo-host.json"));
    publish(&outcome, &outcome.table(), &json)
}
