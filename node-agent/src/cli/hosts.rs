//! Tables of hosts, their updates and the sessions in them.

use jiff::Timestamp;
use understudy_api::conditions::types;
use understudy_api::node_update::{GuestSession, SessionState};
use understudy_api::{Host, HostUpdate, NodeUpdate, NodeUpdatePhase};

use super::list::List;
use super::render::{age, condition, dash, draw, human, table};
use crate::store::Object;

/// One line for each host.
pub(super) fn host_table(hosts: &[Host], wide: bool, now: Timestamp) -> String {
    if hosts.is_empty() {
        return String::new();
    }
    let mut header = vec!["HOST", "READY", "SESSIONS-SAFE", "KERNEL", "CREDENTIALS", "AGE"];
    if wide {
        header.extend(["AGENT", "VMM", "DELAY", "STOP", "SAVE", "BOOT-ID"]);
    }
    let rows = hosts.iter().map(|host| {
        let status = host.status.clone().unwrap_or_default();
        let state = |kind| {
            condition(Some(&status.conditions), kind).map_or("Unknown".to_owned(), |c| c.status.clone())
        };
        let providers = status
            .credential_providers
            .iter()
            .map(|provider| match provider.ready {
                true => provider.name.clone(),
                false => format!("{} (not ready)", provider.name),
            });
        let inhibitor = status.inhibitor.clone().unwrap_or_default();
        let seconds = |millis: Option<i64>| dash(millis.map(|millis| human(millis / 1000)));
        let mut row = vec![
            host.key().name,
            state(types::READY),
            state(types::SESSIONS_SAFE),
            dash(status.kernel_release.clone()),
            dash(Some(providers.collect::<Vec<_>>().join(","))),
            age(host.metadata.creation_timestamp.as_ref().map(|time| time.0), now),
        ];
        if wide {
            row.extend([
                dash(status.agent_version.clone()),
                dash(status.vmm_version.clone()),
                seconds(inhibitor.delay_milliseconds),
                seconds(inhibitor.stop_milliseconds),
                seconds(inhibitor.save_milliseconds),
                dash(status.boot_id.clone()),
            ]);
        }
        row
    });
    table(header, rows.collect())
}

/// One line for each HostUpdate.
pub(super) fn host_update_table(updates: &[HostUpdate], now: Timestamp) -> String {
    if updates.is_empty() {
        return String::new();
    }
    let header = vec!["HOSTUPDATE", "READY", "REASON", "KERNEL", "NODEUPDATE", "AGE"];
    let rows = updates.iter().map(|update| {
        let status = update.status.clone().unwrap_or_default();
        let ready = condition(Some(&status.conditions), types::READY);
        let expect = update.spec.expect.as_ref();
        vec![
            update.key().name,
            ready.map_or("Unknown".to_owned(), |ready| ready.status.clone()),
            dash(ready.map(|ready| ready.reason.clone())),
            dash(expect.and_then(|expect| expect.kernel_release.clone())),
            dash(status.nodes.first().and_then(|node| node.node_update.clone())),
            age(
                update.metadata.creation_timestamp.as_ref().map(|time| time.0),
                now,
            ),
        ]
    });
    table(header, rows.collect())
}

/// One line for each NodeUpdate: who began it, and how far it is.
pub(super) fn node_update_table(updates: &[NodeUpdate], wide: bool, now: Timestamp) -> String {
    if updates.is_empty() {
        return String::new();
    }
    let mut header = vec![
        "NODEUPDATE",
        "NODE",
        "BEGUN-BY",
        "PHASE",
        "PROGRESS",
        "SESSIONS",
        "AGE",
    ];
    if wide {
        header.extend(["KERNEL", "REASON"]);
    }
    let rows = updates.iter().map(|update| {
        let status = update.status.clone().unwrap_or_default();
        let phase = status.phase.unwrap_or_default();
        let result = status.result.clone().unwrap_or_default();
        let since = status.phase_transitions.last().map(|last| last.transition_time.0);
        let percent = status.progress.as_ref().and_then(|progress| progress.percent);
        let mut progress = bar(phase, percent);
        if let Some(since) = since.filter(|_| !phase.is_terminal()) {
            progress.push_str(&format!(" {}", human(now.as_second() - since.as_second())));
        }
        let mut row = vec![
            update.key().name,
            update.spec.node_name.clone(),
            begun_by(update),
            phase.to_string(),
            progress,
            format!("{}/{}", result.resumed, result.sessions),
            age(
                update.metadata.creation_timestamp.as_ref().map(|time| time.0),
                now,
            ),
        ];
        if wide {
            row.push(dash(result.after.map(|after| after.kernel_release)));
            row.push(dash(status.reason));
        }
        row
    });
    table(header, rows.collect())
}

/// Who began it: the HostUpdate by its name, or the host, in its words.
fn begun_by(update: &NodeUpdate) -> String {
    match (&update.spec.host_update, &update.spec.reason) {
        (Some(reference), _) => format!("hostupdate/{}", reference.name),
        (None, Some(reason)) => format!("host ({reason})"),
        (None, None) => "host".to_owned(),
    }
}

/// How far an update is in all: the phases before, and what is known of this one.
fn bar(phase: NodeUpdatePhase, percent: Option<i32>) -> String {
    let (from, to) = match phase {
        NodeUpdatePhase::Pending => (0, 2),
        NodeUpdatePhase::Notified => (2, 10),
        NodeUpdatePhase::Saving => (10, 45),
        NodeUpdatePhase::Acknowledged => (45, 47),
        NodeUpdatePhase::Rebooting => (47, 80),
        NodeUpdatePhase::LoggingOn => (80, 82),
        NodeUpdatePhase::Resuming => (82, 99),
        NodeUpdatePhase::Resumed => (100, 100),
        NodeUpdatePhase::Failed | NodeUpdatePhase::Aborted => return "-".to_owned(),
    };
    draw(from + (to - from) * percent.unwrap_or(0).clamp(0, 100) / 100)
}

/// One line for each session of updates that are under way, or in which something went wrong; of all updates
/// where it may be wide.
pub(super) fn session_table(updates: &[NodeUpdate], wide: bool) -> String {
    let mut rows = Vec::new();
    for update in updates {
        let status = update.status.clone().unwrap_or_default();
        let is_over = status.phase.is_some_and(NodeUpdatePhase::is_terminal);
        for session in status.result.unwrap_or_default().guests {
            let is_bad = matches!(session.state, SessionState::Kept | SessionState::Lost);
            if wide || !is_over || is_bad {
                rows.push(session_row(&update.key().name, &session));
            }
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let header = vec![
        "NODEUPDATE",
        "NAMESPACE",
        "GUEST",
        "SESSION",
        "MEMORY",
        "WRITTEN",
        "SAVED",
        "ROUNDS",
        "PAUSE",
        "INTERRUPTION",
    ];
    table(header, rows)
}

fn session_row(update: &str, session: &GuestSession) -> Vec<String> {
    let interruption = session.interruption;
    vec![
        update.to_owned(),
        session.namespace.clone(),
        session.name.clone(),
        format!("{:?}", session.state),
        bytes(session.memory_bytes),
        bytes(session.written_bytes),
        dash(session.saved_bytes.map(bytes)),
        session.rounds.to_string(),
        dash(interruption.map(|parts| format!("{}ms", parts.pause_milliseconds))),
        dash(interruption.map(|parts| format!("{}ms", parts.total_milliseconds))),
    ]
}

/// What went wrong, in sentences.
pub(super) fn notes(list: &List) -> String {
    let mut text = String::new();
    for host in &list.hosts {
        let status = host.status.clone().unwrap_or_default();
        for kind in [types::READY, types::SESSIONS_SAFE] {
            let found = condition(Some(&status.conditions), kind);
            if let Some(found) = found.filter(|found| found.status == "False") {
                let name = host.key().name;
                text.push_str(&format!("\nhost {name}: {}: {}\n", found.reason, found.message));
            }
        }
    }
    for update in &list.node_updates {
        let name = update.key().name;
        let status = update.status.clone().unwrap_or_default();
        let is_bad = matches!(
            status.phase,
            Some(NodeUpdatePhase::Failed | NodeUpdatePhase::Aborted)
        );
        let is_over = status.phase.is_some_and(NodeUpdatePhase::is_terminal);
        if let Some(message) = status.message.filter(|_| is_bad || !is_over) {
            let reason = status.reason.unwrap_or_default();
            text.push_str(&format!("\nnodeupdate {name}: {reason}: {message}\n"));
        }
        for session in status.result.unwrap_or_default().guests {
            if let Some(message) = session.message {
                let reason = session.reason.unwrap_or_default();
                text.push_str(&format!(
                    "\nsession of {}/{} in nodeupdate {name}: {reason}: {message}\n",
                    session.namespace, session.name
                ));
            }
        }
    }
    text
}

/// As people read sizes.
fn bytes(bytes: i64) -> String {
    match bytes {
        ..10_240 => format!("{bytes}B"),
        10_240..10_485_760 => format!("{}Ki", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{}Mi", bytes >> 20),
        _ => format!("{}Gi", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use understudy_api::NodeUpdateStatus;
    use understudy_api::node_update::NodeUpdateResult;

    use super::super::render;
    use super::*;
    use crate::store::Key;

    fn list() -> List {
        let text = r#"{
            "apiVersion": "understudy.dev/v1alpha1", "kind": "NodeUpdate",
            "metadata": {"name": "host-0a1b"},
            "spec": {"nodeName": "alpha", "origin": "Host", "reason": "reboot"}
        }"#;
        let mut update: NodeUpdate = serde_json::from_str(text).unwrap();
        let session: GuestSession = serde_json::from_value(serde_json::json!({
            "namespace": "default", "name": "web", "state": "Kept", "checkpoint": "c",
            "reason": "CheckpointDamaged", "message": "the index ends early",
            "memoryBytes": 536_870_912u64, "writtenBytes": 1_048_576, "rounds": 3,
        }))
        .unwrap();
        update.status = Some(NodeUpdateStatus {
            phase: Some(NodeUpdatePhase::Saving),
            result: Some(NodeUpdateResult {
                sessions: 1,
                guests: vec![session],
                ..NodeUpdateResult::default()
            }),
            ..NodeUpdateStatus::default()
        });
        List {
            node_updates: vec![update],
            ..List::default()
        }
    }

    #[test]
    fn an_update_tells_who_began_it_and_how_its_sessions_do() {
        let text = render::tables(&list(), false, Timestamp::UNIX_EPOCH);
        for part in [
            "host (reboot)",
            "Saving",
            " 10%",
            "0/1",
            "512Mi",
            "Kept",
            "CheckpointDamaged: the index ends early",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        assert_eq!(list().node_updates[0].key(), Key::new("", "host-0a1b"));
    }

    #[test]
    fn sessions_of_an_update_that_went_well_are_shown_where_it_may_be_wide() {
        let mut list = list();
        let status = list.node_updates[0].status.as_mut().unwrap();
        status.phase = Some(NodeUpdatePhase::Resumed);
        let session = &mut status.result.as_mut().unwrap().guests[0];
        session.state = SessionState::Resumed;
        session.message = None;
        assert!(!render::tables(&list, false, Timestamp::UNIX_EPOCH).contains("512Mi"));
        assert!(render::tables(&list, true, Timestamp::UNIX_EPOCH).contains("512Mi"));
    }

    #[test]
    fn a_bar_grows_from_phase_to_phase() {
        let mut last = -1;
        for phase in [
            NodeUpdatePhase::Pending,
            NodeUpdatePhase::Notified,
            NodeUpdatePhase::Saving,
            NodeUpdatePhase::Acknowledged,
            NodeUpdatePhase::Rebooting,
            NodeUpdatePhase::LoggingOn,
            NodeUpdatePhase::Resuming,
            NodeUpdatePhase::Resumed,
        ] {
            let text = bar(phase, None);
            let percent: i32 = text
                .rsplit_once(' ')
                .unwrap()
                .1
                .trim_end_matches('%')
                .parse()
                .unwrap();
            assert!(percent > last, "{phase}: {text}");
            last = percent;
        }
    }
}
