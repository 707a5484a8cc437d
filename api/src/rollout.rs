//! Which NodeUpdate a HostUpdate asks for on one node: pure functions of what was seen, for the operator and
//! for the node agent that stands alone.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kube::core::ResourceExt;
use uuid::Uuid;

use crate::conditions::reasons;
use crate::host_update::{Aborted, HostUpdateActionKind, HostUpdateSpec};
use crate::node_update::{HostUpdateReference, NodeUpdateSpec, Origin};
use crate::window::Passage;
use crate::{HostUpdate, NodeUpdate, NodeUpdatePhase};

/// The node, as a HostUpdate's `expect` and selector see it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// What tells it from another node of that name: its UID in a cluster, else its name.
    pub identity: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Kernel release.
    pub kernel_release: String,
    /// When its kernel was started, in microseconds since 1970.
    pub booted_at: i64,
    /// When it was seen.
    pub now: Timestamp,
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

/// Name of the NodeUpdate for one generation of a HostUpdate on a node: the same whoever makes it. `node` is
/// the node's identity.
pub fn pass_name(update: &HostUpdate, node: &str) -> String {
    let of = format!("{}/{}/{node}", uid(update), generation(update));
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, of.as_bytes());
    // At most 52 characters, as a rule of HostUpdates says.
    let name = update.name_any();
    format!("{name}-{}", &hash.simple().to_string()[..10])
}

fn uid(update: &HostUpdate) -> String {
    update.metadata.uid.clone().unwrap_or_default()
}

fn generation(update: &HostUpdate) -> i64 {
    update.metadata.generation.unwrap_or(0)
}

/// Whether a NodeUpdate is one of this HostUpdate.
pub fn is_pass_of(pass: &NodeUpdate, update: &HostUpdate) -> bool {
    let reference = pass.spec.host_update.as_ref();
    reference.is_some_and(|reference| reference.uid == uid(update))
}

/// Whether `update` is aborted, as its status shall note it: `action` asks for it, or has asked for it and nothing but
/// `action` and `paused` was changed since.
pub fn aborted(update: &HostUpdate) -> Option<Aborted> {
    let asked = update.spec.action.map(|action| action.kind) == Some(HostUpdateActionKind::Abort);
    let now = Aborted {
        generation: generation(update),
        spec: digest(&update.spec),
    };
    let noted = update.status.as_ref().and_then(|status| status.aborted.as_ref());
    // The generation first: where it is the same, a digest that is not was made by another version of this program.
    let holds = noted.is_some_and(|noted| noted.generation == now.generation || noted.spec == now.spec);
    (asked || holds).then_some(now)
}

/// Of all that a spec says but its `action`, and whether it is `paused`: neither asks for anything else.
fn digest(spec: &HostUpdateSpec) -> String {
    let spec = HostUpdateSpec {
        action: None,
        paused: false,
        ..spec.clone()
    };
    // Fields in the order of the type: what has no value is not written.
    let text = serde_json::to_string(&spec).unwrap_or_default();
    Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes())
        .simple()
        .to_string()
}

/// What `update` asks for, where `passes` are the NodeUpdates of this node.
pub fn want(update: &HostUpdate, passes: &[NodeUpdate], seen: &Seen) -> Want {
    if !update.spec.node_selector.selects(&seen.labels) {
        return Want::NotSelected;
    }
    let name = pass_name(update, &seen.identity);
    let of_update = |pass: &&NodeUpdate| is_pass_of(pass, update);
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
    let last = passes.iter().find(|pass| pass.name_any() == name);
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
                return Want::Satisfied(format!("it was updated by NodeUpdate {}", pass.name_any()));
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
    if update.metadata.deletion_timestamp.is_some() {
        return waits(reasons::ABORTED, "the HostUpdate is being deleted");
    }
    if aborted(update).is_some() {
        return waits(
            reasons::ABORTED,
            "it was aborted: no pass is begun until something else is asked for",
        );
    }
    if update.spec.paused {
        return waits(reasons::PAUSED, "paused is true: no pass is begun");
    }
    match update.spec.window.as_ref().map(|window| window.at(seen.now)) {
        None | Some(Ok(Passage::Open)) => {}
        Some(Ok(Passage::Closed { shown, .. })) => {
            return waits(
                reasons::WINDOW_CLOSED,
                &format!("the window is closed until {shown}"),
            );
        }
        Some(Err(error)) => return waits(reasons::WINDOW_INVALID, &format!("window: {error}")),
    }
    let spec = &update.spec;
    Want::Pass(Box::new(NodeUpdate::new(
        &name,
        NodeUpdateSpec {
            node_name: seen.name.clone(),
            origin: Origin::HostUpdate,
            host_update: Some(HostUpdateReference {
                name: update.name_any(),
                uid: uid(update),
                generation: generation(update),
            }),
            reason: Some(missing),
            drain: Some(spec.drain.clone()),
            update: spec.update.clone(),
            expect: spec.expect.clone(),
            reboot: spec.reboot.clone(),
            sessions: spec.sessions.clone(),
        },
    )))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn update(generation: i64, spec: serde_json::Value, before: Option<&HostUpdate>) -> HostUpdate {
        let mut update: HostUpdate = serde_json::from_value(
            json!({"metadata": {"name": "kernel", "uid": "h", "generation": generation}, "spec": spec}),
        )
        .unwrap();
        update.status = before.map(|before| crate::HostUpdateStatus {
            aborted: aborted(before),
            ..Default::default()
        });
        update
    }

    #[test]
    fn what_was_aborted_stays_so_until_something_else_is_changed() {
        let spec = json!({"expect": {"kernelRelease": "6.1.0-50"}});
        let mut aborts = spec.clone();
        aborts["action"] = json!({"type": "Abort"});
        let first = update(1, spec.clone(), None);
        assert_eq!(aborted(&first), None);
        let asked = update(2, aborts, Some(&first));
        assert!(aborted(&asked).is_some());
        let removed = update(3, spec.clone(), Some(&asked));
        assert_eq!(aborted(&removed).unwrap().generation, 3);
        let mut paused = spec.clone();
        paused["paused"] = true.into();
        let removed = update(4, paused, Some(&removed));
        assert!(aborted(&removed).is_some());
        let changed = update(
            5,
            json!({"expect": {"kernelRelease": "6.1.0-51"}}),
            Some(&removed),
        );
        assert_eq!(aborted(&changed), None);
        assert_eq!(aborted(&update(6, spec, Some(&changed))), None, "it is forgotten");
    }

    #[test]
    fn a_digest_of_another_version_keeps_what_was_aborted() {
        let mut there = update(2, json!({}), None);
        there.status = Some(crate::HostUpdateStatus {
            aborted: Some(Aborted {
                generation: 2,
                spec: "of another version".to_owned(),
            }),
            ..Default::default()
        });
        let noted = aborted(&there).unwrap();
        assert_eq!(noted.spec, digest(&there.spec), "from now on it is this one's");
    }
}
