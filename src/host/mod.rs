//! Hosts: a host that goes down by itself asks for a NodeUpdate, into which its agent reports; of those the latest are
//! kept. One whose Node is gone and whose agent is silent is removed.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use tokio::time::Instant;
use understudy_api::host::HostRebootRequest;
use understudy_api::node_update::{NodeUpdateSpec, NodeUpdateStatus, Origin};
use understudy_api::{Host, NodeUpdate};

use crate::controller::{Again, Context, Reconciler};
use crate::error::Error;
use crate::place::SILENT_AFTER;
use crate::write::Note;

/// The last NodeUpdate that was made for the host; one that is deleted is not made again.
pub const MADE: &str = "understudy.dev/made-node-update";
/// How NodeUpdates that hosts ask for are called: no agent names another's.
const PREFIX: &str = "host-";
/// How many of them are kept of a host, as many as of a HostUpdate where it says nothing.
const HISTORY: usize = 3;

impl Reconciler for Host {
    const NAME: &'static str = "host";
    const CONCURRENCY: u16 = 4;

    async fn reconcile(host: Arc<Host>, context: Arc<Context>) -> Result<Again, Error> {
        let writer = &context.writer;
        let world = &context.world;
        if world.place(&host.name_any()).node.is_none()
            && world.liveness.is_silent(&host.name_any(), Instant::now())
        {
            let Some(left) = left(&host, Timestamp::now()) else {
                tracing::info!(host = %host.name_any(), "removed: its Node is gone and its agent is silent");
                // An agent that speaks in this moment keeps it.
                writer.delete_unchanged(&*host).await?;
                return Ok(Again::default());
            };
            return Ok(Again(Some(left)));
        }
        match build(&host) {
            Plan::Nothing => {}
            Plan::Refuse(note) => writer.note(&*host, &note),
            Plan::Make(update) => {
                let name = update.name_any();
                if writer.create(&*update).await? {
                    tracing::info!(host = %host.name_any(), update = name, "made the NodeUpdate that the host asked for");
                }
                writer.metadata(&*host, None, &[(MADE, name)]).await?;
            }
        }
        for update in beyond(world.node_updates_of(&host.name_any())) {
            tracing::info!(host = %host.name_any(), update = %update.name_any(), "deleted: only the latest are kept");
            writer.delete(&*update).await?;
        }
        Ok(Again::default())
    }
}

/// How long a Host without a Node is left alone: its agent has made it, and tells of itself in a moment.
fn left(host: &Host, now: Timestamp) -> Option<Duration> {
    let made = host.creation_timestamp()?.0;
    let left = SignedDuration::try_from(SILENT_AFTER).ok()? - now.duration_since(made);
    left.is_positive()
        .then(|| left.unsigned_abs() + Duration::from_millis(50))
}

/// A host's own NodeUpdates that are over, but for the latest, and for those with a session that may still be resumed.
fn beyond(of_node: Vec<Arc<NodeUpdate>>) -> Vec<Arc<NodeUpdate>> {
    let mut own: Vec<_> = of_node
        .into_iter()
        .filter(|update| update.spec.origin == Origin::Host)
        .collect();
    own.sort_by_key(|update| Reverse((update.creation_timestamp(), update.name_any())));
    let is_over = |update: &NodeUpdate| {
        let status = update.status.as_ref();
        status.is_some_and(|status| !NodeUpdateStatus::needs_keys(status))
    };
    let old = own.into_iter().skip(HISTORY);
    old.filter(|update| is_over(update) && update.metadata.deletion_timestamp.is_none())
        .collect()
}

#[derive(Debug, PartialEq)]
enum Plan {
    Nothing,
    Make(Box<NodeUpdate>),
    Refuse(Note),
}

fn build(host: &Host) -> Plan {
    let status = host.status.as_ref();
    let Some(HostRebootRequest {
        reason,
        node_update: Some(name),
        ..
    }) = status.and_then(|status| status.reboot_request.as_ref())
    else {
        return Plan::Nothing;
    };
    if host.annotations().get(MADE) == Some(name) || host.metadata.deletion_timestamp.is_some() {
        return Plan::Nothing;
    }
    if !name.starts_with(PREFIX) {
        return Plan::Refuse(Note {
            warning: true,
            reason: "Refused".to_owned(),
            message: format!(
                "status.rebootRequest.nodeUpdate is {name}; a host's own NodeUpdate is called {PREFIX}<boot ID>"
            ),
        });
    }
    let reason: String = reason.chars().filter(|c| !c.is_control()).take(200).collect();
    let update = NodeUpdate::new(
        name,
        NodeUpdateSpec {
            node_name: host.name_any(),
            origin: Origin::Host,
            host_update: None,
            reason: (!reason.is_empty()).then_some(reason),
            drain: None,
            update: None,
            expect: None,
            reboot: Default::default(),
            sessions: Default::default(),
        },
    );
    Plan::Make(Box::new(update))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn host(name: &str, made: Option<&str>) -> Host {
        serde_json::from_value(
            json!({"metadata": {"name": "a", "annotations": made.map(|made| json!({MADE: made}))},
            "spec": {}, "status": {"rebootRequest":
                {"reason": "reboot", "requestedAt": "2026-01-01T00:00:00Z", "nodeUpdate": name}}}),
        )
        .unwrap()
    }

    #[test]
    fn a_hosts_request_makes_one_node_update_for_its_own_node() {
        let Plan::Make(update) = build(&host("host-0a1b2c", Some("host-before"))) else {
            panic!("none is made");
        };
        assert_eq!(update.spec.node_name, "a");
        assert_eq!(update.spec.origin, Origin::Host);
        assert_eq!(update.name_any(), "host-0a1b2c");
        assert_eq!(build(&host("host-0a1b2c", Some("host-0a1b2c"))), Plan::Nothing);
    }

    #[test]
    fn an_agent_cannot_name_the_node_update_of_a_host_update() {
        assert!(matches!(build(&host("kernel-0a1b2c", None)), Plan::Refuse(_)));
    }

    #[test]
    fn of_a_hosts_own_node_updates_the_latest_stay_and_whatever_is_not_over() {
        let update = |day: u32, origin: &str, phase: &str, session: &str| {
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": {"name": format!("host-{day}"), "creationTimestamp": format!("2026-01-0{day}T00:00:00Z")},
                    "spec": {"nodeName": "a", "origin": origin},
                    "status": {"phase": phase, "result": {"guests": [{"name": "web", "namespace": "n", "state": session, "checkpoint": "c", "memoryBytes": 0, "writtenBytes": 0}]}}}))
                .unwrap(),
            )
        };
        let all = vec![
            update(1, "Host", "Resumed", "Resumed"),
            update(2, "Host", "Failed", "Kept"),
            update(3, "HostUpdate", "Resumed", "Resumed"),
            update(4, "Host", "Saving", "Saving"),
            update(5, "Host", "Failed", "Lost"),
            update(6, "Host", "Resumed", "Resumed"),
            update(7, "Host", "Resumed", "Resumed"),
            update(8, "Host", "Resumed", "Resumed"),
        ];
        let names: Vec<String> = beyond(all).iter().map(|update| update.name_any()).collect();
        assert_eq!(names, ["host-5", "host-1"]);
    }

    #[test]
    fn a_new_host_is_left_alone_until_its_agent_may_have_spoken() {
        let mut host = host("host-0a1b2c", None);
        let made: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        host.metadata.creation_timestamp = Some(understudy_api::Time(made));
        let at = |seconds| made + SignedDuration::from_secs(seconds);
        assert!(left(&host, at(1)).is_some_and(|left| left > Duration::from_secs(38)));
        assert_eq!(left(&host, at(40)), None);
    }
}
