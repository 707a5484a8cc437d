//! The chart, installed by Helm.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::FOLDER;
use crate::bed::repository;

/// Where tests install the chart, as release `understudy`.
pub const NAMESPACE: &str = "understudy";

/// Installs the chart with these values (`name=value`); what Helm says of it.
pub fn install(helm: &Path, kubeconfig: &Path, values: &[&str]) -> Result<String> {
    let mut command = Command::new(helm);
    command
        .args(["install", "understudy"])
        .arg(repository().join(FOLDER))
        .args(["--namespace", NAMESPACE, "--create-namespace"])
        .env("KUBECONFIG", kubeconfig)
        // Nothing of this user's own Helm.
        .env("HELM_CONFIG_HOME", "/nonexistent");
    for value in values {
        command.args(["--set", value]);
    }
    let output = command.output().context("cannot run helm")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("helm install: {said}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(said)
}
