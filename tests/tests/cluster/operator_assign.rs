//! Guests and SeamlessReboots find their nodes, and are let go when these are lost.

use anyhow::{Result, ensure};
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use understudy_tests::demo::REBOOT_PHASES;

use crate::operator_bed::{Bed, OLD, Scenario, condition, condition_of, has_finalizers, message_of, owners};
use crate::scenarios;

pub const SCENARIOS: &[Scenario] = scenarios![
    a_guest_waits_for_its_node_and_says_why,
    a_reboot_waits_for_its_guest_and_fails_in_time,
    a_guest_is_rebooted_again_and_its_own_request_is_answered_once,
    what_a_lost_node_had_is_let_go,
    a_host_that_goes_down_by_itself_gets_its_node_update_once,
];

async fn a_guest_waits_for_its_node_and_says_why(bed: &Bed) -> Result<()> {
    let (ns, node) = ("waits", "waits-node");
    bed.namespace(ns).await?;
    bed.guest(ns, "nowhere", None).await?;
    bed.guest(ns, "web", Some(node)).await?;
    let guest = bed
        .until_condition("Guest", ns, "nowhere", "Accepted", "False NodeRequired")
        .await?;
    ensure!(
        condition_of(&guest, "Stalled") == "True NodeRequired",
        "{guest:#}"
    );
    let guest = bed
        .until_condition("Guest", ns, "web", "Accepted", "False NodeNotFound")
        .await?;
    ensure!(
        condition_of(&guest, "Reconciling") == "True NodeNotFound",
        "{guest:#}"
    );
    ensure!(guest["status"]["phase"] == "Pending", "{guest:#}");
    ensure!(!has_finalizers(&guest), "nobody holds it: {guest:#}");

    bed.agents.node(node, OLD, json!({})).await?;
    bed.until_condition("Guest", ns, "web", "Accepted", "False NoAgent")
        .await?;
    // Told again: the same event, counted.
    bed.delete("Node", "", node).await?;
    bed.until_condition("Guest", ns, "web", "Accepted", "False NodeNotFound")
        .await?;
    let machine = bed.agents.join(node, OLD, json!({})).await?;
    let guest = bed
        .until_condition("Guest", ns, "web", "Accepted", "True Assigned")
        .await?;
    ensure!(guest["status"]["nodeName"] == node, "{guest:#}");
    ensure!(guest["status"]["nodeUID"] == machine.uid.as_str(), "{guest:#}");
    ensure!(
        guest["metadata"]["finalizers"] == json!(["understudy.dev/guest"]),
        "{guest:#}"
    );
    ensure!(
        condition_of(&guest, "AgentAvailable") == "True AgentLives",
        "{guest:#}"
    );

    // The claim: from then on its phase is the agent's, and the operator lets go of it.
    let status = json!({"observedGeneration": 1, "phase": "Running", "conditions": [condition("Ready", "True", "Running")]});
    bed.agent_writes("Guest", ns, "web", status).await?;
    bed.until("Guest", ns, "web", "be its agent's", |guest| {
        owners(guest, "phase") == ["understudy-node"]
    })
    .await?;

    bed.agents.silence(node);
    let guest = bed
        .until_condition("Guest", ns, "web", "AgentAvailable", "False AgentSilent")
        .await?;
    ensure!(guest["status"]["phase"] == "Running", "it runs on: {guest:#}");
    ensure!(condition_of(&guest, "Ready") == "True Running", "{guest:#}");
    bed.guest(ns, "late", Some(node)).await?;
    let late = bed
        .until_condition("Guest", ns, "late", "Accepted", "False AgentSilent")
        .await?;
    ensure!(late["status"]["nodeUID"].is_null(), "{late:#}");
    bed.agents.speak(node).await?;
    bed.until_condition("Guest", ns, "web", "AgentAvailable", "True AgentLives")
        .await?;
    bed.until_condition("Guest", ns, "late", "Accepted", "True Assigned")
        .await?;

    bed.until_true("events of all of it", async || {
        let events = bed.api("Event", ns).list(&ListParams::default()).await?;
        let told = |reason: &str| {
            events
                .iter()
                .any(|event| event.data["regarding"]["name"] == "web" && event.data["reason"] == reason)
        };
        Ok(
            ["NodeNotFound", "NoAgent", "Assigned", "AgentSilent", "AgentLives"]
                .iter()
                .all(|reason| told(reason)),
        )
    })
    .await
}

async fn a_reboot_waits_for_its_guest_and_fails_in_time(bed: &Bed) -> Result<()> {
    let ns = "in-time";
    bed.namespace(ns).await?;
    let soon = json!({"timeouts": {"pending": "4s"}});
    let mut short = soon.clone();
    short["ttlSecondsAfterFinished"] = json!(1);
    bed.reboot(ns, "kept", "nobody", soon).await?;
    bed.reboot(ns, "short", "nobody", short).await?;
    bed.guest(ns, "stray", Some("no-such-node")).await?;
    bed.reboot(ns, "of-stray", "stray", json!({})).await?;

    let reboot = bed
        .until_condition("SeamlessReboot", ns, "kept", "Accepted", "False GuestNotFound")
        .await?;
    ensure!(
        reboot["status"]["phase"] == "Pending" || reboot["status"]["phase"] == "Failed",
        "{reboot:#}"
    );
    let reboot = bed
        .until(
            "SeamlessReboot",
            ns,
            "of-stray",
            "say why its Guest waits",
            |reboot| {
                condition_of(reboot, "Accepted") == "False GuestNotAssigned"
                    && message_of(reboot, "Accepted").contains("no-such-node")
            },
        )
        .await?;
    ensure!(reboot["status"]["phase"] == "Pending", "{reboot:#}");

    let reboot = bed
        .until_condition("SeamlessReboot", ns, "kept", "Failed", "True GuestNotFound")
        .await?;
    ensure!(reboot["status"]["phase"] == "Failed", "{reboot:#}");
    ensure!(
        condition_of(&reboot, "Stalled") == "True GuestNotFound",
        "{reboot:#}"
    );
    ensure!(
        message_of(&reboot, "Failed").contains("timeouts.pending"),
        "{reboot:#}"
    );
    ensure!(!has_finalizers(&reboot), "{reboot:#}");
    bed.until_gone("SeamlessReboot", ns, "short").await?;
    ensure!(
        bed.is_there("SeamlessReboot", ns, "kept").await?,
        "nobody asked for its end"
    );

    // What it waits for may come.
    bed.agents.join("no-such-node", OLD, json!({})).await?;
    bed.until_condition("SeamlessReboot", ns, "of-stray", "Accepted", "True Assigned")
        .await?;
    Ok(())
}

async fn a_guest_is_rebooted_again_and_its_own_request_is_answered_once(bed: &Bed) -> Result<()> {
    let (ns, node) = ("again", "again-node");
    bed.namespace(ns).await?;
    bed.agents.join(node, OLD, json!({})).await?;
    bed.running_guest(ns, "web", node).await?;
    for name in ["first", "second"] {
        bed.reboot(ns, name, "web", json!({})).await?;
        let reboot = bed
            .until_condition("SeamlessReboot", ns, name, "Accepted", "True Assigned")
            .await?;
        ensure!(
            reboot["status"]["nodeName"] == node && has_finalizers(&reboot),
            "{reboot:#}"
        );
        for phase in REBOOT_PHASES[1..].iter().copied() {
            bed.phase("SeamlessReboot", ns, name, phase, 0).await?;
        }
        let reboot = bed
            .until("SeamlessReboot", ns, name, "be let go", |there| {
                !has_finalizers(there)
            })
            .await?;
        ensure!(reboot["status"]["phase"] == "Succeeded", "{reboot:#}");
    }

    // The guest asks for it.
    let asks = |id: &str| {
        json!({"observedGeneration": 1, "phase": "Running", "conditions": [condition("Ready", "True", "Running")],
            "rebootRequest": {"id": id, "reason": "unattended-upgrades", "requestedAt": "2026-11-27T12:00:00Z"}})
    };
    bed.agent_writes("Guest", ns, "web", asks("11111111-aaaa"))
        .await?;
    let reboot = bed
        .until_condition(
            "SeamlessReboot",
            ns,
            "web-asked-11111111",
            "Accepted",
            "True Assigned",
        )
        .await?;
    ensure!(
        reboot["spec"]["reason"] == "asked for by the guest: unattended-upgrades",
        "{reboot:#}"
    );
    bed.phase("SeamlessReboot", ns, "web-asked-11111111", "Failed", 0)
        .await?;
    bed.delete("SeamlessReboot", ns, "web-asked-11111111").await?;
    bed.until_gone("SeamlessReboot", ns, "web-asked-11111111").await?;
    // The request is there still, and the Guest is looked at for another reason.
    bed.patch("Guest", ns, "web", json!({"spec": {"priority": 7}}))
        .await?;
    is_seen(bed, ns, "web", 2).await?;
    ensure!(
        !bed.is_there("SeamlessReboot", ns, "web-asked-11111111").await?,
        "one that was deleted was made again"
    );
    bed.agent_writes("Guest", ns, "web", asks("22222222-bbbb"))
        .await?;
    bed.until_condition(
        "SeamlessReboot",
        ns,
        "web-asked-22222222",
        "Accepted",
        "True Assigned",
    )
    .await?;
    ensure!(!bed.is_there("SeamlessReboot", ns, "web-asked-11111111").await?);

    // One that may not ask gets nothing; the operator has seen it when it has seen what came after.
    bed.running_guest(ns, "mute", node).await?;
    bed.patch("Guest", ns, "mute", json!({"spec": {"onGuestRequest": "Deny"}}))
        .await?;
    bed.agent_writes("Guest", ns, "mute", asks("33333333-cccc"))
        .await?;
    bed.patch("Guest", ns, "mute", json!({"spec": {"priority": 7}}))
        .await?;
    is_seen(bed, ns, "mute", 3).await?;
    ensure!(!bed.is_there("SeamlessReboot", ns, "mute-asked-33333333").await?);
    Ok(())
}

/// Waits until the operator has seen a Guest in this generation.
async fn is_seen(bed: &Bed, ns: &str, name: &str, generation: i64) -> Result<()> {
    bed.until("Guest", ns, name, "be seen in its new generation", |guest| {
        let mut all = guest["status"]["conditions"].as_array().into_iter().flatten();
        all.any(|there| there["type"] == "Accepted" && there["observedGeneration"] == generation)
    })
    .await
    .map(drop)
}

async fn what_a_lost_node_had_is_let_go(bed: &Bed) -> Result<()> {
    let ns = "lost";
    bed.namespace(ns).await?;
    let nodes = ["lost-gone", "lost-other", "lost-out", "lost-speaks", "lost-well"];
    for node in nodes {
        bed.agents.join(node, OLD, json!({})).await?;
    }
    for node in nodes {
        bed.running_guest(ns, node, node).await?;
        bed.reboot(ns, node, node, json!({})).await?;
        bed.until_condition("SeamlessReboot", ns, node, "Accepted", "True Assigned")
            .await?;
        bed.phase("SeamlessReboot", ns, node, "Cloning", 0).await?;
    }

    // A node that was deleted, with an agent that speaks on and one that does not; and one that came as another.
    bed.agents.silence("lost-gone");
    bed.agents.silence("lost-other");
    for node in ["lost-gone", "lost-speaks", "lost-other"] {
        bed.delete("Node", "", node).await?;
    }
    bed.agents.join("lost-other", OLD, json!({})).await?;
    for (node, reason) in [
        ("lost-gone", "NodeNotFound"),
        ("lost-speaks", "NodeNotFound"),
        ("lost-other", "NodeReplaced"),
    ] {
        let guest = bed
            .until_condition("Guest", ns, node, "Stalled", &format!("True {reason}"))
            .await?;
        ensure!(guest["status"]["phase"] == "Failed", "{guest:#}");
        // An end stays what it was: between two nodes of a name there is none for a moment.
        let reboot = bed
            .until("SeamlessReboot", ns, node, "fail", |reboot| {
                ["True NodeNotFound", "True NodeReplaced"].contains(&condition_of(reboot, "Failed").as_str())
            })
            .await?;
        ensure!(
            reboot["status"]["phase"] == "Failed" && !has_finalizers(&reboot),
            "{reboot:#}"
        );
        bed.delete("Guest", ns, node).await?;
        bed.until_gone("Guest", ns, node).await?;
        bed.delete("SeamlessReboot", ns, node).await?;
        bed.until_gone("SeamlessReboot", ns, node).await?;
    }
    // The node of that name takes what is new.
    bed.guest(ns, "new", Some("lost-other")).await?;
    bed.until_condition("Guest", ns, "new", "Accepted", "True Assigned")
        .await?;

    // One that its administrator gives up.
    let taint = json!({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]}});
    bed.patch("Node", "", "lost-out", taint).await?;
    let guest = bed
        .until_condition(
            "Guest",
            ns,
            "lost-out",
            "AgentAvailable",
            "False NodeOutOfService",
        )
        .await?;
    ensure!(
        has_finalizers(&guest) && guest["status"]["phase"] == "Running",
        "{guest:#}"
    );
    for kind in ["SeamlessReboot", "Guest"] {
        bed.delete(kind, ns, "lost-out").await?;
        bed.until_gone(kind, ns, "lost-out").await?;
    }

    // Where the agent lives nothing goes without its word.
    for kind in ["SeamlessReboot", "Guest"] {
        bed.delete(kind, ns, "lost-well").await?;
    }
    // The Host of a node that is gone goes when its agent is silent, which takes its time.
    bed.until_gone("Host", "", "lost-gone").await?;
    for host in ["lost-speaks", "lost-other", "lost-well"] {
        ensure!(
            bed.is_there("Host", "", host).await?,
            "the agent of {host} speaks"
        );
    }
    for kind in ["SeamlessReboot", "Guest"] {
        let there = bed.get(kind, ns, "lost-well").await?;
        ensure!(
            has_finalizers(&there),
            "it went without its agent's word: {there:#}"
        );
    }
    bed.phase("SeamlessReboot", ns, "lost-well", "Aborted", 0).await?;
    bed.until_gone("SeamlessReboot", ns, "lost-well").await?;
    let status = json!({"observedGeneration": 1, "phase": "Halted", "conditions": [condition("Released", "True", "Released")]});
    bed.agent_writes("Guest", ns, "lost-well", status).await?;
    bed.until_gone("Guest", ns, "lost-well").await?;

    // An agent that comes back makes its Host anew; it is left alone while it speaks.
    bed.agents.speak("lost-gone").await?;
    ensure!(bed.is_there("Host", "", "lost-gone").await?);
    Ok(())
}

async fn a_host_that_goes_down_by_itself_gets_its_node_update_once(bed: &Bed) -> Result<()> {
    let (node, name) = ("down-node", "host-0a1b2c3d4e");
    bed.agents.join(node, OLD, json!({})).await?;
    bed.agents.ask(node, name).await?;
    let update = bed
        .until("NodeUpdate", "", name, "be kept", has_finalizers)
        .await?;
    ensure!(update["spec"]["origin"] == "Host", "{update:#}");
    ensure!(update["spec"]["nodeName"] == node, "{update:#}");
    for phase in ["Notified", "Saving", "Acknowledged", "Rebooting"] {
        bed.phase("NodeUpdate", "", name, phase, 0).await?;
    }
    ensure!(
        bed.cordon(node).await? == (false, None),
        "nobody is asked where the host goes by itself"
    );
    bed.phase("NodeUpdate", "", name, "Resumed", 0).await?;
    bed.until("NodeUpdate", "", name, "be let go", |there| {
        !has_finalizers(there)
    })
    .await?;
    bed.delete("NodeUpdate", "", name).await?;
    bed.until_gone("NodeUpdate", "", name).await?;
    // The request is there still; the Host is looked at once more.
    let looked_at = json!({"metadata": {"annotations": {"looked": "at"}}});
    let hosts = bed.api("Host", "");
    hosts
        .patch(node, &PatchParams::default(), &Patch::Merge(looked_at))
        .await?;
    bed.agents.ask(node, "host-5f6a7b8c9d").await?;
    bed.until("NodeUpdate", "", "host-5f6a7b8c9d", "be kept", has_finalizers)
        .await?;
    ensure!(
        !bed.is_there("NodeUpdate", "", name).await?,
        "one that was deleted was made again"
    );
    // Noted once the NodeUpdate is there.
    bed.until("Host", "", node, "tell which was made", |host| {
        host["metadata"]["annotations"]["understudy.dev/made-node-update"] == "host-5f6a7b8c9d"
    })
    .await?;
    Ok(())
}
