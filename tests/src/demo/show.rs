//! What the demo shows while it runs: steps with a spinner, phases with a bar.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// Phases of a seamless reboot, in order.
pub const REBOOT_PHASES: &[&str] = &[
    "Pending",
    "Confirmed",
    "Cloning",
    "Rebooting",
    "Integrating",
    "CuttingOver",
    "Succeeded",
];

/// Phases of a NodeUpdate, in order.
pub const NODE_UPDATE: &[&str] = &[
    "Pending",
    "Notified",
    "Saving",
    "Acknowledged",
    "Rebooting",
    "LoggingOn",
    "Resuming",
    "Resumed",
];

/// The terminal.
pub struct Show;

impl Show {
    /// Writes to standard error: a terminal gets moving bars, a file gets lines.
    pub fn new() -> Show {
        Show
    }

    /// Begins a step.
    pub fn step(&self, what: &str) -> Step {
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Step {
            bar,
            what: what.to_owned(),
            started: Instant::now(),
        }
    }

    /// A line of its own.
    pub fn headline(&self, text: &str) {
        eprintln!("\n{text}");
    }

    /// Phases that will pass, in order: [`REBOOT_PHASES`] or [`NODE_UPDATE`].
    pub fn phases(&self, phases: &'static [&'static str]) -> PhaseBar {
        let bar = ProgressBar::new(phases.len() as u64 - 1);
        if let Ok(style) = ProgressStyle::with_template("  {bar:24} {elapsed:>4}  {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        PhaseBar {
            bar,
            phases,
            phase: String::new(),
            started: Instant::now(),
        }
    }
}

/// A step that is going on.
pub struct Step {
    bar: ProgressBar,
    what: String,
    started: Instant,
}

impl Step {
    /// Ends the step with what came of it.
    pub fn done(self, what: &str) {
        self.bar.finish_and_clear();
        let colon = if what.is_empty() { "" } else { ": " };
        eprintln!(
            "  {:>6.1} s  {}{colon}{what}",
            self.started.elapsed().as_secs_f64(),
            self.what
        );
    }
}

/// Phases, as they pass.
pub struct PhaseBar {
    bar: ProgressBar,
    phases: &'static [&'static str],
    phase: String,
    started: Instant,
}

impl PhaseBar {
    /// Shows a status that has one of the phases.
    pub fn show(&mut self, status: &Value) {
        let phase = status["phase"].as_str().unwrap_or("Pending");
        let message = status["progress"]["message"].as_str().unwrap_or_default();
        self.bar.set_message(format!("{phase} {message}"));
        if phase != self.phase {
            self.phase = phase.to_owned();
            let place = self.phases.iter().position(|p| *p == phase).unwrap_or(0);
            self.bar.set_position(place as u64);
            let at = self.started.elapsed().as_secs_f64();
            self.bar.suspend(|| eprintln!("  {at:>6.1} s  {phase}"));
        }
    }

    /// Takes the bar away.
    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
