//! Scripts that build things and say as JSON where they are.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

/// Runs a script that writes JSON into the file that its `--out` names, and reads that.
pub fn ask<T: DeserializeOwned>(script: &mut Command, out: &Path) -> Result<T> {
    let name = script.get_program().to_string_lossy().into_owned();
    let status = script
        .arg("--out")
        .arg(out)
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status}); what it printed above says why");
    }
    let text = std::fs::read(out).with_context(|| format!("cannot read {}", out.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{name} wrote other JSON than expected"))
}
