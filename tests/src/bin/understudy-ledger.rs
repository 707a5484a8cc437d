//! The ledger service that test guests run; see [`understudy_tests::ledger`].
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use understudy_tests::ledger::Ledger;

/// Takes lines over TCP and acknowledges each once it is on disk
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Address to listen on
    #[arg(long, default_value = "0.0.0.0:7000")]
    listen: String,
    /// File that holds the lines
    #[arg(long, default_value = "/var/lib/ledger/ledger.txt")]
    file: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let ledger = Ledger::open(&cli.file).with_context(|| format!("cannot open {}", cli.file.display()))?;
    let listener =
        TcpListener::bind(&cli.listen).with_context(|| format!("cannot listen on {}", cli.listen))?;
    println!(
        "{} lines in {}, listening on {}",
        ledger.count(),
        cli.file.display(),
        cli.listen
    );
    ledger
        .serve(&cli.file, &listener)
        .context("cannot accept connections")
}
