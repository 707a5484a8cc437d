//! The client outside as a process of its own, so that it runs in the test bed's network namespace.
//!
//! Reads orders from standard input, as [`understudy_tests::outside`] tells; at the end it reads the ledger
//! back and prints the report as JSON.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use understudy_tests::client::{Client, TICK};
use understudy_tests::outside::obey;

/// Asks for a page and appends a line to a ledger again and again, and tells what it saw.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Address and port of the page (HTTP).
    #[arg(long)]
    page: SocketAddr,
    /// Address and port of the ledger.
    #[arg(long)]
    ledger: SocketAddr,
    /// Marks this run's lines in the ledger; no white space.
    #[arg(long)]
    run: String,
    /// Milliseconds between two requests to one of them.
    #[arg(long, default_value_t = TICK.as_millis() as u64)]
    every: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut client = Client::new(
        arguments.page,
        arguments.ledger,
        &arguments.run,
        Duration::from_millis(arguments.every.max(1)),
    )
    .context("starting")?;
    obey(&mut client)?;
    let report = client.finish().context("reading the ledger back")?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
