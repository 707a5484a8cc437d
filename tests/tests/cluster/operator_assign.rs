//! What the operator says of Guests and SeamlessReboots, from an unknown node to the end of one.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kube::api::DeleteParams;
use serde_json::{Value, json};
use understudy_api::guest::asked_reboot_name;

use crate::operator_bed::{Agent, Bed, condition, has, until};

/// Guests: what is in the way of an assignment, the assignment, an agent that falls silent, and the end.
pub async fn guests(bed: &Arc<Bed>) -> Result<()> {
    bed.guest("astray", Some("nowhere")).await?;
    bed.guest("anywhere", None).await?;
    let is = |reason: &'static str| move |status: &Value| has(status, "Accepted", "False", reason);
    bed.until("Guest", "astray", "NodeNotFound", is("NodeNotFound"))
        .await?;
    bed.until("Guest", "anywhere", "NodeRequired", is("NodeRequired"))
        .await?;

    let uid = bed.node("alpha", json!({})).await?;
    bed.guest("web", Some("alpha")).await?;
    bed.until("Guest", "web", "NoAgent", is("NoAgent")).await?;
    let agent = Agent::start(bed, "alpha", &uid).await?;
    let web = bed
        .until("Guest", "web", "its assignment", |status| {
            has(status, "Accepted", "True", "Assigned") && has(status, "AgentAvailable", "True", "AgentLives")
        })
        .await?;
    ensure!(web.data["status"]["nodeName"] == "alpha" && web.data["status"]["nodeUID"] == uid.as_str());
    ensure!(web.metadata.finalizers == Some(vec!["understudy.dev/guest".to_owned()]));
    let running = |extra: Value| {
        let mut status = json!({"phase": "Running", "conditions": [condition("Ready", "True", "Running")]});
        if let (Some(fields), Some(more)) = (status.as_object_mut(), extra.as_object()) {
            fields.extend(more.clone());
        }
        status
    };
    agent.writes("Guest", "web", running(json!({}))).await?;

    // It asks for its reboot, twice; what was deleted is not made again.
    let ask = |id: &str| {
        let request = json!({"id": id, "reason": "a new kernel", "requestedAt": "2026-01-01T00:00:00Z",
            "seamlessReboot": asked_reboot_name("web", id)});
        running(json!({"rebootRequest": request}))
    };
    let reboots = bed.ours("SeamlessReboot");
    let (first, second) = ("11111111-a", "22222222-b");
    for id in [first, second] {
        agent.writes("Guest", "web", ask(id)).await?;
        let name = asked_reboot_name("web", id);
        bed.until("SeamlessReboot", &name, "its assignment", |status| {
            status["nodeUID"] == uid.as_str()
        })
        .await?;
        let over = json!({"phase": "Failed", "conditions": [condition("Failed", "True", "Test")]});
        agent.writes("SeamlessReboot", &name, over).await?;
        reboots.delete(&name, &DeleteParams::default()).await?;
        bed.until_gone(&reboots, &name).await?;
    }
    let marks = web_marks(bed).await?;
    ensure!(
        marks == Some(second.to_owned()),
        "the Guest's annotation says {marks:?}"
    );
    ensure!(reboots.get_opt(&asked_reboot_name("web", first)).await?.is_none());

    // The agent falls silent, and speaks again.
    drop(agent);
    bed.until("Guest", "web", "AgentSilent", |status| {
        has(status, "AgentAvailable", "False", "AgentSilent")
    })
    .await?;
    ensure!(
        reboots
            .get_opt(&asked_reboot_name("web", second))
            .await?
            .is_none(),
        "made again"
    );
    let agent = Agent::start(bed, "alpha", &uid).await?;
    bed.until("Guest", "web", "AgentLives", |status| {
        has(status, "AgentAvailable", "True", "AgentLives")
    })
    .await?;

    // Deleted, it waits for its agent.
    let guests = bed.ours("Guest");
    guests.delete("web", &DeleteParams::default()).await?;
    let held = guests
        .get("web")
        .await
        .context("a deleted guest waits for its agent")?;
    ensure!(held.metadata.deletion_timestamp.is_some());
    let released = running(json!({"conditions": [condition("Released", "True", "PoweredOff")]}));
    agent.writes("Guest", "web", released).await?;
    bed.until_gone(&guests, "web").await
}

async fn web_marks(bed: &Bed) -> Result<Option<String>> {
    let web = bed.ours("Guest").get("web").await?;
    let annotations = web.metadata.annotations.unwrap_or_default();
    Ok(annotations.get("understudy.dev/answered-reboot-request").cloned())
}

/// Reboots: of nobody, of a guest without a node, and their time to live.
pub async fn reboots(bed: &Arc<Bed>) -> Result<()> {
    let spec = json!({"guestName": "nobody", "timeouts": {"pending": "3s"}, "ttlSecondsAfterFinished": 2});
    bed.make("SeamlessReboot", "of-nobody", spec).await?;
    let reason = |reason: &'static str, phase: &'static str| {
        move |status: &Value| status["phase"] == phase && status["reason"] == reason
    };
    bed.until(
        "SeamlessReboot",
        "of-nobody",
        "Pending",
        reason("GuestNotFound", "Pending"),
    )
    .await?;
    bed.until(
        "SeamlessReboot",
        "of-nobody",
        "Failed",
        reason("GuestNotFound", "Failed"),
    )
    .await?;
    bed.until_gone(&bed.ours("SeamlessReboot"), "of-nobody").await?;

    bed.guest("homeless", None).await?;
    bed.make("SeamlessReboot", "of-homeless", json!({"guestName": "homeless"}))
        .await?;
    bed.until(
        "SeamlessReboot",
        "of-homeless",
        "GuestNotAssigned",
        reason("GuestNotAssigned", "Pending"),
    )
    .await?;
    // Its guest finds a node: so does the reboot.
    let uid = bed.node("late", json!({})).await?;
    let _agent = Agent::start(bed, "late", &uid).await?;
    bed.merge(
        &bed.ours("Guest"),
        "homeless",
        json!({"spec": {"nodeName": "late"}}),
    )
    .await?;
    bed.until("SeamlessReboot", "of-homeless", "its assignment", |status| {
        status["nodeName"] == "late"
    })
    .await?;
    Ok(())
}

/// Nodes that are replaced, out of service, or deleted: what was on them is let go.
pub async fn lost_nodes(bed: &Arc<Bed>) -> Result<()> {
    let nodes = bed.core("v1", "Node", None);
    let guests = bed.ours("Guest");
    for (node, kind, reason) in [
        ("replaced", "Accepted", "NodeReplaced"),
        ("dead", "AgentAvailable", "NodeOutOfService"),
        ("deleted", "Accepted", "NodeNotFound"),
    ] {
        let uid = bed.node(node, json!({})).await?;
        let agent = Agent::start(bed, node, &uid).await?;
        bed.guest(node, Some(node)).await?;
        bed.until("Guest", node, "its assignment", |status| {
            status["nodeUID"] == uid.as_str()
        })
        .await?;
        agent
            .writes(
                "Guest",
                node,
                json!({"phase": "Running", "conditions": [condition("Ready", "True", "Running")]}),
            )
            .await?;
        bed.make("SeamlessReboot", node, json!({"guestName": node}))
            .await?;
        bed.until("SeamlessReboot", node, "its assignment", |status| {
            status["nodeUID"] == uid.as_str()
        })
        .await?;
        agent
            .writes(
                "SeamlessReboot",
                node,
                json!({"phase": "Cloning", "conditions": [condition("Ready", "False", "InProgress")]}),
            )
            .await?;
        drop(agent);
        if node == "dead" {
            let taint = json!({"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"});
            bed.merge(&nodes, node, json!({"spec": {"taints": [taint]}}))
                .await?;
        } else {
            nodes.delete(node, &DeleteParams::default()).await?;
            bed.until_gone(&nodes, node).await?;
        }
        if node == "replaced" {
            bed.node(node, json!({})).await?;
        }
        until(&format!("what becomes of what was on node {node}"), async || {
            let status = guests.get(node).await?.data["status"].clone();
            Ok(match has(&status, kind, "False", reason) {
                true => Ok(()),
                false => Err(status.to_string()),
            })
        })
        .await?;
        for kind in ["SeamlessReboot", "Guest"] {
            let api = bed.ours(kind);
            api.delete(node, &DeleteParams::default()).await?;
            bed.until_gone(&api, node).await?;
        }
    }
    Ok(())
}

/// A host that goes down by itself has a NodeUpdate made for it, once.
pub async fn hosts_own(bed: &Arc<Bed>) -> Result<()> {
    let uid = bed.node("down", json!({})).await?;
    let agent = Agent::start(bed, "down", &uid).await?;
    let name = "host-0a1b2c3d";
    let asked = json!({"reason": "reboot", "requestedAt": "2026-01-01T00:00:00Z", "nodeUpdate": name});
    agent.says("rebootRequest", asked);
    let updates = bed.ours("NodeUpdate");
    bed.until("NodeUpdate", name, "to be made", |_| true).await?;
    let made = updates.get(name).await?;
    let spec = &made.data["spec"];
    ensure!(
        spec["nodeName"] == "down" && spec["origin"] == "Host" && spec["reason"] == "reboot",
        "{spec}"
    );
    let over = json!({"phase": "Resumed", "reason": "SessionsResumed", "conditions": [condition("Complete", "True", "Test")]});
    agent.writes("NodeUpdate", name, over).await?;
    let hosts = bed.ours("Host");
    until("the Host to say so", async || {
        let annotations = hosts.get("down").await?.metadata.annotations.unwrap_or_default();
        Ok(match annotations.values().any(|made| made == name) {
            true => Ok(()),
            false => Err(format!("{annotations:?}")),
        })
    })
    .await?;
    updates.delete(name, &DeleteParams::default()).await?;
    bed.until_gone(&updates, name).await?;
    // It asks for another: the first is not made again.
    let other = "host-4e5f";
    let asked = json!({"reason": "reboot", "requestedAt": "2026-01-02T00:00:00Z", "nodeUpdate": other});
    agent.says("rebootRequest", asked);
    bed.until("NodeUpdate", other, "to be made", |_| true).await?;
    ensure!(updates.get_opt(name).await?.is_none(), "{name} was made again");
    Ok(())
}

/// An object that cannot be read says so, and the next one does not wait for it.
pub async fn malformed(bed: &Arc<Bed>) -> Result<()> {
    // As an earlier version of the CRD might have let it pass.
    let crds = bed.core("apiextensions.k8s.io/v1", "CustomResourceDefinition", None);
    let name = "guests.understudy.dev";
    let strict = crds.get(name).await?;
    let mut lax = strict.clone();
    let schema = &mut lax.data["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let strategy = &mut schema["properties"]["spec"]["properties"]["runStrategy"];
    ensure!(strategy["enum"].is_array(), "the field has no values: {strategy}");
    strategy.as_object_mut().map(|fields| fields.remove("enum"));
    crds.replace(name, &Default::default(), &lax).await?;
    let disk = json!({"name": "root", "role": "Root", "source": "odd.img"});
    let spec = json!({"memory": "512Mi", "disks": [disk], "runStrategy": "Sometimes", "nodeName": "nowhere"});
    until("the lax CRD", async || {
        Ok(bed
            .make("Guest", "odd", spec.clone())
            .await
            .map(drop)
            .map_err(|error| format!("{error:#}")))
    })
    .await?;
    let mut again = crds.get(name).await?;
    again.data["spec"] = strict.data["spec"].clone();
    crds.replace(name, &Default::default(), &again).await?;
    let told = bed
        .until("Guest", "odd", "Stalled", |status| {
            has(status, "Stalled", "True", "Invalid")
        })
        .await?;
    ensure!(
        told.data["status"].to_string().contains("Sometimes"),
        "{}",
        told.data["status"]
    );
    bed.guest("even", Some("nowhere")).await?;
    bed.until("Guest", "even", "NodeNotFound", |status| {
        has(status, "Accepted", "False", "NodeNotFound")
    })
    .await?;
    bed.ours("Guest").delete("odd", &DeleteParams::default()).await?;
    bed.until_gone(&bed.ours("Guest"), "odd").await
}

/// Where nothing changes nothing is written, however often agents speak.
pub async fn steady(bed: &Arc<Bed>) -> Result<()> {
    let uid = bed.node("steady", json!({})).await?;
    let agent = Agent::start(bed, "steady", &uid).await?;
    for number in 0..20 {
        let name = format!("steady-{number}");
        bed.guest(&name, Some("steady")).await?;
        bed.until("Guest", &name, "its assignment", |status| {
            status["nodeUID"] == uid.as_str()
        })
        .await?;
        agent
            .writes(
                "Guest",
                &name,
                json!({"phase": "Running", "conditions": [condition("Ready", "True", "Running")]}),
            )
            .await?;
    }
    // The operator sees the last claim and lets go; then five heartbeats without a write.
    let beats = |after: u64| {
        let agent = &agent;
        async move {
            until("heartbeats", async || {
                Ok(if agent.beats() >= after {
                    Ok(())
                } else {
                    Err(agent.beats().to_string())
                })
            })
            .await
        }
    };
    until("the operator's last write", async || {
        let before = bed.writes()?;
        beats(agent.beats() + 5).await?;
        let after = bed.writes()?;
        Ok(match after.len() == before.len() {
            true => Ok(()),
            false => Err(format!("{:?}", &after[before.len()..])),
        })
    })
    .await
}
