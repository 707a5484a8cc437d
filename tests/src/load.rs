//! The clients outside, in the network of guests.

use std::time::Duration;

use anyhow::Result;

use crate::client::Report;
use crate::counter;
use crate::machine::{COUNTER_PORT, LEDGER_PORT, Machine};
use crate::outside::Outside;

/// The client of page and ledger.
pub type Load = Outside<Report>;

/// The client of a counter.
pub type Count = Outside<counter::Report>;

impl Load {
    /// Starts it against the guest at `address`, with a request to each service `every` so often; `run` marks its
    /// lines in the ledger.
    pub fn start(machine: &Machine, address: &str, run: &str, every: Duration) -> Result<Load> {
        let mut command = machine.client("understudy-client");
        command
            .args(["--page", &format!("{address}:80")])
            .args(["--ledger", &format!("{address}:{LEDGER_PORT}")])
            .args(["--run", run, "--every", &every.as_millis().to_string()]);
        Outside::spawn(command)
    }
}

impl Count {
    /// Starts it against the guest at `address`.
    pub fn start(machine: &Machine, address: &str) -> Result<Count> {
        let mut command = machine.client("understudy-counter");
        command.args(["watch", &format!("{address}:{COUNTER_PORT}")]);
        Outside::spawn(command)
    }
}
