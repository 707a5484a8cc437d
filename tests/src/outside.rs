//! Clients outside as processes of their own, so that they run in the test bed's network namespace: how such a
//! process is told what to do, and what it does with that.
//!
//! Orders come as lines on standard input: `mark NAME` begins a phase, `finish` (or the end of input) ends the
//! run; the report is printed as JSON.

use std::io::{self, BufRead, Read, Write};
use std::marker::PhantomData;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

/// How often orders are looked for.
const LOOK: Duration = Duration::from_millis(20);

/// What such a process does between two orders.
pub trait Watch {
    /// Sends and receives until `until`.
    fn run_until(&mut self, until: Instant) -> io::Result<()>;
    /// Ends the current phase and begins another.
    fn mark(&mut self, phase: &str);
}

/// Watches as it is told, until it is told to finish.
pub fn obey(watch: &mut impl Watch) -> Result<()> {
    let (sender, orders) = mpsc::channel::<String>();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        watch
            .run_until(Instant::now() + LOOK)
            .context("the client's event loop")?;
        match orders.try_recv() {
            Ok(line) => match line.split_once(' ') {
                Some(("mark", phase)) => watch.mark(phase),
                _ if line == "finish" => return Ok(()),
                _ => bail!("{line:?} is no order; say \"mark NAME\" or \"finish\""),
            },
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
        }
    }
}

/// A running client whose report is an `R`; ended when dropped.
pub struct Outside<R> {
    child: Child,
    report: PhantomData<R>,
}

impl<R: DeserializeOwned> Outside<R> {
    /// Starts it.
    pub fn spawn(mut command: Command) -> Result<Outside<R>> {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Outside {
            child,
            report: PhantomData,
        })
    }

    /// What comes from here on belongs to `phase`.
    pub fn mark(&mut self, phase: &str) -> Result<()> {
        self.say(&format!("mark {phase}"))
    }

    /// Ends it; what it saw.
    pub fn finish(mut self) -> Result<R> {
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
            .context("the client takes no more orders")?;
        writeln!(stdin, "{line}").context("the client has ended")
    }
}

impl<R> Drop for Outside<R> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
