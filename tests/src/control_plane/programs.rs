//! The programs of a cluster, built by `tests/bed/kubernetes/build.sh`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bed::repository;

/// Where the programs are, by their names.
#[derive(Clone, Debug)]
pub struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds what is missing of `wanted` (programs or groups, as the script names them) and says where it is.
    pub fn build(wanted: &[&str]) -> Result<Self> {
        let script = repository().join("tests/bed/kubernetes/build.sh");
        // Of this process alone: another one may ask for other programs at the same time.
        let out = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
        let status = Command::new(&script)
            .arg("--out")
            .arg(out.path())
            .args(wanted)
            .status()
            .with_context(|| format!("cannot run {}", script.display()))?;
        if !status.success() {
            bail!(
                "{} failed ({status}); what it printed above says why",
                script.display()
            );
        }
        let text = std::fs::read(out.path()).context("cannot read what build.sh wrote")?;
        let programs =
            serde_json::from_slice(&text).with_context(|| format!("{} wrote no JSON", script.display()))?;
        Ok(Self(programs))
    }

    /// Path of a program that was asked for.
    pub fn path(&self, name: &str) -> Result<&Path> {
        self.0
            .get(name)
            .map(PathBuf::as_path)
            .with_context(|| format!("{name} was not built: ask Programs::build for it"))
    }
}
