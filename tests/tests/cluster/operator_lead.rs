//! Who leads: a leader with nothing to do writes nothing, and when it ends another goes on where it was.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use understudy_tests::cluster::Context;
use understudy_tests::operator::{Audit, Installed, Operator, USER};

use crate::operator_bed::{Bed, OLD, condition_of, is_over, message_of};

const NS: &str = "lead";
/// Nodes, and guests on each.
const NODES: usize = 12;
const GUESTS: usize = 15;
const ROLLOUT: &str = "lead-rollout";

pub fn operator_writes_nothing_in_a_steady_state_and_another_takes_over(context: &Context) -> Result<()> {
    let installed = Installed::start(&context.dir.join("own"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let bed = runtime.block_on(async {
        let bed = Bed::new(Client::try_from(installed.plane.admin().await?)?);
        fill(&bed).await?;
        cannot_be_read(&bed).await?;
        anyhow::Ok(bed)
    })?;
    context.say("guests, nodes, and objects that nobody can read");
    let mut first = installed.operator("first", &[])?;
    first.wait_until_it_leads()?;
    let mut second = installed.operator("second", &[])?;
    runtime.block_on(async {
        is_assigned(&bed).await?;
        is_told_that_it_cannot_be_read(&bed).await
    })?;
    context.say("everything is assigned, and what cannot be read says so");
    runtime.block_on(is_steady(&bed, &first, &installed))?;
    context.say("nothing is written in a steady state");

    // The leader dies in the middle of a rollout; what is asked meanwhile is done by the next.
    let pass = runtime.block_on(async {
        bed.host_update(ROLLOUT, json!({})).await?;
        bed.pass_of(ROLLOUT, "lead-0").await
    })?;
    ensure!(second.metric("understudy_operator_leading")? == 0.0, "two lead");
    first.kill()?;
    runtime.block_on(async {
        for node in 0..NODES {
            bed.reboot(NS, &format!("r-{node}"), &guest(node, 0), json!({}))
                .await?;
        }
        anyhow::Ok(())
    })?;
    second.wait_until_it_leads()?;
    context.say("killed, and the second leads");
    runtime.block_on(async {
        for node in 0..NODES {
            let name = format!("r-{node}");
            bed.until_condition("SeamlessReboot", NS, &name, "Accepted", "True Assigned")
                .await?;
        }
        bed.update_node(&pass, "lead-0").await?;
        bed.until_free("lead-0").await?;
        bed.pass_of(ROLLOUT, "lead-1").await
    })?;

    // The leader is asked to end: it gives the lease back.
    let mut third = installed.operator("third", &[])?;
    let status = second.terminate()?;
    ensure!(status.success(), "it did not end in order: {status}");
    third.wait_until_it_leads()?;
    context.say("asked to end, and the third leads");
    let log = std::fs::read_to_string(installed.plane.dir().join("second.log"))?;
    ensure!(
        log.contains("the lease was given back"),
        "it kept the lease: {log}"
    );
    runtime.block_on(async {
        for node in 1..3 {
            let node = format!("lead-{node}");
            let pass = bed.pass_of(ROLLOUT, &node).await?;
            let passes = bed.passes(ROLLOUT).await?;
            ensure!(
                passes.iter().filter(|pass| !is_over(pass)).count() == 1,
                "more than maxUnavailable"
            );
            bed.update_node(&pass, &node).await?;
            bed.until_free(&node).await?;
        }
        bed.until_condition("HostUpdate", "", ROLLOUT, "Ready", "True AlreadySatisfied")
            .await?;
        is_steady(&bed, &third, &installed).await
    })?;
    nothing_was_done_twice(&installed.audit()?)?;
    ensure!(third.terminate()?.success(), "it did not end in order");
    installed.plane.stop()
}

fn guest(node: usize, number: usize) -> String {
    format!("g-{node}-{number}")
}

/// Three nodes of the rollout among others, and guests on all, of which half run.
async fn fill(bed: &Bed) -> Result<()> {
    bed.namespace(NS).await?;
    for node in 0..NODES {
        let labels = if node < 3 {
            json!({"scenario": ROLLOUT})
        } else {
            json!({})
        };
        bed.agents.join(&format!("lead-{node}"), OLD, labels).await?;
        for number in 0..GUESTS {
            bed.guest(NS, &guest(node, number), Some(&format!("lead-{node}")))
                .await?;
        }
    }
    // What rests: finished, paused, waiting for good.
    bed.reboot(NS, "waits", "nobody", json!({})).await?;
    bed.host_update("lead-paused", json!({"paused": true, "nodeSelector": {}}))
        .await
}

async fn is_assigned(bed: &Bed) -> Result<()> {
    for node in 0..NODES {
        for number in 0..GUESTS {
            let name = guest(node, number);
            bed.until_condition("Guest", NS, &name, "Accepted", "True Assigned")
                .await?;
            if number % 2 == 0 {
                let status = json!({"observedGeneration": 1, "phase": "Running", "conditions": []});
                bed.agent_writes("Guest", NS, &name, status).await?;
            }
        }
    }
    Ok(())
}

/// Objects that were stored when CRDs were laxer: a number where a text is expected, a value that nobody knows.
async fn cannot_be_read(bed: &Bed) -> Result<()> {
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let status = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties";
    let lax = json!({"x-kubernetes-preserve-unknown-fields": true});
    let fields = [
        ("guests", format!("{spec}/runStrategy")),
        ("hosts", format!("{status}/bootedAt")),
    ];
    let crds = crate::link_server::api(
        &bed.admin,
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
        None,
    );
    let set = async |crd: &str, path: &str, value: Value| {
        let name = format!("{crd}.understudy.dev");
        let mut there = crds.get(&name).await?;
        let field = there.data.pointer_mut(path).context("no such field")?;
        let before = std::mem::replace(field, value);
        crds.replace(&name, &PostParams::default(), &there).await?;
        anyhow::Ok(before)
    };
    let mut strict = Vec::new();
    for (crd, path) in &fields {
        strict.push(set(crd, path, lax.clone()).await?);
    }
    // The laxer schema takes a moment to be the one that is asked.
    let disks = json!([{"name": "root", "role": "Root", "source": "x.img"}]);
    let wrong = [(
        "unknown",
        json!({"nodeName": "lead-0", "memory": "512Mi", "disks": disks, "runStrategy": "Sometimes"}),
    )];
    for (name, spec) in wrong {
        bed.until_true("the laxer schema", async || {
            Ok(bed.make("Guest", NS, name, spec.clone()).await.is_ok())
        })
        .await?;
    }
    bed.make("Host", "", "unreadable", json!({})).await?;
    bed.until_true("the laxer schema", async || {
        let status = json!({"status": {"observedGeneration": 1, "bootedAt": 5}});
        let hosts = bed.api("Host", "");
        let written = hosts
            .patch_status("unreadable", &PatchParams::default(), &Patch::Merge(status))
            .await?;
        Ok(written.data["status"]["bootedAt"] == 5)
    })
    .await?;
    for ((crd, path), before) in fields.iter().zip(strict) {
        set(crd, path, before).await?;
    }
    // And so does the strict one.
    bed.until_true("the strict schema", async || {
        let spec =
            json!({"nodeName": "lead-0", "memory": "512Mi", "disks": disks, "runStrategy": "Sometimes"});
        let made = bed.make("Guest", NS, "too-late", spec).await;
        if made.is_ok() {
            bed.delete("Guest", NS, "too-late").await?;
        }
        Ok(made.is_err_and(|error| {
            let said = format!("{error:#}");
            said.contains("runStrategy")
        }))
    })
    .await
}

async fn is_told_that_it_cannot_be_read(bed: &Bed) -> Result<()> {
    for (kind, ns, name, words) in [
        ("Guest", NS, "unknown", "Sometimes"),
        ("Host", "", "unreadable", "cannot be read"),
    ] {
        let there = bed
            .until_condition(kind, ns, name, "Stalled", "True Invalid")
            .await?;
        ensure!(condition_of(&there, "Ready") == "False Invalid", "{there:#}");
        ensure!(message_of(&there, "Stalled").contains(words), "{there:#}");
    }
    // Corrected, it is as any other; one that nobody corrects can be deleted.
    for (name, right) in [("unknown", json!({"runStrategy": "Always"}))] {
        bed.patch("Guest", NS, name, json!({"spec": right})).await?;
        bed.until_condition("Guest", NS, name, "Accepted", "True Assigned")
            .await?;
        bed.until_condition("Guest", NS, name, "Stalled", "False Assigned")
            .await?;
    }
    bed.delete("Host", "", "unreadable").await?;
    bed.until_gone("Host", "", "unreadable").await
}

/// Resource versions of all that is ours, but for Hosts: these change with each heartbeat.
async fn versions(bed: &Bed) -> Result<BTreeMap<String, String>> {
    let mut versions = BTreeMap::new();
    for (kind, namespace) in [
        ("Guest", NS),
        ("SeamlessReboot", NS),
        ("HostUpdate", ""),
        ("NodeUpdate", ""),
        ("Node", ""),
    ] {
        for object in bed.api(kind, namespace).list(&ListParams::default()).await? {
            let name = format!("{kind} {}", object.name_any());
            versions.insert(name, object.resource_version().unwrap_or_default());
        }
    }
    Ok(versions)
}

/// Once it has come to rest, nothing is written while every agent speaks five times.
async fn is_steady(bed: &Bed, leader: &Operator, installed: &Installed) -> Result<()> {
    let beats = async |count: usize| {
        let until = bed.agents.beats() + u64::try_from(count * NODES)?;
        bed.until_true("heartbeats", async || Ok(bed.agents.beats() >= until))
            .await
    };
    let mut before = versions(bed).await?;
    bed.until_true("the operator to rest", async || {
        let writes = leader.metric("understudy_operator_writes_total")?;
        beats(1).await?;
        Ok(leader.metric("understudy_operator_writes_total")? == writes)
    })
    .await?;
    before.clear();
    before.extend(versions(bed).await?);
    let writes = leader.metric("understudy_operator_writes_total")?;
    let audited = installed.audit()?.writes_of(USER);
    beats(5).await?;
    let after = versions(bed).await?;
    ensure!(
        before == after,
        "something was written: {before:?}, then {after:?}"
    );
    let since = leader.metric("understudy_operator_writes_total")? - writes;
    ensure!(since == 0.0, "{since} writes by its own count");
    let now = installed.audit()?.writes_of(USER);
    ensure!(now.len() == audited.len(), "written: {:?}", &now[audited.len()..]);
    ensure!(
        bed.agents.beats() > 0 && leader.metric("understudy_operator_leading")? == 1.0,
        "nobody leads"
    );
    Ok(())
}

/// No object was made a second time, no Pod or node was asked for what was done.
fn nothing_was_done_twice(audit: &Audit) -> Result<()> {
    let writes = audit.writes_of(USER);
    let made: Vec<&str> = writes
        .iter()
        .filter(|write| write.verb == "create" && write.resource == "nodeupdates" && write.code == 201)
        .map(|write| write.name.as_str())
        .collect();
    let once: BTreeSet<&str> = made.iter().copied().collect();
    ensure!(made.len() == once.len(), "made twice: {made:?}");
    ensure!(made.len() == 3, "one pass for each node: {made:?}");
    for node in 0..3 {
        let node = format!("lead-{node}");
        let cordons = writes
            .iter()
            .filter(|write| write.resource == "nodes" && write.name == node && write.code == 200);
        ensure!(
            cordons.count() == 2,
            "{node} is cordoned once and uncordoned once"
        );
    }
    let finalizers = |name: &str| {
        let all = writes.iter().filter(|write| {
            write.resource == "seamlessreboots" && write.verb == "patch" && write.name == name
        });
        all.filter(|write| write.code == 200).count()
    };
    for node in 0..NODES {
        ensure!(
            finalizers(&format!("r-{node}")) == 1,
            "r-{node} was kept more than once"
        );
    }
    Ok(())
}
