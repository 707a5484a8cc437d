//! A HostUpdate goes over its nodes: one after the other, as budgets and administrators allow.

use anyhow::{Result, ensure};
use jiff::{SignedDuration, Timestamp};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use understudy_tests::control_plane::objects::make;

use crate::chart_rights::NAMESPACE;
use crate::operator_bed::{
    Bed, NEW, OLD, OPERATOR, Scenario, condition_of, has_finalizers, is_over, message_of, node_of,
};
use crate::operator_prometheus::Prometheus;
use crate::scenarios;

pub const SCENARIOS: &[Scenario] = scenarios![
    a_rollout_goes_from_node_to_node_and_honours_budgets,
    a_rollout_that_may_not_begin_says_why,
    a_failure_stops_a_rollout_and_so_does_a_host_that_is_not_back,
    a_drain_that_takes_too_long_is_given_up,
    an_aborted_rollout_leaves_no_node_cordoned_and_stays_aborted,
    a_deleted_rollout_leaves_no_node_cordoned,
    only_the_latest_node_updates_are_kept,
];

/// Nodes of a scenario, as HostUpdates of its name select them.
async fn nodes(bed: &Bed, scenario: &str, nodes: &[(&str, &str)]) -> Result<()> {
    for (node, kernel) in nodes {
        bed.agents
            .join(node, kernel, json!({"scenario": scenario}))
            .await?;
    }
    Ok(())
}

async fn a_rollout_goes_from_node_to_node_and_honours_budgets(bed: &Bed) -> Result<()> {
    let name = "rollout";
    bed.namespace(name).await?;
    nodes(
        bed,
        name,
        &[("ro-a", OLD), ("ro-b", OLD), ("ro-c", OLD), ("ro-d", NEW)],
    )
    .await?;
    bed.patch("Node", "", "ro-b", json!({"spec": {"unschedulable": true}}))
        .await?;
    bed.pod(name, "web", "ro-a", json!({"labels": {"app": "web"}}))
        .await?;
    let owner = json!({"ownerReferences": [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "agent", "uid": "u", "controller": true}]});
    bed.pod(name, "agent", "ro-a", owner).await?;
    // The operator's own: nobody would uncordon the node if there were no other to take it.
    bed.account(NAMESPACE).await?;
    bed.pod(NAMESPACE, OPERATOR, "ro-a", json!({})).await?;
    let budget = json!({"metadata": {"name": "web", "namespace": name}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}});
    make(&bed.admin, "policy/v1", "PodDisruptionBudget", budget).await?;
    allow_disruptions(bed, name, 0).await?;
    bed.host_update(name, json!({"maxUnavailable": 1})).await?;

    // The first waits for its Pod, the others for the first; the last is as declared already.
    let first = bed.pass_of(name, "ro-a").await?;
    let update = bed
        .until("NodeUpdate", "", &first, "be held up by the budget", |update| {
            let said = message_of(update, "Drained");
            condition_of(update, "Drained") == "False Draining"
                && said.contains("rollout/web")
                && said.contains("disruption budget")
        })
        .await?;
    ensure!(
        message_of(&update, "Drained").starts_with("1 left: rollout/web;"),
        "{update:#}"
    );
    ensure!(
        bed.cordon("ro-a").await? == (true, Some(first.clone())),
        "it is cordoned"
    );
    let update = bed
        .until("HostUpdate", "", name, "tell of all nodes", |update| {
            node_of(update, "ro-c")["reason"] == "MaxUnavailable"
        })
        .await?;
    ensure!(
        update["status"]["selected"] == 4 && update["status"]["underway"] == 1,
        "{update:#}"
    );
    ensure!(node_of(&update, "ro-d")["satisfied"] == true, "{update:#}");
    ensure!(
        condition_of(&update, "Reconciling") == "True InProgress",
        "{update:#}"
    );

    allow_disruptions(bed, name, 1).await?;
    bed.until("Pod", name, "web", "be evicted", |pod| {
        !pod["metadata"]["deletionTimestamp"].is_null()
    })
    .await?;
    bed.delete("Pod", name, "web").await?;
    bed.update_node(&first, "ro-a").await?;
    bed.until_condition("NodeUpdate", "", &first, "Uncordoned", "True Uncordoned")
        .await?;
    bed.until_free("ro-a").await?;
    bed.until("NodeUpdate", "", &first, "be let go", |update| {
        !has_finalizers(update)
    })
    .await?;
    ensure!(
        bed.is_there("Pod", name, "agent").await?,
        "a DaemonSet's Pod was evicted"
    );

    // What an administrator has cordoned stays so.
    let second = bed.pass_of(name, "ro-b").await?;
    ensure!(
        only_one_is_underway(&bed.passes(name).await?),
        "more than maxUnavailable"
    );
    bed.until_condition("NodeUpdate", "", &second, "Cordoned", "True AlreadyCordoned")
        .await?;
    bed.update_node(&second, "ro-b").await?;
    bed.until_condition("NodeUpdate", "", &second, "Uncordoned", "True AlreadyCordoned")
        .await?;
    ensure!(
        bed.cordon("ro-b").await? == (true, None),
        "the administrator's cordon is gone"
    );

    let third = bed.pass_of(name, "ro-c").await?;
    ensure!(
        only_one_is_underway(&bed.passes(name).await?),
        "more than maxUnavailable"
    );
    bed.update_node(&third, "ro-c").await?;
    let update = bed
        .until_condition("HostUpdate", "", name, "Ready", "True AlreadySatisfied")
        .await?;
    ensure!(
        update["status"]["updated"] == 4 && update["status"]["underway"] == 0,
        "{update:#}"
    );
    bed.until_free("ro-c").await?;
    ensure!(
        bed.passes(name).await?.len() == 3,
        "what is as declared is left alone"
    );
    Ok(())
}

fn only_one_is_underway(passes: &[Value]) -> bool {
    passes.iter().filter(|pass| !is_over(pass)).count() == 1
}

/// What the controller of disruption budgets writes.
async fn allow_disruptions(bed: &Bed, budget: &str, allowed: i32) -> Result<()> {
    let status = json!({"status": {"observedGeneration": 1, "disruptionsAllowed": allowed, "currentHealthy": 1,
        "desiredHealthy": 1, "expectedPods": 1}});
    let budgets = bed.api("PodDisruptionBudget", budget);
    budgets
        .patch_status("web", &PatchParams::default(), &Patch::Merge(status))
        .await?;
    Ok(())
}

async fn a_rollout_that_may_not_begin_says_why(bed: &Bed) -> Result<()> {
    let (name, node) = ("not-now", "not-now-node");
    bed.namespace(name).await?;
    nodes(bed, name, &[(node, OLD)]).await?;
    let waits = async |reason: &str, words: &str| {
        let update = bed
            .until(
                "HostUpdate",
                "",
                name,
                &format!("wait: {reason}, {words}"),
                |update| {
                    let row = node_of(update, node);
                    row["reason"] == reason
                        && row["message"].as_str().is_some_and(|said| said.contains(words))
                },
            )
            .await?;
        ensure!(bed.passes(name).await?.is_empty(), "it has begun: {update:#}");
        anyhow::Ok(update)
    };
    bed.host_update(name, json!({"paused": true})).await?;
    let update = waits("Paused", "paused is true").await?;
    ensure!(condition_of(&update, "Ready") == "False Paused", "{update:#}");

    // Opens in two hours, closes an hour later.
    let at = |hours| {
        (Timestamp::now() + SignedDuration::from_hours(hours))
            .strftime("%H:%M")
            .to_string()
    };
    let (start, end) = (at(2), at(3));
    let window = json!({"timeZone": "UTC", "start": start, "end": end});
    bed.patch(
        "HostUpdate",
        "",
        name,
        json!({"spec": {"paused": false, "window": window}}),
    )
    .await?;
    waits("WindowClosed", &format!("{start} +00:00")).await?;

    let prometheus = Prometheus::start()?;
    prometheus.fire(&["CephOSDDown", "Watchdog"]);
    bed.pod(name, "nightly", node, json!({"labels": {"app": "backup"}}))
        .await?;
    let blockers = json!([
        {"name": "backups", "pods": {"namespace": name, "matchLabels": {"app": "backup"}}},
        {"name": "storage", "alerts": {"server": prometheus.address(), "names": ["Ceph*"]}},
    ]);
    bed.patch(
        "HostUpdate",
        "",
        name,
        json!({"spec": {"window": null, "blockers": blockers}}),
    )
    .await?;
    waits("Blocked", "blocker backups: Pod not-now/nightly runs on it").await?;
    bed.delete("Pod", name, "nightly").await?;
    waits("Blocked", "blocker storage: alert CephOSDDown fires").await?;
    // Who cannot be asked blocks.
    prometheus.fail();
    waits("Blocked", "cannot be asked").await?;
    prometheus.fire(&["Watchdog"]);
    let pass = bed.pass_of(name, node).await?;
    bed.update_node(&pass, node).await?;
    bed.until_condition("HostUpdate", "", name, "Ready", "True AlreadySatisfied")
        .await?;
    bed.until_free(node).await
}

async fn a_failure_stops_a_rollout_and_so_does_a_host_that_is_not_back(bed: &Bed) -> Result<()> {
    let name = "failures";
    nodes(bed, name, &[("fail-a", OLD), ("fail-b", OLD), ("fail-c", OLD)]).await?;
    bed.host_update(name, json!({"maxFailures": 1, "returnTimeout": "1m"}))
        .await?;
    let first = bed.pass_of(name, "fail-a").await?;
    drained(bed, &first).await?;
    for phase in ["Notified", "Failed"] {
        bed.phase("NodeUpdate", "", &first, phase, 0).await?;
    }
    bed.until_free("fail-a").await?;

    // One may fail. The second goes down and does not come back: when it was asked is the agent's word.
    let second = bed.pass_of(name, "fail-b").await?;
    drained(bed, &second).await?;
    bed.agents.silence("fail-b");
    for phase in ["Notified", "Saving", "Acknowledged", "Rebooting"] {
        bed.phase("NodeUpdate", "", &second, phase, 600).await?;
    }
    let update = bed
        .until_condition("HostUpdate", "", name, "Stalled", "True NodesFailed")
        .await?;
    ensure!(
        node_of(&update, "fail-b")["reason"] == "HostNotBack",
        "{update:#}"
    );
    ensure!(
        node_of(&update, "fail-c")["reason"] == "NodesFailed",
        "{update:#}"
    );
    ensure!(update["status"]["failed"] == 2, "{update:#}");
    ensure!(
        bed.cordon("fail-b").await? == (true, Some(second.clone())),
        "it stays cordoned until it is back"
    );

    bed.agents.boot("fail-b", NEW).await?;
    for phase in ["LoggingOn", "Resuming", "Resumed"] {
        bed.phase("NodeUpdate", "", &second, phase, 0).await?;
    }
    bed.until_free("fail-b").await?;
    let third = bed.pass_of(name, "fail-c").await?;
    bed.update_node(&third, "fail-c").await?;
    let update = bed
        .until("HostUpdate", "", name, "come to its end", |update| {
            update["status"]["updated"] == 2
        })
        .await?;
    ensure!(
        condition_of(&update, "Ready") == "False NodesFailed",
        "{update:#}"
    );
    // A change of it is another try.
    bed.patch("HostUpdate", "", name, json!({"spec": {"maxFailures": 0}}))
        .await?;
    let again = bed.pass_of(name, "fail-a").await?;
    bed.update_node(&again, "fail-a").await?;
    bed.until_condition("HostUpdate", "", name, "Ready", "True AlreadySatisfied")
        .await?;
    bed.until_free("fail-a").await
}

async fn drained(bed: &Bed, pass: &str) -> Result<()> {
    bed.until_condition("NodeUpdate", "", pass, "Drained", "True Drained")
        .await
        .map(drop)
}

async fn a_drain_that_takes_too_long_is_given_up(bed: &Bed) -> Result<()> {
    let (name, node) = ("slow-drain", "slow-drain-node");
    bed.namespace(name).await?;
    nodes(bed, name, &[(node, OLD)]).await?;
    // No kubelet ends it.
    bed.pod(name, "stuck", node, json!({})).await?;
    bed.host_update(name, json!({"drain": {"timeout": "5s"}})).await?;
    let update = bed
        .until_condition("HostUpdate", "", name, "Stalled", "True NodesFailed")
        .await?;
    let pass = node_of(&update, node)["nodeUpdate"].clone();
    let pass = pass.as_str().unwrap_or_default();
    let said = bed
        .until_condition("NodeUpdate", "", pass, "Failed", "True DrainTimedOut")
        .await?;
    ensure!(
        message_of(&said, "Failed").contains("slow-drain/stuck"),
        "{said:#}"
    );
    bed.until_free(node).await
}

/// Two nodes under way: of one a Pod is waited for, the agent of the other saves sessions.
async fn underway(bed: &Bed, name: &str, [waits, saves]: [&str; 2]) -> Result<[String; 2]> {
    bed.namespace(name).await?;
    nodes(bed, name, &[(waits, OLD), (saves, OLD)]).await?;
    bed.pod(name, "stuck", waits, json!({})).await?;
    bed.host_update(name, json!({"maxUnavailable": 2})).await?;
    let passes = [bed.pass_of(name, waits).await?, bed.pass_of(name, saves).await?];
    bed.until_condition("NodeUpdate", "", &passes[0], "Drained", "False Draining")
        .await?;
    drained(bed, &passes[1]).await?;
    for phase in ["Notified", "Saving"] {
        bed.phase("NodeUpdate", "", &passes[1], phase, 0).await?;
    }
    Ok(passes)
}

/// The operator takes back what its agent has not begun, the agent the rest.
async fn taken_back(bed: &Bed, [waits, saves]: &[String; 2]) -> Result<()> {
    bed.until_gone("NodeUpdate", "", waits).await?;
    bed.until("NodeUpdate", "", saves, "be taken back", |update| {
        !update["metadata"]["deletionTimestamp"].is_null()
    })
    .await?;
    let there = bed.get("NodeUpdate", "", saves).await?;
    ensure!(
        has_finalizers(&there),
        "it went without its agent's word: {there:#}"
    );
    bed.phase("NodeUpdate", "", saves, "Aborted", 0).await?;
    bed.until_gone("NodeUpdate", "", saves).await
}

async fn an_aborted_rollout_leaves_no_node_cordoned_and_stays_aborted(bed: &Bed) -> Result<()> {
    let name = "abort";
    let nodes = ["abort-a", "abort-b"];
    let passes = underway(bed, name, nodes).await?;
    bed.patch(
        "HostUpdate",
        "",
        name,
        json!({"spec": {"action": {"type": "Abort"}}}),
    )
    .await?;
    taken_back(bed, &passes).await?;
    for node in nodes {
        bed.until_free(node).await?;
    }
    bed.until_condition("HostUpdate", "", name, "Ready", "False Aborted")
        .await?;

    // Removing the field changes nothing.
    bed.patch("HostUpdate", "", name, json!({"spec": {"action": null}}))
        .await?;
    let update = bed
        .until("HostUpdate", "", name, "be seen without its action", |update| {
            update["status"]["observedGeneration"] == 3 && update["status"]["aborted"]["generation"] == 3
        })
        .await?;
    ensure!(condition_of(&update, "Ready") == "False Aborted", "{update:#}");
    for node in nodes {
        ensure!(node_of(&update, node)["reason"] == "Aborted", "{update:#}");
    }
    ensure!(bed.passes(name).await?.is_empty(), "it has begun anew");

    // Another change is another try.
    bed.patch(
        "HostUpdate",
        "",
        name,
        json!({"spec": {"drain": {"mode": "None"}}}),
    )
    .await?;
    for node in nodes {
        let pass = bed.pass_of(name, node).await?;
        bed.update_node(&pass, node).await?;
    }
    let update = bed
        .until_condition("HostUpdate", "", name, "Ready", "True AlreadySatisfied")
        .await?;
    ensure!(update["status"]["aborted"].is_null(), "{update:#}");
    for node in nodes {
        bed.until_free(node).await?;
    }
    Ok(())
}

async fn a_deleted_rollout_leaves_no_node_cordoned(bed: &Bed) -> Result<()> {
    let name = "deleted";
    let nodes = ["deleted-a", "deleted-b"];
    let passes = underway(bed, name, nodes).await?;
    bed.delete("HostUpdate", "", name).await?;
    taken_back(bed, &passes).await?;
    bed.until_gone("HostUpdate", "", name).await?;
    for node in nodes {
        ensure!(
            bed.cordon(node).await? == (false, None),
            "{node} is cordoned for nobody"
        );
    }
    Ok(())
}

async fn only_the_latest_node_updates_are_kept(bed: &Bed) -> Result<()> {
    let (name, node) = ("history", "history-node");
    nodes(bed, name, &[(node, OLD)]).await?;
    let spec = json!({"nodeSelector": {"matchLabels": {"scenario": name}}, "historyLimit": 2});
    bed.make("HostUpdate", "", name, spec).await?;
    let mut made = Vec::new();
    for round in 0..4 {
        if round > 0 {
            // Without `expect` each generation is a pass.
            let update = json!({"command": ["/usr/bin/true", format!("{round}")]});
            bed.patch("HostUpdate", "", name, json!({"spec": {"update": update}}))
                .await?;
        }
        let pass = bed.pass_of(name, node).await?;
        bed.update_node(&pass, node).await?;
        bed.until_free(node).await?;
        made.push(pass);
    }
    for old in &made[..2] {
        bed.until_gone("NodeUpdate", "", old).await?;
    }
    let update = bed
        .until_condition("HostUpdate", "", name, "Ready", "True AlreadySatisfied")
        .await?;
    ensure!(update["status"]["updated"] == 1, "{update:#}");
    let kept = bed.passes(name).await?;
    let kept: Vec<&str> = kept
        .iter()
        .filter_map(|pass| pass["metadata"]["name"].as_str())
        .collect();
    ensure!(kept == made[2..], "{kept:?} of {made:?}");
    Ok(())
}
