//! The client outside as a process of its own, in the network of guests.

use std::io::{Read, Write};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::Report;
use crate::machine::Machine;

/// The running client; ended when dropped.
pub struct Load {
    child: Child,
}

impl Load {
    /// Starts it against the guest at `address`, with a request to each service `every` so often; `run` marks its
    /// lines in the ledger.
    pub fn start(machine: &Machine, address: &str, run: &str, every: Duration) -> Result<Load> {
        Ok(Load {
            child: machine.client(address, run, every)?,
        })
    }

    /// What comes from here on belongs to `phase`.
    pub fn mark(&mut self, phase: &str) -> Result<()> {
        self.say(&format!("mark {phase}"))
    }

    /// Ends it, once it has read the ledger back.
    pub fn finish(mut self) -> Result<Report> {
        self.say("finish")?;
        drop(self.child.stdin.take());
        let mut text = String::new();
        if let Some(stdout) = self.child.stdout.as_mut() {
            stdout.read_to_string(&mut text)?;
        }
        let status = self.child.wait()?;
        ensure!(status.success(), "the client failed ({status})");
        serde_json::from_str(&text).context("the client's report")
    }

    fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .context("the client takes no more commands")?;
        writeln!(stdin, "{line}").context("the client has ended")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
