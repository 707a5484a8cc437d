//! The programs of a cluster, built by `tests/bed/kubernetes/build.sh`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bed::{repository, script};

/// Where the programs are, by their names.
#[derive(Clone, Debug)]
pub struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds what is missing of `wanted` (programs or groups, as the script names them) and says where it is.
    pub fn build(wanted: &[&str]) -> Result<Self> {
        let script = repository().join("tests/bed/kubernetes/build.sh");
        // Of this process alone: another one may ask for other programs at the same time.
        let out = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
        script::ask(Command::new(&script).args(wanted), out.path()).map(Self)
    }

    /// Path of a program that was asked for.
    pub fn path(&self, name: &str) -> Result<&Path> {
        self.0
            .get(name)
            .map(PathBuf::as_path)
            .with_context(|| format!("{name} was not built: ask Programs::build for it"))
    }
}
