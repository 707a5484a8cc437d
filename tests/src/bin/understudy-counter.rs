//! The counter that test guests run, and its client outside; see [`understudy_tests::counter`].
#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use understudy_tests::counter::{Counter, TICK, Watcher};
use understudy_tests::outside::obey;

/// Counts lines in memory, or watches one who does
#[derive(Parser)]
#[command(version)]
enum Cli {
    /// Answer each line with its own text, a count since the start, the process ID and the boot ID
    Serve {
        /// Address to listen on
        #[arg(long, default_value = "0.0.0.0:7001")]
        listen: String,
    },
    /// Send a numbered line again and again over one connection, and tell what was lost (JSON)
    ///
    /// Reads orders from standard input: `mark NAME` begins a phase, `finish` ends the run.
    Watch {
        /// Address and port of the counter
        counter: SocketAddr,
        /// Milliseconds between two lines
        #[arg(long, default_value_t = TICK.as_millis() as u64)]
        every: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse() {
        Cli::Serve { listen } => {
            let listener =
                TcpListener::bind(&listen).with_context(|| format!("cannot listen on {listen}"))?;
            println!("listening on {listen}");
            Counter::new()
                .context("cannot read the boot ID")?
                .serve(&listener)
                .context("cannot accept connections")
        }
        Cli::Watch { counter, every } => {
            let mut watcher =
                Watcher::new(counter, Duration::from_millis(every.max(1))).context("starting")?;
            obey(&mut watcher)?;
            println!("{}", serde_json::to_string(&watcher.finish())?);
            Ok(())
        }
    }
}
