//! The operator as credential provider: it keeps the credential of a NodeUpdate in a Secret, releases it once to each
//! boot of the node that it was made for, and destroys it when no session needs it any more.

use anyhow::{Context as _, Result, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use understudy_sealing::{Binding, PrivateKey};

use understudy_tests::chart::install::NAMESPACE;

use crate::operator_bed::{
    Bed, NEW, OLD, Scenario, condition, condition_of, has_finalizers, message_of, text,
};
use crate::scenarios;

pub const SCENARIOS: &[Scenario] = scenarios![
    the_credential_is_released_once_to_the_node_and_boot_that_it_was_made_for,
    the_credential_of_a_deleted_node_update_stays_while_a_session_needs_it,
    the_credential_of_what_is_taken_back_is_destroyed,
    a_credential_whose_secret_is_gone_is_refused_and_that_is_said,
];

/// One node under way: its NodeUpdate, which the agent may begin.
async fn underway(bed: &Bed, name: &str, node: &str) -> Result<Value> {
    bed.agents.join(node, OLD, json!({"scenario": name})).await?;
    bed.host_update(name, json!({"sessions": {"credentialProvider": "operator"}}))
        .await?;
    let pass = bed.pass_of(name, node).await?;
    bed.until_condition("NodeUpdate", "", &pass, "Drained", "True Drained")
        .await
}

fn name_of(update: &Value) -> String {
    text(&update["metadata"]["name"])
}

fn secret_of(update: &Value) -> String {
    format!("understudy-credential-{}", text(&update["metadata"]["uid"]))
}

/// What the agent tells of its NodeUpdate: the boot in which its one session was saved, how that is, who asks.
async fn tell(bed: &Bed, pass: &str, phase: &str, saving: &str, state: &str, request: Value) -> Result<()> {
    let ready = if phase == "Resumed" { "True" } else { "False" };
    let ended = |kind| match (phase, kind) {
        ("Resumed", "Complete") | ("Failed", "Failed") => "True",
        _ => "False",
    };
    let session = json!({"namespace": "default", "name": "web", "state": state, "checkpoint": "c"});
    let mut status = json!({"observedGeneration": 1, "phase": phase, "reason": "Played", "message": "by a test",
        "result": {"before": {"bootID": saving, "kernelRelease": OLD}, "sessions": 1, "guests": [session]},
        "conditions": [condition("Ready", ready, "Played"), condition("Complete", ended("Complete"), "Played"),
            condition("Failed", ended("Failed"), "Played")]});
    if !request.is_null() {
        status["credentialRequest"] = request;
    }
    bed.agent_writes("NodeUpdate", "", pass, status).await
}

fn request(boot: &str, key: &PrivateKey) -> Value {
    json!({"bootID": boot, "publicKey": key.public().to_string()})
}

/// The host reboots with its session saved; the boot before, and the boot after.
async fn reboots(bed: &Bed, pass: &str, node: &str) -> Result<(String, String)> {
    let saving = bed.agents.machine(node)?.boot_id;
    for phase in ["Notified", "Saving", "Acknowledged", "Rebooting"] {
        tell(bed, pass, phase, &saving, "Saved", Value::Null).await?;
    }
    bed.agents.boot(node, NEW).await?;
    Ok((saving, bed.agents.machine(node)?.boot_id))
}

async fn until_refused(bed: &Bed, pass: &str, request: &Value, words: &str) -> Result<Value> {
    let what = format!("refuse {request}: {words}");
    bed.until("NodeUpdate", "", pass, &what, |update| {
        let refusal = &update["status"]["credential"]["refusal"];
        refusal["publicKey"] == request["publicKey"]
            && refusal["bootID"] == request["bootID"]
            && text(&refusal["message"]).contains(words)
    })
    .await
}

async fn until_released(bed: &Bed, pass: &str, request: &Value) -> Result<Value> {
    let what = format!("release the credential to {request}");
    bed.until("NodeUpdate", "", pass, &what, |update| {
        let release = &update["status"]["credential"]["release"];
        release["publicKey"] == request["publicKey"] && release["bootID"] == request["bootID"]
    })
    .await
}

async fn the_credential_is_released_once_to_the_node_and_boot_that_it_was_made_for(bed: &Bed) -> Result<()> {
    let (name, node) = ("credential", "credential-node");
    let update = underway(bed, name, node).await?;
    let pass = name_of(&update);
    ensure!(
        condition_of(&update, "CredentialKept") == "True Kept",
        "{update:#}"
    );
    let secret = bed.get("Secret", NAMESPACE, &secret_of(&update)).await?;
    ensure!(
        secret["metadata"]["ownerReferences"][0]["name"] == pass,
        "of another: {:#}",
        secret["metadata"]
    );
    let kept = text(&secret["data"]["privateKey"]);
    ensure!(
        !kept.is_empty() && !update.to_string().contains(&kept),
        "the NodeUpdate tells it"
    );

    // Not in the boot in which sessions are saved.
    let (own, saving) = (PrivateKey::generate()?, bed.agents.machine(node)?.boot_id);
    let early = request(&saving, &own);
    tell(bed, &pass, "Notified", &saving, "Waiting", early.clone()).await?;
    until_refused(bed, &pass, &early, "after the host's reboot only").await?;

    let (saving, next) = reboots(bed, &pass, node).await?;
    // Nor to a boot that is not the host's.
    let foreign = request("another", &own);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", foreign).await?;
    let asked = request(&next, &own);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", asked.clone()).await?;
    let update = until_released(bed, &pass, &asked).await?;
    let credential = &update["status"]["credential"];
    ensure!(credential["release"]["count"] == 1, "{credential:#}");
    ensure!(
        condition_of(&update, "CredentialKept") == "True Released",
        "{update:#}"
    );
    let (uid, node_uid) = (
        text(&update["metadata"]["uid"]),
        text(&update["status"]["nodeUID"]),
    );
    let sealed = text(&credential["release"]["sealedCredential"]);
    let binding = Binding::release(&uid, &node_uid, &node_uid, &next);
    let opened = own.open(&sealed, &binding).context("what was released")?;
    let opened = PrivateKey::from_slice(&opened).context("a key")?;
    ensure!(
        opened.public().to_string() == text(&credential["publicKey"]),
        "another credential"
    );
    ensure!(
        PrivateKey::generate()?.open(&sealed, &binding).is_err(),
        "anybody opens it"
    );

    // In the same boot nobody else is given it, by the operator or by the API server.
    let other = request(&next, &PrivateKey::generate()?);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", other.clone()).await?;
    let update = until_refused(bed, &pass, &other, "released already, to another key").await?;
    ensure!(
        update["status"]["credential"]["release"]["publicKey"] == asked["publicKey"],
        "{update:#}"
    );
    let stolen = json!({"status": {"credential": {"release": {"publicKey": other["publicKey"]}}}});
    let refused = bed
        .api("NodeUpdate", "")
        .patch_status(&pass, &PatchParams::default(), &Patch::Merge(stolen))
        .await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|error| error.to_string().contains("once")),
        "{refused:?}"
    );

    // The host goes down again before its session goes on.
    bed.agents.boot(node, NEW).await?;
    let (own, later) = (PrivateKey::generate()?, bed.agents.machine(node)?.boot_id);
    let again = request(&later, &own);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", again.clone()).await?;
    let update = until_released(bed, &pass, &again).await?;
    ensure!(
        update["status"]["credential"]["release"]["count"] == 2,
        "{update:#}"
    );

    tell(bed, &pass, "Resumed", &saving, "Resumed", again).await?;
    bed.until_gone("Secret", NAMESPACE, &secret_of(&update)).await?;
    let update = bed
        .until_condition("NodeUpdate", "", &pass, "CredentialKept", "False Destroyed")
        .await?;
    ensure!(
        message_of(&update, "CredentialKept").contains("no session needs"),
        "{update:#}"
    );
    bed.until_free(node).await?;
    bed.until("NodeUpdate", "", &pass, "be let go", |update| {
        !has_finalizers(update)
    })
    .await?;
    Ok(())
}

async fn the_credential_of_a_deleted_node_update_stays_while_a_session_needs_it(bed: &Bed) -> Result<()> {
    let (name, node) = ("kept", "kept-node");
    let update = underway(bed, name, node).await?;
    let (pass, secret) = (name_of(&update), secret_of(&update));
    let (saving, next) = reboots(bed, &pass, node).await?;
    let own = PrivateKey::generate()?;
    let asked = request(&next, &own);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", asked.clone()).await?;
    until_released(bed, &pass, &asked).await?;
    // The kernel is the wrong one, say.
    tell(bed, &pass, "Failed", &saving, "Kept", asked).await?;
    bed.until_free(node).await?;
    // As the garbage collector does, which does not run here.
    bed.delete("HostUpdate", "", name).await?;
    bed.until_gone("HostUpdate", "", name).await?;
    bed.delete("NodeUpdate", "", &pass).await?;

    bed.agents.boot(node, OLD).await?;
    let (own, later) = (PrivateKey::generate()?, bed.agents.machine(node)?.boot_id);
    let again = request(&later, &own);
    tell(bed, &pass, "Failed", &saving, "Saved", again.clone()).await?;
    until_released(bed, &pass, &again).await?;
    ensure!(bed.is_there("Secret", NAMESPACE, &secret).await?, "it is gone");
    tell(bed, &pass, "Failed", &saving, "Resumed", again).await?;
    bed.until_gone("NodeUpdate", "", &pass).await?;
    bed.until_gone("Secret", NAMESPACE, &secret).await
}

async fn the_credential_of_what_is_taken_back_is_destroyed(bed: &Bed) -> Result<()> {
    let (name, node) = ("taken-back", "taken-back-node");
    bed.namespace(name).await?;
    bed.agents.join(node, OLD, json!({"scenario": name})).await?;
    bed.pod(name, "stuck", node, json!({})).await?;
    bed.host_update(name, json!({"sessions": {"credentialProvider": "operator"}}))
        .await?;
    let pass = bed.pass_of(name, node).await?;
    let update = bed
        .until_condition("NodeUpdate", "", &pass, "CredentialKept", "True Kept")
        .await?;
    let secret = secret_of(&update);
    ensure!(
        bed.is_there("Secret", NAMESPACE, &secret).await?,
        "it was not made"
    );
    bed.delete("HostUpdate", "", name).await?;
    bed.until_gone("NodeUpdate", "", &pass).await?;
    bed.until_gone("Secret", NAMESPACE, &secret).await?;
    bed.until_free(node).await
}

async fn a_credential_whose_secret_is_gone_is_refused_and_that_is_said(bed: &Bed) -> Result<()> {
    let (name, node) = ("secret-gone", "secret-gone-node");
    let update = underway(bed, name, node).await?;
    let (pass, secret) = (name_of(&update), secret_of(&update));
    let (saving, next) = reboots(bed, &pass, node).await?;
    bed.delete("Secret", NAMESPACE, &secret).await?;
    let asked = request(&next, &PrivateKey::generate()?);
    tell(bed, &pass, "LoggingOn", &saving, "Saved", asked.clone()).await?;
    let update = until_refused(bed, &pass, &asked, &secret).await?;
    ensure!(
        condition_of(&update, "CredentialKept") == "False CredentialRefused",
        "{update:#}"
    );
    tell(bed, &pass, "Failed", &saving, "Lost", asked).await?;
    bed.until_free(node).await
}
