//! The rollout of a HostUpdate over nodes whose agents are played.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::operator_bed::{Agent, Bed, condition, has, until};

const NEWER: &str = "6.1.0-2";
const POLL: Duration = Duration::from_millis(100);

/// How many passes are under way, and were at most.
#[derive(Default)]
struct Underway {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// A node of a pool, with an agent that does what NodeUpdates ask for.
struct Player {
    agent: Arc<Agent>,
    fails: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Player {
    async fn start(bed: &Arc<Bed>, pool: &str, node: &str, underway: &Arc<Underway>) -> Result<Player> {
        let uid = bed.node(node, json!({"pool": pool})).await?;
        let agent = Arc::new(Agent::start(bed, node, &uid).await?);
        agent.reboots("6.1.0-1").await?;
        let fails = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn({
            let (bed, agent, fails, underway) = (bed.clone(), agent.clone(), fails.clone(), underway.clone());
            async move {
                loop {
                    // What fails is tried again, as an agent does.
                    let _ = pass(&bed, &agent, &fails, &underway).await;
                    tokio::time::sleep(POLL).await;
                }
            }
        });
        Ok(Player { agent, fails, task })
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One look of an agent at the NodeUpdates of its node: it reboots for the one that is drained.
async fn pass(bed: &Bed, agent: &Agent, fails: &AtomicBool, underway: &Underway) -> Result<()> {
    let updates = bed.ours("NodeUpdate");
    for update in updates.list(&Default::default()).await?.items {
        let status = &update.data["status"];
        let is_ours = update.data["spec"]["nodeName"] == agent.node.as_str();
        let is_drained = status["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|there| there["type"] == "Drained" && there["status"] == "True");
        if !is_ours
            || !is_drained
            || ["Resumed", "Failed", "Aborted"]
                .iter()
                .any(|phase| status["phase"] == *phase)
        {
            continue;
        }
        let name = update.metadata.name.clone().unwrap_or_default();
        let write = async |phase: &str, reason: &str, kind: &str| {
            let is = if phase == "Rebooting" { "False" } else { "True" };
            let status = json!({"phase": phase, "reason": reason, "conditions": [condition(kind, is, reason)],
                "phaseTransitions": [{"phase": phase, "transitionTime": jiff::Timestamp::now().to_string()}]});
            agent.writes("NodeUpdate", &name, status).await
        };
        if update.metadata.deletion_timestamp.is_some() {
            write("Aborted", "Aborted", "Failed").await?;
            continue;
        }
        if fails.load(Ordering::Relaxed) {
            write("Failed", "UpdateCommandFailed", "Failed").await?;
            continue;
        }
        let now = underway.now.fetch_add(1, Ordering::Relaxed) + 1;
        underway.most.fetch_max(now, Ordering::Relaxed);
        write("Rebooting", "InProgress", "Complete").await?;
        agent.reboots(NEWER).await?;
        write("Resumed", "SessionsResumed", "Complete").await?;
        underway.now.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}

fn spec(pool: &str, more: Value) -> Value {
    let mut spec =
        json!({"nodeSelector": {"matchLabels": {"pool": pool}}, "expect": {"kernelRelease": NEWER}});
    if let (Some(fields), Some(more)) = (spec.as_object_mut(), more.as_object()) {
        fields.extend(more.clone());
    }
    spec
}

async fn is_cordoned(bed: &Bed, node: &str) -> Result<bool> {
    let node = bed.core("v1", "Node", None).get(node).await?;
    Ok(node.data["spec"]["unschedulable"] == true)
}

/// Whether a node's row in a HostUpdate's status has this reason.
fn row(status: &Value, node: &str, reason: &str) -> bool {
    let mut rows = status["nodes"].as_array().into_iter().flatten();
    rows.any(|row| row["name"] == node && row["reason"] == reason)
}

/// An ordinary Pod on a node.
async fn pod(bed: &Bed, node: &str, name: &str, label: &str) -> Result<()> {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": label}},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]}});
    let pods = bed.core("v1", "Pod", Some("default"));
    until(&format!("Pod {name}"), async || {
        // The ServiceAccount is made by a controller that does not run here.
        let made = pods
            .create(&Default::default(), &serde_json::from_value(pod.clone())?)
            .await;
        Ok(made.map(drop).map_err(|error| error.to_string()))
    })
    .await
}

/// One node after the other: cordoned, drained as a disruption budget allows, rebooted, uncordoned; but for what an
/// administrator had cordoned, and not while a Pod that blocks runs there. What is up to date is left alone.
pub async fn one_by_one(bed: &Arc<Bed>) -> Result<()> {
    let underway = Arc::new(Underway::default());
    let mut players = Vec::new();
    for node in ["a1", "a2", "a3", "a4"] {
        players.push(Player::start(bed, "a", node, &underway).await?);
    }
    players[3].agent.reboots(NEWER).await?;
    let nodes = bed.core("v1", "Node", None);
    bed.merge(&nodes, "a2", json!({"spec": {"unschedulable": true}}))
        .await?;
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    let accounts = bed.core("v1", "ServiceAccount", Some("default"));
    accounts
        .create(&Default::default(), &serde_json::from_value(account)?)
        .await?;
    pod(bed, "a1", "shop", "shop").await?;
    pod(bed, "a3", "batch", "batch").await?;
    let budgets = bed.core("policy/v1", "PodDisruptionBudget", Some("default"));
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "shop"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "shop"}}}});
    budgets
        .create(&Default::default(), &serde_json::from_value(budget)?)
        .await?;

    let blockers = json!([{"name": "batch", "pods": {"matchLabels": {"app": "batch"}}}]);
    bed.make("HostUpdate", "kernel", spec("a", json!({"blockers": blockers})))
        .await?;
    bed.until("HostUpdate", "kernel", "a1 to be drained", |status| {
        row(status, "a1", "Draining")
    })
    .await?;
    ensure!(is_cordoned(bed, "a1").await?);
    let draining = bed
        .until("HostUpdate", "kernel", "the budget to be named", |status| {
            status.to_string().contains("default/shop") && row(status, "a2", "MaxUnavailable")
        })
        .await?;
    ensure!(
        row(&draining.data["status"], "a4", "AlreadySatisfied"),
        "{}",
        draining.data["status"]
    );

    // The budget allows it, as its controller would say; the Pod's kubelet ends it.
    let allowed = json!({"status": {"disruptionsAllowed": 1, "currentHealthy": 2, "desiredHealthy": 1, "expectedPods": 2,
        "observedGeneration": 1}});
    budgets
        .patch_status("shop", &PatchParams::default(), &Patch::Merge(allowed))
        .await?;
    let pods = bed.core("v1", "Pod", Some("default"));
    until("the Pod's eviction", async || {
        let pod = pods.get_opt("shop").await?;
        Ok(
            match pod.is_none_or(|pod| pod.metadata.deletion_timestamp.is_some()) {
                true => Ok(()),
                false => Err("it runs".to_owned()),
            },
        )
    })
    .await?;
    pods.delete("shop", &DeleteParams::default().grace_period(0))
        .await
        .ok();
    bed.until("HostUpdate", "kernel", "a3 to wait for the batch", |status| {
        row(status, "a1", "AlreadySatisfied")
            && row(status, "a2", "AlreadySatisfied")
            && row(status, "a3", "Blocked")
    })
    .await?;
    ensure!(!is_cordoned(bed, "a1").await?, "a1 stays cordoned");
    ensure!(is_cordoned(bed, "a2").await?, "its administrator had cordoned a2");
    ensure!(
        !is_cordoned(bed, "a3").await?,
        "a3 is cordoned while it is blocked"
    );
    pods.delete("batch", &DeleteParams::default().grace_period(0))
        .await?;
    let done = bed
        .until("HostUpdate", "kernel", "Ready", |status| {
            status["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|there| there["type"] == "Ready" && there["status"] == "True")
        })
        .await?;
    ensure!(done.data["status"]["updated"] == 4, "{}", done.data["status"]);
    until("a3 to be uncordoned", async || {
        Ok(if is_cordoned(bed, "a3").await? {
            Err("cordoned".to_owned())
        } else {
            Ok(())
        })
    })
    .await?;
    ensure!(
        underway.most.load(Ordering::Relaxed) == 1,
        "more than one at a time"
    );
    let passes = bed.ours("NodeUpdate").list(&Default::default()).await?;
    let of = |node: &str| {
        passes
            .items
            .iter()
            .filter(|pass| pass.data["spec"]["nodeName"] == node)
            .count()
    };
    ensure!(
        [of("a1"), of("a2"), of("a3"), of("a4")] == [1, 1, 1, 0],
        "one pass for each that needs it"
    );
    Ok(())
}

/// What keeps a rollout from beginning, and from going on.
pub async fn held_up(bed: &Arc<Bed>) -> Result<()> {
    let underway = Arc::new(Underway::default());
    let first = Player::start(bed, "b", "b1", &underway).await?;
    let _second = Player::start(bed, "b", "b2", &underway).await?;

    bed.make("HostUpdate", "paused", spec("b", json!({"paused": true})))
        .await?;
    bed.until("HostUpdate", "paused", "Paused", |status| {
        row(status, "b1", "Paused")
    })
    .await?;
    bed.ours("HostUpdate")
        .delete("paused", &DeleteParams::default())
        .await?;
    bed.until_gone(&bed.ours("HostUpdate"), "paused").await?;

    // Open for one minute of another day.
    let day = jiff::Timestamp::now()
        .to_zoned(jiff::tz::TimeZone::UTC)
        .tomorrow()?
        .weekday();
    let day = format!("{day:?}");
    let window = json!({"timeZone": "Etc/UTC", "days": [day], "start": "12:00", "end": "12:01"});
    bed.make("HostUpdate", "windowed", spec("b", json!({"window": window})))
        .await?;
    let closed = bed
        .until("HostUpdate", "windowed", "WindowClosed", |status| {
            row(status, "b1", "WindowClosed")
        })
        .await?;
    ensure!(
        closed.data["status"].to_string().contains("12:00"),
        "until when: {}",
        closed.data["status"]
    );
    bed.ours("HostUpdate")
        .delete("windowed", &DeleteParams::default())
        .await?;
    bed.until_gone(&bed.ours("HostUpdate"), "windowed").await?;

    // The first fails: the second is not begun. A change is another try.
    first.fails.store(true, Ordering::Relaxed);
    bed.make("HostUpdate", "fails", spec("b", json!({}))).await?;
    let stopped = bed
        .until("HostUpdate", "fails", "NodesFailed", |status| {
            row(status, "b2", "NodesFailed")
        })
        .await?;
    ensure!(
        stopped.data["status"]["failed"] == 1,
        "{}",
        stopped.data["status"]
    );
    first.fails.store(false, Ordering::Relaxed);
    bed.merge(
        &bed.ours("HostUpdate"),
        "fails",
        json!({"spec": {"maxFailures": 1}}),
    )
    .await?;
    bed.until("HostUpdate", "fails", "both nodes", |status| {
        status["updated"] == 2
    })
    .await?;
    for node in ["b1", "b2"] {
        until("the node to be uncordoned", async || {
            Ok(if is_cordoned(bed, node).await? {
                Err(node.to_owned())
            } else {
                Ok(())
            })
        })
        .await?;
    }
    Ok(())
}

/// Aborted, or deleted, in flight: no node stays cordoned. A host that does not come back stops the rollout.
pub async fn taken_back(bed: &Arc<Bed>) -> Result<()> {
    let uid = bed.node("c1", json!({"pool": "c"})).await?;
    let agent = Agent::start(bed, "c1", &uid).await?;
    agent.reboots("6.1.0-1").await?;
    let passes = bed.ours("NodeUpdate");
    let updates = bed.ours("HostUpdate");
    let pass_of = |update: &'static str| {
        let (passes, updates) = (passes.clone(), updates.clone());
        async move {
            until("its NodeUpdate to be drained", async || {
                let status = updates.get(update).await?.data["status"].clone();
                let Some(name) = status["nodes"][0]["nodeUpdate"].as_str() else {
                    return Ok(Err(status.to_string()));
                };
                let status = passes.get(name).await?.data["status"].clone();
                Ok(match has(&status, "Drained", "True", "Drained") {
                    true => Ok(name.to_owned()),
                    false => Err(status.to_string()),
                })
            })
            .await
        }
    };
    let uncordoned = || async {
        until("c1 to be uncordoned", async || {
            Ok(if is_cordoned(bed, "c1").await? {
                Err("it is cordoned".to_owned())
            } else {
                Ok(())
            })
        })
        .await
    };
    let aborted = json!({"phase": "Aborted", "reason": "Aborted", "conditions": [condition("Failed", "True", "Aborted")]});

    bed.make("HostUpdate", "deleted", spec("c", json!({}))).await?;
    let pass = pass_of("deleted").await?;
    ensure!(is_cordoned(bed, "c1").await?);
    updates.delete("deleted", &DeleteParams::default()).await?;
    until("the pass to be taken back", async || {
        let pass = passes.get(&pass).await?;
        Ok(pass
            .metadata
            .deletion_timestamp
            .map(drop)
            .ok_or_else(|| "it goes on".to_owned()))
    })
    .await?;
    agent.writes("NodeUpdate", &pass, aborted.clone()).await?;
    bed.until_gone(&passes, &pass).await?;
    bed.until_gone(&updates, "deleted").await?;
    uncordoned().await?;

    // `Abort` is latched: taken out of the spec, as Git does, it changes nothing.
    bed.make("HostUpdate", "aborted", spec("c", json!({}))).await?;
    let pass = pass_of("aborted").await?;
    bed.merge(
        &updates,
        "aborted",
        json!({"spec": {"action": {"type": "Abort"}}}),
    )
    .await?;
    until("the pass to be taken back", async || {
        let pass = passes.get(&pass).await?;
        Ok(pass
            .metadata
            .deletion_timestamp
            .map(drop)
            .ok_or_else(|| "it goes on".to_owned()))
    })
    .await?;
    agent.writes("NodeUpdate", &pass, aborted).await?;
    uncordoned().await?;
    bed.until("HostUpdate", "aborted", "Aborted", |status| {
        row(status, "c1", "Aborted")
    })
    .await?;
    updates.delete("aborted", &DeleteParams::default()).await?;
    bed.until_gone(&updates, "aborted").await?;

    bed.make("HostUpdate", "away", spec("c", json!({"returnTimeout": "1m"})))
        .await?;
    let pass = pass_of("away").await?;
    let rebooting = json!({"phase": "Rebooting", "reason": "InProgress", "conditions": [condition("Complete", "False", "InProgress")],
        "phaseTransitions": [{"phase": "Rebooting", "transitionTime": jiff::Timestamp::now().to_string()}]});
    agent.writes("NodeUpdate", &pass, rebooting).await?;
    drop(agent);
    bed.until("HostUpdate", "away", "HostNotBack", |status| {
        row(status, "c1", "HostNotBack") && status["failed"] == 1
    })
    .await?;
    ensure!(is_cordoned(bed, "c1").await?, "it is not back");
    // It comes back after all.
    let agent = Agent::start(bed, "c1", &uid).await?;
    agent.reboots(NEWER).await?;
    let resumed = json!({"phase": "Resumed", "reason": "SessionsResumed", "conditions": [condition("Complete", "True", "SessionsResumed")]});
    agent.writes("NodeUpdate", &pass, resumed).await?;
    bed.until("HostUpdate", "away", "c1", |status| {
        status["updated"] == 1 && status["failed"] == 0
    })
    .await?;
    uncordoned().await
}
