//! Which NodeUpdate a HostUpdate asks for on this node, and what its status tells. Pure functions of what
//! was seen; stand-alone the node agent does what the operator does in a cluster, for one node.

use std::collections::BTreeMap;

use jiff::Timestamp;
use understudy_api::conditions::{self, Wanted, reasons, types};
use understudy_api::host_update::{HostUpdateActionKind, HostUpdateStatus, UpdatedNode};
use understudy_api::node_update::{HostUpdateReference, NodeUpdateSpec, Origin};
use understudy_api::{HostUpdate, NodeUpdate, NodeUpdatePhase};
use uuid::Uuid;

use crate::store::Object;

/// The node, as a HostUpdate's `expect` and selector see it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Kernel release.
    pub kernel_release: String,
    /// When its kernel was started, in microseconds since 1970.
    pub booted_at: i64,
}

/// What a HostUpdate asks for on this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Want {
    /// Nothing: the node is not selected.
    NotSelected,
    /// Nothing: the node is as it shall be.
    Satisfied(String),
    /// Nothing for now.
    Waits {
        /// Why, in one word.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// A pass is under way, or was made and has not begun.
    Underway(Box<NodeUpdate>),
    /// The last pass for this generation did not succeed; another one takes a change of the HostUpdate.
    Failed(Box<NodeUpdate>),
    /// A new pass.
    Pass(Box<NodeUpdate>),
}

/// Labels that a node without a cluster has.
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

/// Name of the NodeUpdate for one generation of a HostUpdate on a node: the same whoever makes it.
fn pass_name(update: &HostUpdate, node: &str) -> String {
    let of = format!("{}/{}/{node}", update.uid(), update.generation());
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, of.as_bytes());
    let mut name: String = update.key().name;
    name.truncate(200);
    format!("{name}-{}", &hash.simple().to_string()[..10])
}

/// What `update` asks for, where `passes` are the NodeUpdates of this node.
pub fn want(update: &HostUpdate, passes: &[NodeUpdate], seen: &Seen) -> Want {
    if !update.spec.node_selector.selects(&labels(&seen.name)) {
        return Want::NotSelected;
    }
    let name = pass_name(update, &seen.name);
    let of_update = |pass: &&NodeUpdate| {
        pass.spec
            .host_update
            .as_ref()
            .is_some_and(|reference| reference.uid == update.uid())
    };
    let phase = |pass: &NodeUpdate| {
        pass.status
            .as_ref()
            .and_then(|status| status.phase)
            .unwrap_or_default()
    };
    // One of an earlier generation is waited for.
    if let Some(pass) = passes
        .iter()
        .filter(of_update)
        .find(|pass| !phase(pass).is_terminal())
    {
        return Want::Underway(Box::new(pass.clone()));
    }
    let last = passes.iter().find(|pass| pass.key().name == name);
    if let Some(pass) = last.filter(|pass| phase(pass) != NodeUpdatePhase::Resumed) {
        return Want::Failed(Box::new(pass.clone()));
    }
    let missing = match &update.spec.expect {
        Some(expect) => match expect.satisfied_by(&seen.kernel_release, seen.booted_at) {
            Ok(()) => return Want::Satisfied(format!("the host runs kernel {}", seen.kernel_release)),
            Err(missing) => missing,
        },
        None => match last {
            Some(pass) => {
                return Want::Satisfied(format!("it was updated by NodeUpdate {}", pass.key().name));
            }
            None => "it was not updated for this generation".to_owned(),
        },
    };
    if let Some(pass) = last {
        // It came to a good end, and the host has been changed back since.
        return Want::Failed(Box::new(pass.clone()));
    }
    let waits = |reason, message: &str| Want::Waits {
        reason,
        message: format!("{message}; {missing}"),
    };
    if update.is_deleting() {
        return waits(reasons::ABORTED, "the HostUpdate is being deleted");
    }
    if update.spec.action.map(|action| action.kind) == Some(HostUpdateActionKind::Abort) {
        return waits(reasons::ABORTED, "action is Abort: no pass is begun");
    }
    if update.spec.paused {
        return waits(reasons::PAUSED, "paused is true: no pass is begun");
    }
    let spec = &update.spec;
    Want::Pass(Box::new(NodeUpdate::new(
        &name,
        NodeUpdateSpec {
            node_name: seen.name.clone(),
            origin: Origin::HostUpdate,
            host_update: Some(HostUpdateReference {
                name: update.key().name,
                uid: update.uid(),
                generation: update.generation(),
            }),
            reason: Some(missing),
            update: spec.update.clone(),
            expect: spec.expect.clone(),
            reboot: spec.reboot.clone(),
            sessions: spec.sessions.clone(),
        },
    )))
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
            message: (!message.is_empty()).then(|| message.clone()),
        }],
    };
    let failed = matches!(want, Want::Failed(_));
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
    use understudy_api::host_update::{HostExpect, HostUpdateAction, HostUpdateSpec};
    use understudy_api::{NodeUpdateStatus, Time};

    use super::*;

    fn seen() -> Seen {
        Seen {
            name: "alpha".into(),
            kernel_release: "6.1.0-47".into(),
            booted_at: 1_000_000,
        }
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
