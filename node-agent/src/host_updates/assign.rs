//! What a HostUpdate's status tells stand-alone, where the node agent does what the operator does in a cluster,
//! for one node; and the NodeUpdate of a host that goes down by itself. Pure functions of what was seen.

use std::collections::BTreeMap;

use jiff::Timestamp;
use understudy_api::NodeUpdate;
use understudy_api::conditions::{self, Wanted, reasons, types};
use understudy_api::host_update::{HostUpdateStatus, UpdatedNode};
use understudy_api::node_update::{NodeUpdateSpec, Origin};
use understudy_api::rollout::{Seen, Want};

use crate::store::Object;

/// A node without a cluster, as HostUpdates see it.
pub fn seen(name: &str, kernel_release: String, booted_at: i64) -> Seen {
    Seen {
        name: name.to_owned(),
        identity: name.to_owned(),
        labels: labels(name),
        kernel_release,
        booted_at,
        now: Timestamp::now(),
    }
}

/// Labels that it has.
fn labels(node: &str) -> BTreeMap<String, String> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        other => other,
    };
    [
        ("kubernetes.io/hostname", node),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch),
    ]
    .map(|(label, value)| (label.to_owned(), value.to_owned()))
    .into()
}

/// The NodeUpdate for a host that goes down by itself in this boot. `number`: which one of this boot it is,
/// from 0.
pub fn of_host(node: &str, boot_id: &str, number: usize, reason: &str) -> NodeUpdate {
    let boot: String = boot_id.chars().filter(char::is_ascii_hexdigit).take(10).collect();
    let mut name = format!("host-{boot}");
    if number > 0 {
        name.push_str(&format!("-{}", number + 1));
    }
    NodeUpdate::new(
        &name,
        NodeUpdateSpec {
            node_name: node.to_owned(),
            origin: Origin::Host,
            host_update: None,
            reason: Some(reason.to_owned()),
            drain: None,
            update: None,
            expect: None,
            reboot: Default::default(),
            sessions: Default::default(),
        },
    )
}

/// Writes what is wanted into the HostUpdate's status.
pub fn report(status: &mut HostUpdateStatus, want: &Want, node: &str, generation: i64, now: Timestamp) {
    let of_pass = |pass: &NodeUpdate| {
        let status = pass.status.clone().unwrap_or_default();
        let name = pass.key().name;
        (
            Some(name),
            Some(status.phase.unwrap_or_default()),
            status.reason.unwrap_or_else(|| reasons::PENDING.to_owned()),
            status.message.unwrap_or_default(),
        )
    };
    let (satisfied, (node_update, phase, reason, message)) = match want {
        Want::NotSelected => (true, (None, None, "NotSelected".to_owned(), String::new())),
        Want::Satisfied(message) => {
            let reason = reasons::ALREADY_SATISFIED.to_owned();
            (true, (None, None, reason, message.clone()))
        }
        Want::Waits { reason, message } => (false, (None, None, (*reason).to_owned(), message.clone())),
        Want::Underway(pass) | Want::Failed(pass) | Want::Pass(pass) => (false, of_pass(pass)),
    };
    status.observed_generation = generation;
    let before = status.nodes.iter().find(|there| there.name == node).cloned();
    status.nodes = match want {
        Want::NotSelected => Vec::new(),
        _ => vec![UpdatedNode {
            name: node.to_owned(),
            satisfied,
            // The pass that made it so stays known.
            node_update: node_update.or_else(|| before.as_ref()?.node_update.clone()),
            phase: phase.or_else(|| before.as_ref()?.phase),
            reason: Some(reason.clone()),
            message: (!message.is_empty()).then(|| message.clone()),
        }],
    };
    let failed = matches!(want, Want::Failed(_));
    let underway = matches!(want, Want::Underway(_) | Want::Pass(_));
    status.selected = i32::from(*want != Want::NotSelected);
    status.updated = i32::from(matches!(want, Want::Satisfied(_)));
    (status.underway, status.failed) = (i32::from(underway), i32::from(failed));
    let waits = matches!(want, Want::Waits { .. });
    let wanted = |kind, status| Wanted {
        kind,
        status: Some(status),
        reason: &reason,
        message: &message,
    };
    conditions::set(
        &mut status.conditions,
        generation,
        now,
        &[
            wanted(types::READY, satisfied),
            wanted(types::RECONCILING, !satisfied && !failed && !waits),
            wanted(types::STALLED, failed),
        ],
    );
}

#[cfg(test)]
mod tests {
    use understudy_api::host_update::{HostExpect, HostUpdateAction, HostUpdateActionKind, HostUpdateSpec};
    use understudy_api::rollout::want;
    use understudy_api::window::Window;
    use understudy_api::{HostUpdate, NodeUpdatePhase, NodeUpdateStatus, Time};

    use super::*;

    fn seen() -> Seen {
        super::seen("alpha", "6.1.0-47".into(), 1_000_000)
    }

    fn update(expect: Option<HostExpect>) -> HostUpdate {
        let mut update = HostUpdate::new(
            "kernel",
            HostUpdateSpec {
                expect,
                ..HostUpdateSpec::default()
            },
        );
        update.metadata.uid = Some("uid".into());
        update.metadata.generation = Some(3);
        update
    }

    fn kernel(release: &str) -> Option<HostExpect> {
        Some(HostExpect {
            kernel_release: Some(release.into()),
            booted_after: None::<Time>,
        })
    }

    fn pass(update: &HostUpdate, phase: NodeUpdatePhase) -> NodeUpdate {
        let Want::Pass(mut pass) = want(update, &[], &seen()) else {
            panic!("no pass is wanted");
        };
        pass.status = Some(NodeUpdateStatus {
            phase: Some(phase),
            reason: Some("Because".into()),
            ..NodeUpdateStatus::default()
        });
        *pass
    }

    fn ready(want: &Want) -> (String, String, String) {
        let mut status = HostUpdateStatus::default();
        report(&mut status, want, "alpha", 3, Timestamp::UNIX_EPOCH);
        let of = |kind: &str| {
            let found = status.conditions.iter().find(|there| there.type_ == kind);
            found.unwrap().status.clone()
        };
        (of("Ready"), of("Reconciling"), of("Stalled"))
    }

    #[test]
    fn a_host_that_is_as_it_shall_be_is_left_alone() {
        let satisfied = want(&update(kernel("6.1.0-47")), &[], &seen());
        assert!(matches!(satisfied, Want::Satisfied(_)), "{satisfied:?}");
        assert_eq!(ready(&satisfied), ("True".into(), "False".into(), "False".into()));
    }

    #[test]
    fn a_pass_repeats_the_update_and_says_what_is_missing() {
        let update = update(kernel("6.1.0-56"));
        let Want::Pass(pass) = want(&update, &[], &seen()) else {
            panic!("no pass is wanted");
        };
        assert_eq!(pass.spec.origin, Origin::HostUpdate);
        assert_eq!(pass.spec.host_update.as_ref().unwrap().generation, 3);
        assert!(pass.spec.reason.as_ref().unwrap().contains("6.1.0-56"));
        assert!(pass.key().name.starts_with("kernel-"));
        assert_eq!(pass.spec.expect, update.spec.expect);
    }

    #[test]
    fn one_pass_is_made_for_a_generation_and_a_failed_one_waits_for_a_change() {
        let mut update = update(kernel("6.1.0-56"));
        let running = pass(&update, NodeUpdatePhase::Saving);
        let underway = want(&update, std::slice::from_ref(&running), &seen());
        assert!(matches!(underway, Want::Underway(_)), "{underway:?}");
        assert_eq!(ready(&underway), ("False".into(), "True".into(), "False".into()));
        let failed = pass(&update, NodeUpdatePhase::Failed);
        let stalled = want(&update, std::slice::from_ref(&failed), &seen());
        assert!(matches!(stalled, Want::Failed(_)), "{stalled:?}");
        assert_eq!(ready(&stalled), ("False".into(), "False".into(), "True".into()));
        // Another generation is another try; but not before the first has come to its end.
        update.metadata.generation = Some(4);
        assert!(matches!(want(&update, &[failed], &seen()), Want::Pass(_)));
        assert!(matches!(want(&update, &[running], &seen()), Want::Underway(_)));
    }

    #[test]
    fn without_expect_a_node_is_updated_once_for_a_generation() {
        let mut update = update(None);
        let done = pass(&update, NodeUpdatePhase::Resumed);
        let satisfied = want(&update, std::slice::from_ref(&done), &seen());
        assert!(matches!(satisfied, Want::Satisfied(_)), "{satisfied:?}");
        update.metadata.generation = Some(4);
        assert!(matches!(want(&update, &[done], &seen()), Want::Pass(_)));
    }

    #[test]
    fn nothing_is_begun_for_a_paused_aborted_or_foreign_update() {
        let mut paused = update(None);
        paused.spec.paused = true;
        assert!(matches!(
            want(&paused, &[], &seen()),
            Want::Waits {
                reason: reasons::PAUSED,
                ..
            }
        ));
        let mut aborted = update(None);
        aborted.spec.action = Some(HostUpdateAction {
            kind: HostUpdateActionKind::Abort,
        });
        assert!(matches!(want(&aborted, &[], &seen()), Want::Waits { .. }));
        let mut other = update(None);
        other
            .spec
            .node_selector
            .match_labels
            .insert("kubernetes.io/hostname".into(), "beta".into());
        assert_eq!(want(&other, &[], &seen()), Want::NotSelected);
    }

    #[test]
    fn nothing_is_begun_while_the_window_is_closed() {
        let mut later = update(None);
        let mut seen = seen();
        seen.now = "2026-11-27T12:00:00Z".parse().unwrap();
        later.spec.window = Some(Window {
            time_zone: "UTC".into(),
            days: Vec::new(),
            start: "22:00".into(),
            end: "04:00".into(),
        });
        let Want::Waits { reason, message } = want(&later, &[], &seen) else {
            panic!("a pass is begun");
        };
        assert_eq!(reason, reasons::WINDOW_CLOSED);
        assert!(message.contains("2026-11-27 22:00"), "{message}");
        seen.now = "2026-11-27T23:00:00Z".parse().unwrap();
        assert!(matches!(want(&later, &[], &seen), Want::Pass(_)));
    }

    #[test]
    fn each_shutdown_that_the_host_begins_in_a_boot_has_a_name_of_its_own() {
        let names: Vec<String> = (0..3)
            .map(|number| {
                of_host("alpha", "0a1b2c3d-4e5f-6789", number, "reboot")
                    .key()
                    .name
            })
            .collect();
        assert_eq!(
            names,
            ["host-0a1b2c3d4e", "host-0a1b2c3d4e-2", "host-0a1b2c3d4e-3"]
        );
    }
}
