//! Which NodeUpdate a HostUpdate asks for on one node: pure functions of what was seen, for the operator and
//! for the node agent that stands alone.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kube::core::ResourceExt;
use uuid::Uuid;

use crate::conditions::reasons;
use crate::host_update::HostUpdateActionKind;
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
    if update.spec.action.map(|action| action.kind) == Some(HostUpdateActionKind::Abort) {
        return waits(reasons::ABORTED, "action is Abort: no pass is begun");
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
