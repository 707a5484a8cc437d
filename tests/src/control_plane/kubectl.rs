//! What users of the control plane do: kubectl, kubeconfigs, tokens.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{ControlPlane, KUBECTL};
use crate::bed::repository;

impl ControlPlane {
    /// kubectl as the administrator, in the control plane's network.
    pub fn kubectl_command(&self) -> Result<Command> {
        self.kubectl_command_as(&self.kubeconfig())
    }

    /// kubectl as the user of a kubeconfig.
    pub fn kubectl_command_as(&self, kubeconfig: &Path) -> Result<Command> {
        let mut command = self.command(KUBECTL)?;
        command
            .env("KUBECONFIG", kubeconfig)
            // Not the user's: what another cluster offers would be believed of this one.
            .env("KUBECACHEDIR", self.dir.join("kubectl-cache"))
            .env("NO_PROXY", "*");
        Ok(command)
    }

    /// Runs kubectl and returns what it prints; an error says what it complained of.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.kubectl_command()?;
        run(command.args(arguments), arguments, None)
    }

    /// Runs kubectl with a manifest (YAML or JSON) as its standard input, for arguments with `-f -`.
    pub fn kubectl_with(&self, arguments: &[&str], manifest: &str) -> Result<String> {
        let mut command = self.kubectl_command()?;
        run(command.args(arguments), arguments, Some(manifest))
    }

    /// Applies a manifest (YAML or JSON) as a user does, on the server's side.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.kubectl_with(&["apply", "--server-side", "-f", "-"], manifest)
    }

    /// Applies our CRDs (`crds/`) and waits until the API server serves them.
    pub fn apply_crds(&self) -> Result<()> {
        let folder = repository().join("crds").display().to_string();
        self.kubectl(&["apply", "--server-side", "-f", &folder])?;
        self.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "-f",
            &folder,
        ])?;
        Ok(())
    }

    /// An object, or several as a list, in JSON: the arguments of `kubectl get`.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let arguments = [&["get", "--output=json"], arguments].concat();
        serde_json::from_str(&self.kubectl(&arguments)?).context("kubectl printed no JSON")
    }

    /// A token of a ServiceAccount, from the TokenRequest API.
    pub fn token(&self, namespace: &str, service_account: &str) -> Result<String> {
        self.request_token(namespace, service_account, &[])
    }

    /// A token as the kubelet of `node` gets it for a Pod with that ServiceAccount: bound to the Pod, and so with the
    /// node's name in its claims (`authentication.kubernetes.io/node-name`). The Pod `<service account>-<node>` is
    /// made where it is missing and deleting it ends the token; it runs only where the node has a kubelet.
    pub fn token_on_node(&self, namespace: &str, service_account: &str, node: &str) -> Result<String> {
        let pod = format!("{service_account}-{node}");
        // As one of its DaemonSet, where that is installed: a drain leaves those alone.
        let sets = self.get(&["daemonsets", "--namespace", namespace])?;
        let mut sets = sets["items"].as_array().into_iter().flatten();
        let owners = sets
            .find(|set| set["metadata"]["name"] == service_account)
            .map(|set| {
                json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "controller": true,
                        "name": service_account, "uid": set["metadata"]["uid"]}])
            });
        self.apply(
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": pod, "namespace": namespace, "ownerReferences": owners},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": service_account,
                    "automountServiceAccountToken": false,
                    "containers": [{"name": "agent", "image": "none.invalid/agent"}],
                }
            })
            .to_string(),
        )?;
        let there = self.get(&["pod", &pod, "--namespace", namespace])?;
        let uid = there["metadata"]["uid"].as_str().context("a Pod without a uid")?;
        self.request_token(
            namespace,
            service_account,
            &[
                "--bound-object-kind=Pod",
                &format!("--bound-object-name={pod}"),
                &format!("--bound-object-uid={uid}"),
            ],
        )
    }

    fn request_token(&self, namespace: &str, service_account: &str, bound: &[&str]) -> Result<String> {
        let arguments = ["create", "token", service_account, "--namespace", namespace];
        let token = self.kubectl(&[&arguments, bound].concat())?;
        Ok(token.trim().to_owned())
    }

    /// Writes `<dir>/<name>.kubeconfig` for a user, and its group if any, by a client certificate.
    pub fn write_kubeconfig(&self, name: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let files = self.authority()?.client(user, group)?;
        self.write_config(
            name,
            &json!({"client-certificate": files.certificate, "client-key": files.key}),
        )
    }

    /// Writes `<dir>/<name>.kubeconfig` for the bearer of a token.
    pub fn write_token_kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        self.write_config(name, &json!({"token": token}))
    }

    fn write_config(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let ca = self.authority()?.certificate().certificate;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bed", "cluster": {"server": self.server(), "certificate-authority": ca}}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "bed", "context": {"cluster": "bed", "user": name}}],
            "current-context": "bed",
        });
        let path = self.dir.join(format!("{name}.kubeconfig"));
        // JSON is YAML too.
        let text = serde_json::to_string_pretty(&config).context("cannot write JSON")?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

fn run(command: &mut Command, arguments: &[&str], input: Option<&str>) -> Result<String> {
    let shown = arguments.join(" ");
    let stdin = if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run kubectl")?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin
            .write_all(input.as_bytes())
            .with_context(|| format!("kubectl {shown}: it does not read its input"))?;
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("kubectl {shown}: lost"))?;
    finish(&format!("kubectl {shown}"), output)
}

/// What a command has printed; an error says what it complained of.
pub(super) fn finish(command: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{command} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command} printed no text"))
}
