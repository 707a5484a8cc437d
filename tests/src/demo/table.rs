//! Tables at the end of a run.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Rows of a name and a value.
#[derive(Default)]
pub struct Table {
    text: String,
}

impl Table {
    /// Adds a row.
    pub fn row(&mut self, name: &str, value: impl AsRef<str>) {
        let _ = writeln!(self.text, "  {name:<34} {}", value.as_ref());
    }

    /// Adds an empty line.
    pub fn gap(&mut self) {
        self.text.push('\n');
    }

    /// All rows.
    pub fn text(self) -> String {
        self.text
    }
}

/// Milliseconds that may not be known.
pub fn ms(value: Option<i64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value} ms"))
}

/// Seconds of milliseconds, for what takes long.
pub fn seconds(value: Option<i64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{:.1} s", value as f64 / 1000.0))
}

/// Prints the table of a run, and writes its outcome as JSON.
pub fn publish(outcome: &impl Serialize, table: &str, json: &Path) -> Result<()> {
    std::fs::write(json, serde_json::to_vec_pretty(outcome)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    println!("\n{table}\n  also as JSON: {}", json.display());
    Ok(())
}
