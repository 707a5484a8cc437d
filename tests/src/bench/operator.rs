//! The operator of a large cluster at a real API server: its memory, how soon it assigns a reboot, and what it writes. Agents
//! are played: their heartbeats and what they write of a reboot.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use kube::Client;
use kube::api::{DynamicObject, WatchEvent, WatchParams};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use understudy_api::managers::AGENT;
use understudy_api::{API_VERSION, ResourceExt};

use crate::control_plane::objects::{api, apply_status, make};
use crate::demo::REBOOT_PHASES;
use crate::operator::{Agents, Installed, Operator, USER};

/// Guests and Hosts of the cluster, guests spread evenly.
const GUESTS: usize = 10_000;
const HOSTS: usize = 1_000;
/// Reboots in flight at a time, each begun when another is over, and how many there are in all. Then as many more as are
/// in flight, asked for in one moment.
const IN_FLIGHT: usize = 50;
const REBOOTS: usize = 300;
/// As often as real agents speak.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long each phase of a reboot takes: half a minute for all, which is sooner than a real clone has booted.
const PHASE: Duration = Duration::from_secs(5);
/// Requests at a time while the cluster is filled.
const AT_ONCE: usize = 24;
const NAMESPACE: &str = "bench";
/// Until something that takes its time has happened.
const LIMIT: Duration = Duration::from_secs(1800);

/// What was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperatorFigures {
    /// Guests, all of them assigned.
    pub guests: usize,
    /// Hosts that speak.
    pub hosts: usize,
    /// Resident memory at the end, in KiB.
    pub rss_kib: u64,
    /// The most that was resident at any time, in KiB.
    pub peak_kib: u64,
    /// Heartbeats that were written while nothing happened.
    pub quiet_heartbeats: u64,
    /// Writes of the operator meanwhile, its lease apart.
    pub quiet_writes: usize,
    /// Reboots in flight.
    pub in_flight: usize,
    /// From a reboot's creation being asked until it was seen as assigned, in microseconds, in order.
    pub reactions_us: Vec<u64>,
    /// The same where as many are asked for in one moment.
    #[serde(default)]
    pub burst_us: Vec<u64>,
    /// Writes of the operator for each reboot, events among them.
    pub operator_writes: f64,
    /// Writes of the agent's for each reboot.
    pub agent_writes: f64,
}

impl OperatorFigures {
    /// The reaction that `part` of the reboots did not exceed, in microseconds.
    pub fn reaction_us(&self, part: f64) -> f64 {
        within(&self.reactions_us, part)
    }

    /// The same of those that were asked for in one moment.
    pub fn burst_us(&self, part: f64) -> f64 {
        within(&self.burst_us, part)
    }
}

/// What `part` of these, which are in order, do not exceed.
fn within(ordered: &[u64], part: f64) -> f64 {
    let last = ordered.len().saturating_sub(1);
    let at = (last as f64 * part).ceil() as usize;
    ordered.get(at).map_or(f64::NAN, |us| *us as f64)
}

/// Measures in `dir`; some minutes.
pub fn measure(dir: &Path) -> Result<OperatorFigures> {
    // A cluster with what an earlier run left would be another one.
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    let installed = Installed::start(dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let client = runtime.block_on(async { anyhow::Ok(Client::try_from(installed.plane.admin().await?)?) })?;
    let agents = Agents::new(&client, HEARTBEAT);
    let begun = Instant::now();
    let say = |what: &str| eprintln!("  {:>6.1} s  {what}", begun.elapsed().as_secs_f64());
    runtime.block_on(fill(&client, &agents))?;
    say("the cluster is filled");
    // As many assignments as there never are at once again: faster than the operator may be.
    let mut first = installed.operator("first", &["--writes-per-second=2000"])?;
    first.wait_until_it_leads()?;
    rests(&mut first, &agents)?;
    ensure!(first.terminate()?.success(), "the operator did not end in order");
    say("every guest is assigned");

    let mut operator = installed.operator("measured", &[])?;
    operator.wait_until_it_leads()?;
    rests(&mut operator, &agents)?;
    let before = installed.audit()?.writes_of(USER).len();
    let quiet = passes(&agents, 3)?;
    let quiet_writes = installed.audit()?.writes_of(USER).len() - before;
    say("nothing happens for three heartbeats of each host");

    let begun_with = installed.audit()?.writes_of(USER).len();
    // Spread, as those are that are under way in a cluster: each begins when another is over.
    let apart = PHASE * u32::try_from(REBOOT_PHASES.len())? / u32::try_from(IN_FLIGHT)?;
    let reactions_us = runtime.block_on(reboots(&client, 0..REBOOTS, apart))?;
    rests(&mut operator, &agents)?;
    say("every reboot is over");
    let burst = REBOOTS..REBOOTS + IN_FLIGHT;
    let burst_us = runtime.block_on(reboots(&client, burst.clone(), Duration::ZERO))?;
    rests(&mut operator, &agents)?;
    say("so is every one of those that were asked for in one moment");
    let audit = installed.audit()?;
    let written = audit.writes_of(USER).len() - begun_with;
    let by_agents = audit.writes_of("admin");
    let of_reboots = |resource: &str| {
        by_agents
            .iter()
            .filter(|event| event.resource == resource)
            .count()
    };
    let (rss_kib, peak_kib) = memory(operator.pid())?;
    let figures = OperatorFigures {
        guests: GUESTS,
        hosts: HOSTS,
        rss_kib,
        peak_kib,
        quiet_heartbeats: quiet,
        quiet_writes,
        in_flight: IN_FLIGHT,
        operator_writes: written as f64 / burst.end as f64,
        agent_writes: of_reboots("seamlessreboots/status") as f64 / burst.end as f64,
        reactions_us,
        burst_us,
    };
    drop(agents);
    ensure!(
        operator.terminate()?.success(),
        "the operator did not end in order"
    );
    installed.plane.stop()?;
    Ok(figures)
}

/// Waits until the operator knows everything and has written nothing for a heartbeat of each host.
fn rests(operator: &mut Operator, agents: &Agents) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        let writes = operator.metric("understudy_operator_writes_total")?;
        let known = operator.metric("understudy_operator_objects")? >= (GUESTS + HOSTS) as f64;
        passes(agents, 1)?;
        if known && operator.metric("understudy_operator_writes_total")? == writes {
            return Ok(());
        }
    }
    bail!("the operator does not come to rest")
}

/// Waits until every host has spoken so many times; how many heartbeats these were.
fn passes(agents: &Agents, times: usize) -> Result<u64> {
    let until = agents.beats() + u64::try_from(times * HOSTS)?;
    crate::bed::wait_until("heartbeats", LIMIT, Duration::from_millis(100), || {
        Ok((agents.beats() >= until).then_some((times * HOSTS) as u64))
    })
}

async fn fill(client: &Client, agents: &Agents) -> Result<()> {
    make(
        client,
        "v1",
        "Namespace",
        json!({"metadata": {"name": NAMESPACE}}),
    )
    .await?;
    stream::iter(0..HOSTS)
        .map(|number| async move {
            let name = format!("node-{number}");
            agents.join(&name, "6.1.0-47-amd64", json!({})).await
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    stream::iter(0..GUESTS)
        .map(|number| async move {
            let guest = json!({"metadata": {"name": format!("guest-{number}"), "namespace": NAMESPACE},
                "spec": {"nodeName": format!("node-{}", number % HOSTS), "memory": "512Mi",
                    "disks": [{"name": "root", "role": "Root", "source": format!("guest-{number}.img")}],
                    "networks": [{"bridge": "br0"}]}});
            make(client, API_VERSION, "Guest", guest).await.map(drop)
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    Ok(())
}

/// Reboots of these numbers, so many in flight at a time, the first of them so far apart; how long each waited to be
/// assigned, in order.
async fn reboots(client: &Client, numbers: std::ops::Range<usize>, apart: Duration) -> Result<Vec<u64>> {
    let (seen, assigned) = watch::channel(std::collections::HashMap::<String, Instant>::new());
    let reboots = api(client, API_VERSION, "SeamlessReboot", Some(NAMESPACE));
    let events = reboots.watch(&WatchParams::default().timeout(290), "0").await?;
    let follow = tokio::spawn(async move {
        let mut events = events.boxed();
        while let Ok(Some(event)) = events.try_next().await {
            if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event
                && is_assigned(&object)
            {
                seen.send_modify(|all| {
                    all.entry(object.name_any()).or_insert_with(Instant::now);
                });
            }
        }
    });
    let begun = tokio::time::Instant::now();
    let waited = stream::iter(numbers.enumerate())
        .map(|(nth, number)| {
            let assigned = assigned.clone();
            async move {
                if let Ok(nth) = u32::try_from(nth) {
                    tokio::time::sleep_until(begun + apart * nth).await;
                }
                reboot(client, number, assigned).await
            }
        })
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<Vec<_>>()
        .await;
    follow.abort();
    let mut waited = waited?;
    waited.sort_unstable();
    Ok(waited)
}

fn is_assigned(object: &DynamicObject) -> bool {
    object.data["status"]["nodeName"].is_string()
}

/// One reboot: asked for, assigned, and played to its end.
async fn reboot(
    client: &Client,
    number: usize,
    mut assigned: watch::Receiver<std::collections::HashMap<String, Instant>>,
) -> Result<u64> {
    let name = format!("reboot-{number}");
    let body = json!({"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {"guestName": format!("guest-{}", number * 7)}});
    let asked = Instant::now();
    make(client, API_VERSION, "SeamlessReboot", body).await?;
    let seen = assigned.wait_for(|all| all.contains_key(&name));
    let seen = tokio::time::timeout(LIMIT, seen).await;
    let at = *seen
        .with_context(|| format!("{name} was not assigned"))?
        .context("the watch of reboots has ended")?
        .get(&name)
        .context("a reboot that was seen")?;
    let reboots = api(client, API_VERSION, "SeamlessReboot", Some(NAMESPACE));
    for phase in REBOOT_PHASES[1..].iter().copied() {
        let is = |what: bool| if what { "True" } else { "False" };
        let condition = |kind: &str, status: &str| {
            json!({"type": kind, "status": status, "reason": "Played", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"})
        };
        let over = phase == "Succeeded";
        let status = json!({"observedGeneration": 1, "phase": phase, "reason": "Played",
            "conditions": [condition("Ready", is(over)), condition("Complete", is(over)), condition("Failed", "False")]});
        apply_status(&reboots, "SeamlessReboot", &name, AGENT, true, status).await?;
        tokio::time::sleep(PHASE).await;
    }
    Ok(u64::try_from((at - asked).as_micros())?)
}

/// Resident memory of a process, now and at most, in KiB.
fn memory(pid: u32) -> Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the operator is gone")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
        number.with_context(|| format!("no {name} in /proc/{pid}/status"))
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_reactions_is_read_from_their_order() {
        let figures = OperatorFigures {
            guests: 0,
            hosts: 0,
            rss_kib: 0,
            peak_kib: 0,
            quiet_heartbeats: 0,
            quiet_writes: 0,
            in_flight: 0,
            reactions_us: (0..=100).collect(),
            burst_us: Vec::new(),
            operator_writes: 0.0,
            agent_writes: 0.0,
        };
        assert_eq!(figures.reaction_us(0.5), 50.0);
        assert_eq!(figures.reaction_us(0.99), 99.0);
        assert_eq!(figures.reaction_us(1.0), 100.0);
    }

    #[test]
    fn memory_is_read_of_a_process() {
        let (now, most) = memory(std::process::id()).unwrap();
        assert!(now > 0 && most >= now);
    }
}
