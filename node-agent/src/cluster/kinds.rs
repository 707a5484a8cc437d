//! What the link must know of the kinds that are assigned to nodes.

use jiff::Timestamp;
use kube::core::ApiResource;
use understudy_api::conditions::{self, Standing, reasons, types};
use understudy_api::node_update::Origin;
use understudy_api::{Condition, Guest, NodeUpdate, NodeUpdatePhase, Phase, SeamlessReboot};

use crate::store::Object;

/// What an object that was begun by an agent whose records are lost says.
pub const RECORDS_LOST: &str = "it was begun, and the node agent has no record of it any more (its state directory was lost, or the record removed): it is not begun a second time";

/// A kind whose objects the operator assigns to nodes.
pub trait Mirrored: Object + std::fmt::Debug + Send + Sync + 'static {
    /// The field that names the node, as watches select it.
    const NODE_FIELD: &'static str;

    /// How the API server calls the kind.
    fn resource() -> ApiResource;
    /// UID of the Node it is assigned to.
    fn node_uid(&self) -> Option<&str>;
    /// Whether it is this Node's: of this UID, not only of its name.
    fn is_of_node(&self, uid: &str) -> bool {
        self.node_uid() == Some(uid)
    }
    /// Conditions of its status.
    fn conditions(&self) -> &[Condition];
    /// Takes from another object's status what the operator writes.
    fn take_assignment(&mut self, other: &Self);
    /// Whether it has come to its end: nothing is begun or driven for it.
    fn is_over(&self) -> bool;
    /// Whether something was begun for it.
    fn is_begun(&self) -> bool;
    /// Its phase, as the API names it.
    fn phase(&self) -> Option<String>;
    /// Reason and message of what it says now, for events.
    fn words(&self) -> (String, String);
    /// Ends one that a former agent had begun.
    fn fail_as_lost(&mut self, now: Timestamp);
    /// Whether it began on this node and is no assignment: the local object, with a UID of its own, is the truth.
    fn is_local(&self) -> bool {
        false
    }
    /// Prepares a local object for its end in favour of another of the same name.
    fn displace(&mut self) {}

    /// Whether it has this condition with status `True`.
    fn has(&self, kind: &str) -> bool {
        self.conditions()
            .iter()
            .any(|there| there.type_ == kind && there.status == "True")
    }
}

/// Replaces the operator's conditions in `ours` by those in `theirs`.
fn take_conditions(ours: &mut Vec<Condition>, theirs: &[Condition]) {
    let is_operators = |condition: &Condition| types::OPERATORS.contains(&condition.type_.as_str());
    // Where nothing changed the order stays too, so that the same thing is not written again.
    let there: Vec<&Condition> = ours.iter().filter(|condition| is_operators(condition)).collect();
    let wanted: Vec<&Condition> = theirs
        .iter()
        .filter(|condition| is_operators(condition))
        .collect();
    if there == wanted {
        return;
    }
    let wanted: Vec<Condition> = wanted.into_iter().cloned().collect();
    ours.retain(|condition| !is_operators(condition));
    ours.splice(0..0, wanted);
}

macro_rules! take_assignment {
    ($($field:ident),*) => {
        fn take_assignment(&mut self, other: &Self) {
            if self.status.is_none() && other.status.is_none() {
                return;
            }
            let theirs = other.status.clone().unwrap_or_default();
            let ours = self.status.get_or_insert_default();
            $(ours.$field = theirs.$field.clone();)*
            take_conditions(&mut ours.conditions, &theirs.conditions);
        }
    };
}

macro_rules! status_parts {
    ($kind:ty) => {
        fn resource() -> ApiResource {
            ApiResource::erase::<$kind>(&())
        }
        fn node_uid(&self) -> Option<&str> {
            self.status.as_ref()?.node_uid.as_deref()
        }
        fn conditions(&self) -> &[Condition] {
            self.status
                .as_ref()
                .map_or(&[], |status| &status.conditions)
        }
    };
}

macro_rules! phased {
    ($phase:ty) => {
        fn is_over(&self) -> bool {
            let phase = self.status.as_ref().and_then(|status| status.phase);
            phase.is_some_and(<$phase>::is_terminal)
        }
        fn is_begun(&self) -> bool {
            let phase = self.status.as_ref().and_then(|status| status.phase);
            phase.is_some_and(|phase| phase != <$phase>::Pending)
        }
        fn phase(&self) -> Option<String> {
            let phase = self.status.as_ref()?.phase?;
            Some(phase.to_string())
        }
        fn words(&self) -> (String, String) {
            let status = self.status.as_ref();
            let text = |text: Option<&String>| text.cloned().unwrap_or_default();
            (
                text(status.and_then(|status| status.reason.as_ref())),
                text(status.and_then(|status| status.message.as_ref())),
            )
        }
        fn fail_as_lost(&mut self, now: Timestamp) {
            let generation = self.generation();
            let status = self.status.get_or_insert_default();
            status.observed_generation = generation;
            status.phase = Some(<$phase>::Failed);
            status.reason = Some(reasons::STEP_FAILED.to_owned());
            status.message = Some(RECORDS_LOST.to_owned());
            status.progress = None;
            conditions::set_for_phase(
                &mut status.conditions,
                generation,
                now,
                Standing::Bad,
                reasons::STEP_FAILED,
                RECORDS_LOST,
            );
        }
    };
}

impl Mirrored for Guest {
    const NODE_FIELD: &'static str = "status.nodeName";
    status_parts!(Guest);
    take_assignment!(node_name, node_uid);

    /// A guest does not end but by its deletion.
    fn is_over(&self) -> bool {
        false
    }
    fn is_begun(&self) -> bool {
        false
    }
    fn phase(&self) -> Option<String> {
        let phase = self.status.as_ref()?.phase?;
        Some(format!("{phase:?}"))
    }
    fn words(&self) -> (String, String) {
        let ready = self
            .conditions()
            .iter()
            .find(|condition| condition.type_ == types::READY);
        ready
            .map(|ready| (ready.reason.clone(), ready.message.clone()))
            .unwrap_or_default()
    }
    fn fail_as_lost(&mut self, _: Timestamp) {}
    fn displace(&mut self) {
        // Who deleted it did so without us, and what has its name now may well use its disks.
        self.spec.deletion_policy = understudy_api::guest::DeletionPolicy::Retain;
    }
}

impl Mirrored for SeamlessReboot {
    const NODE_FIELD: &'static str = "status.nodeName";
    status_parts!(SeamlessReboot);
    take_assignment!(node_name, node_uid);
    phased!(Phase);
}

impl Mirrored for NodeUpdate {
    const NODE_FIELD: &'static str = "spec.nodeName";
    status_parts!(NodeUpdate);
    take_assignment!(node_uid, credential);
    phased!(NodeUpdatePhase);

    /// Its spec names the node; the operator adds the UID when it has seen the node.
    fn is_of_node(&self, uid: &str) -> bool {
        self.node_uid().is_none_or(|there| there == uid)
    }
    fn is_local(&self) -> bool {
        self.spec.origin == Origin::Host
    }
}
