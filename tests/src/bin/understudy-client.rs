//! The client outside as a process of its own, so that it runs in the test bed's network namespace.
//!
//! Reads commands from standard input: `mark NAME` begins a phase, `finish` (or the end of input) reads
//! the ledger back, prints the report as JSON and ends.
#![forbid(unsafe_code)]

use std::io::BufRead;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use understudy_tests::client::{Client, TICK};

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
    let (sender, commands) = mpsc::channel::<String>();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut client = Client::new(
        arguments.page,
        arguments.ledger,
        &arguments.run,
        Duration::from_millis(arguments.every.max(1)),
    )
    .context("starting")?;
    loop {
        client
            .run_until(Instant::now() + Duration::from_millis(20))
            .context("the client's event loop")?;
        match commands.try_recv() {
            Ok(line) => match line.split_once(' ') {
                Some(("mark", phase)) => client.mark(phase),
                _ if line == "finish" => break,
                _ => anyhow::bail!("{line:?} is no command; say \"mark NAME\" or \"finish\""),
            },
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => break,
        }
    }
    let report = client.finish().context("reading the ledger back")?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
