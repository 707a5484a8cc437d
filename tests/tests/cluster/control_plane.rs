//! The control plane itself: what other tests rely on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use understudy_tests::bed::wait_until;
use understudy_tests::cluster::Context;
use understudy_tests::control_plane::{ControlPlane, Options, is_up};

pub fn a_token_names_the_node_of_its_pod(context: &Context) -> Result<()> {
    context.kubectl(&["create", "serviceaccount", "agent"])?;
    let plane = context.plane;
    let claims = |token: &str| -> Result<serde_json::Value> {
        let config = plane.write_token_kubeconfig("token-test", token)?;
        let mut who = plane.kubectl_command_as(&config)?;
        let output = who
            .args(["auth", "whoami", "--output=json"])
            .output()
            .context("cannot run kubectl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl auth whoami: {said}");
        let review: serde_json::Value = serde_json::from_slice(&output.stdout).context("no JSON")?;
        Ok(review["status"]["userInfo"].clone())
    };
    let node = "authentication.kubernetes.io/node-name";
    let bound = plane.token_on_node(&context.namespace, "agent", "node-a")?;
    let user = claims(&bound)?;
    let name = format!("system:serviceaccount:{}:agent", context.namespace);
    ensure!(user["username"] == name.as_str(), "{user}");
    ensure!(user["extra"][node] == json!(["node-a"]), "{user}");
    let free = claims(&plane.token(&context.namespace, "agent")?)?;
    ensure!(free["extra"][node].is_null(), "{free}");
    // It ends with its Pod, as the agent's does.
    context.kubectl(&["delete", "pod", "agent-node-a", "--grace-period=0", "--force"])?;
    // The API server believes for ten seconds what it has found once.
    wait_until(
        "the token to end with its Pod",
        Duration::from_secs(60),
        Duration::from_millis(500),
        || Ok(claims(&bound).is_err().then_some(())),
    )?;
    claims(&plane.token(&context.namespace, "agent")?)?;
    Ok(())
}

pub fn an_api_server_that_was_away_has_lost_nothing(context: &Context) -> Result<()> {
    let dir = context.dir.join("own");
    let mut plane = ControlPlane::start(&dir, Options::default())?;
    plane.kubectl(&["create", "configmap", "kept", "--from-literal=a=b"])?;
    let server = plane.server();
    plane.kill_api_server()?;
    ensure!(
        plane.kubectl(&["get", "configmap", "kept"]).is_err(),
        "it still answers"
    );
    plane.start_api_server()?;
    ensure!(plane.server() == server, "its address has changed");
    plane.kubectl(&["get", "configmap", "kept"])?;
    context.say("killed and back");
    plane.stop()?;
    ensure!(!is_up(&dir), "something still runs in {}", dir.display());
    // Again in the same folder, with controllers: what was stored is there.
    let options = Options {
        controllers: true,
        ..Options::default()
    };
    let plane = ControlPlane::start(&dir, options)?;
    plane.kubectl(&["get", "configmap", "kept"])?;
    context.say("started again with controllers");
    drop(plane);
    ensure!(!is_up(&dir), "something still runs in {}", dir.display());
    // A store is 100 MB; the logs stay.
    std::fs::remove_dir_all(dir.join("etcd")).context("cannot remove what etcd has stored")
}
