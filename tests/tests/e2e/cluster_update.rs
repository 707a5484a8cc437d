//! A host of a cluster is rebooted, and the operator keeps what opens its guests' sessions meanwhile.

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::demo::{MAC, guest_manifest};
use understudy_tests::e2e::Context;
use understudy_tests::load::Count;
use understudy_tests::machine::{Machine, condition_is, find};
use understudy_tests::{pair, updates};

use crate::cluster::{BOOT_LIMIT, Cluster, NAMESPACE, NODE, POLL, SOON};
use crate::guest::GUEST;
use crate::host::LIMIT;

const UPDATE: &str = "credential";

/// The API server is away when the host is back: the agent waits for the credential and says so, and the session goes on
/// as soon as the operator has released it. Then it is destroyed.
pub fn a_host_update_resumes_with_the_credential_that_the_operator_keeps(context: &Context) -> Result<()> {
    let mut machine = Machine::in_node(context.stage, &context.binaries);
    machine.clear()?;
    machine.place_disk("web.img")?;
    let mut cluster = Cluster::start(context)?;
    machine.start_agent_on_cluster(&cluster.access()?)?;
    let manifest = guest_manifest(GUEST, MAC, &format!("  nodeName: {NODE}\n"));
    cluster.plane.apply(&manifest)?;
    let address = machine.wait_for_guest(GUEST, BOOT_LIMIT)?;
    let ssh = machine.guest(&address);
    ssh.wait(BOOT_LIMIT, || Ok(()))?;
    let guest = pair::Guest {
        name: GUEST,
        address,
        ssh,
    };
    let life = guest.life()?;
    let mut count = Count::start(&machine, &guest.address)?;
    count.mark("update")?;
    context.say("the guest serves");

    let expect = format!("bootedAfter: {:.0}", Timestamp::now());
    let manifest = updates::manifest(UPDATE, None, Some(&expect));
    cluster.plane.apply(&format!(
        "{manifest}  sessions:\n    credentialProvider: operator\n"
    ))?;
    let update = wait_until("the host's reboot to be asked for", LIMIT, POLL, || {
        let all = cluster.plane.get(&["nodeupdates"])?;
        let update = all["items"][0].clone();
        ensure!(!updates::is_over(&update), "{}", updates::explain(&update));
        Ok((update["status"]["phase"] == "Rebooting").then_some(update))
    })?;
    ensure!(
        condition_is(&update, "CredentialKept", "True"),
        "{}",
        update["status"]
    );
    let uid = update["metadata"]["uid"].as_str().unwrap_or_default();
    let secret = format!("secret/understudy-credential-{uid}");
    cluster
        .plane
        .get(&[&secret, "--namespace", NAMESPACE])
        .context("the credential is not there")?;
    cluster.plane.kill_api_server()?;
    context.say("the session is saved, the host goes down, and the API server is away");

    let of = |status: &Value| updates::of_host_update(status, UPDATE);
    let waits = updates::until(
        &machine,
        "the agent to wait for the credential",
        LIMIT,
        of,
        |update| update["status"]["reason"] == "AwaitingCredential",
    )?;
    ensure!(
        waits["status"]["phase"] == "LoggingOn",
        "{}",
        updates::explain(&waits)
    );
    // The link tells of the API server when it has tried to reach it.
    let waits = updates::until(
        &machine,
        "the agent to say for what it waits",
        LIMIT,
        of,
        |update| {
            let message = update["status"]["message"].as_str().unwrap_or_default();
            message.contains("does not answer")
        },
    )?;
    context.say(&updates::explain(&waits));
    let there = find(&machine.status()?, "Guest", GUEST).context("the guest is gone")?;
    ensure!(there["status"]["phase"] == "Saved", "it is {}", there["status"]);

    cluster.plane.start_api_server()?;
    cluster.operator.restart_where_ended()?;
    updates::resumed(updates::ended(&machine, LIMIT, of, |_| {})?)?;
    guest.ssh.forget();
    guest.ssh.wait(SOON, || Ok(()))?;
    ensure!(guest.life()? == life, "the guest's session did not go on");
    let count = count.finish()?;
    let seen = count.phases.get("update").context("nothing was watched")?;
    ensure!(seen.is_unbroken(), "{seen:?}; {:?}", count.faults);
    context.say("the guest's session went on");

    let plane = &cluster.plane;
    wait_until("the credential to be destroyed", SOON, POLL, || {
        let there = plane.kubectl(&["get", &secret, "--namespace", NAMESPACE, "--ignore-not-found"])?;
        Ok(there.trim().is_empty().then_some(()))
    })?;
    let update = wait_until("the NodeUpdate to say so", SOON, POLL, || {
        let all = plane.get(&["nodeupdates"])?;
        let update = all["items"][0].clone();
        Ok(condition_is(&update, "CredentialKept", "False").then_some(update))
    })?;
    let (status, release) = (&update["status"], &update["status"]["credential"]["release"]);
    ensure!(
        status["phase"] == "Resumed" && release["count"] == 1,
        "{}: {release}",
        updates::explain(&update)
    );
    ensure!(
        release["bootID"] == status["result"]["after"]["bootID"],
        "{status}"
    );
    context.say(
        plane
            .kubectl(&["get", "hostupdates,nodeupdates,guests"])?
            .trim_end(),
    );
    machine.clear()
}
