//! Charts on the control plane.

use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::Value;

use super::kubectl::finish;
use super::{ControlPlane, Programs};

impl ControlPlane {
    /// Runs helm as the administrator, with `values` for arguments that install or upgrade; returns what it prints, an
    /// error says what it complained of.
    pub fn helm(&self, arguments: &[&str], values: Option<&Value>) -> Result<String> {
        const HELM: &str = "helm";
        let programs = Programs::build(&[HELM])?;
        let mut command = match &self.options.netns {
            Some(netns) => netns.command(programs.path(HELM)?),
            None => std::process::Command::new(programs.path(HELM)?),
        };
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("NO_PROXY", "*")
            .args(arguments)
            .stdin(Stdio::null());
        // Kept until helm has read it.
        let file = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
        if let Some(values) = values {
            // JSON is YAML too.
            std::fs::write(file.path(), values.to_string()).context("cannot write the values")?;
            command.arg("--values").arg(file.path());
        }
        let output = command.output().context("cannot run helm")?;
        finish(&format!("helm {}", arguments.join(" ")), output)
    }
}
