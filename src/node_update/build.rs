//! What a NodeUpdate shall be, and its node, of what was found. Pure.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use understudy_api::conditions::{reasons, types};
use understudy_api::host_update::DrainMode;
use understudy_api::node_update::{NodeUpdateStatus, Origin};
use understudy_api::{NodeUpdate, NodeUpdatePhase, duration};

use super::FINALIZER;
use super::credential::{self, Said};
use super::drain::Pods;
use super::status::{Writing, condition};
use crate::place::{NodeView, Owned, Place, Refusal, Standing};
use crate::write::diff::{has_finalizer, is_claimed};
use crate::write::{Note, Status};

/// How often it is looked for Pods that are left.
const LOOK: Duration = Duration::from_secs(3);

/// What a NodeUpdate depends on.
pub struct Found {
    /// Its node.
    pub place: Place,
    /// All NodeUpdates of the node, this one among them.
    pub others: Vec<Arc<NodeUpdate>>,
    /// What is left on the node, where it is being drained.
    pub pods: Option<Pods>,
    /// What was done for the credential, where anything was.
    pub said: Option<Said>,
}

/// What is done to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cordon {
    /// It is cordoned, for this NodeUpdate.
    Set,
    /// What the operator did to it is taken back.
    Release,
}

/// What shall be.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Whether the finalizer shall be there.
    pub is_kept: bool,
    /// What is done to the node.
    pub cordon: Option<Cordon>,
    /// The status; `None` leaves it alone.
    pub status: Option<Status>,
    /// Told when the status changes.
    pub note: Option<Note>,
    /// When it is looked at again.
    pub again: Option<Duration>,
}

/// Whether the node's Pods are to be looked at.
pub fn drains(update: &NodeUpdate, found: &Found) -> bool {
    let evicts = (update.spec.drain.as_ref()).is_none_or(|drain| drain.mode == DrainMode::Evict);
    evicts && stage(update, found) == Stage::Drain
}

/// Whether the agent may begin soon: by then it must have all that it needs. What is made for it is undone by who
/// holds the finalizer.
pub fn begins(update: &NodeUpdate, found: &Found) -> bool {
    has_finalizer(&update.metadata, FINALIZER) && matches!(stage(update, found), Stage::Cordon | Stage::Drain)
}

/// How far the operator's part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Another NodeUpdate has the node.
    Busy,
    /// Node or agent are not there.
    NoAgent,
    /// The node is to be cordoned.
    Cordon,
    /// The node is to be drained.
    Drain,
    /// It is the agent's.
    Agent,
    /// It is taken back before the agent had it.
    TakeBack,
    /// The node is gone or another one.
    Lost,
    /// It is over.
    Over,
}

fn status_of(update: &NodeUpdate) -> NodeUpdateStatus {
    update.status.clone().unwrap_or_default()
}

fn is_true(status: &NodeUpdateStatus, kind: &str) -> bool {
    condition(status, kind).is_some_and(|condition| condition.status == "True")
}

fn is_over(update: &NodeUpdate) -> bool {
    let phase = update.status.as_ref().and_then(|status| status.phase);
    phase.is_some_and(NodeUpdatePhase::is_terminal)
}

fn stage(update: &NodeUpdate, found: &Found) -> Stage {
    let status = status_of(update);
    if is_over(update) {
        return Stage::Over;
    }
    let standing = match &status.node_uid {
        Some(uid) => found.place.standing(uid),
        None => Standing::Here,
    };
    if standing.is_lost() || (standing.releases() && update.metadata.deletion_timestamp.is_some()) {
        return Stage::Lost;
    }
    let has_begun =
        is_claimed(&update.metadata) && (status.phase).is_some_and(|phase| phase != NodeUpdatePhase::Pending);
    let is_agents = update.spec.origin == Origin::Host || is_true(&status, types::DRAINED) || has_begun;
    if is_agents {
        return Stage::Agent;
    }
    if update.metadata.deletion_timestamp.is_some() {
        return Stage::TakeBack;
    }
    let has_node = condition(&status, types::CORDONED).is_some_and(|there| there.status == "True");
    if !has_node && holder(update, found).is_some() {
        return Stage::Busy;
    }
    if found.place.vacancy().is_err() {
        return Stage::NoAgent;
    }
    let node = found.place.node.as_ref();
    // The note of a NodeUpdate that is no more was left behind: the cordon is the operator's still.
    let is_left_behind = node
        .and_then(|node| node.cordoned_for.as_ref())
        .is_some_and(|holder| *holder != update.name_any());
    if has_node || (node.is_some_and(|node| node.is_cordoned) && !is_left_behind) {
        return Stage::Drain;
    }
    Stage::Cordon
}

/// Who has the node before this one: whoever is not over and older, or still has it cordoned.
fn holder(update: &NodeUpdate, found: &Found) -> Option<String> {
    let name = update.name_any();
    let age = |update: &NodeUpdate| {
        let made = update.creation_timestamp().map(|made| made.0);
        (made, update.name_any())
    };
    let cordoned_for = found
        .place
        .node
        .as_ref()
        .and_then(|node| node.cordoned_for.clone());
    let older = found.others.iter().find(|other| {
        other.name_any() != name
            && !is_over(other)
            && (age(other) < age(update) || other.spec.origin == Origin::Host)
    });
    older.map(|other| other.name_any()).or(cordoned_for
        .filter(|holder| *holder != name && found.others.iter().any(|other| other.name_any() == *holder)))
}

/// What shall become of `update`.
pub fn build(update: &NodeUpdate, found: &Found, now: Timestamp) -> Plan {
    let status = status_of(update);
    let writing = Writing {
        update,
        status: &status,
        place: &found.place,
        said: found.said.as_ref(),
        now,
    };
    let is_deleting = update.metadata.deletion_timestamp.is_some();
    // A finalizer cannot be added to what is being deleted.
    let is_kept = !is_deleting || has_finalizer(&update.metadata, FINALIZER);
    let kept = |plan: Plan| Plan { is_kept, ..plan };
    let stage = stage(update, found);
    let lacks_credential =
        update.is_kept_by_operator() && status.credential.is_none() && found.said.is_none();
    if lacks_credential && matches!(stage, Stage::Cordon | Stage::Drain) {
        // With the finalizer comes the next pass, and with that the credential.
        return kept(Plan::default());
    }
    match stage {
        Stage::Over => over(update, &writing),
        Stage::Lost => {
            let uid = status.node_uid.as_deref().unwrap_or_default();
            let loss = match found.place.standing(uid) {
                Standing::OutOfService => Refusal::new(
                    reasons::NODE_OUT_OF_SERVICE,
                    format!("Node {} is out of service", found.place.name),
                ),
                standing => standing.loss(&found.place.name),
            };
            let mut plan = kept(writing.end(NodeUpdatePhase::Failed, &loss));
            if let Some(status) = &mut plan.status {
                status.force = true;
            }
            plan
        }
        Stage::Agent => kept(writing.agents(Vec::new())),
        Stage::TakeBack => {
            let why = Refusal::new(reasons::ABORTED, "it was deleted before it had begun".to_owned());
            kept(writing.end(NodeUpdatePhase::Aborted, &why))
        }
        Stage::Busy => {
            let holder = holder(update, found).unwrap_or_default();
            kept(writing.waits(
                &Refusal::new(
                    reasons::NODE_BUSY,
                    format!("waits for NodeUpdate {holder} of the same node"),
                ),
                Vec::new(),
            ))
        }
        Stage::NoAgent => match found.place.vacancy() {
            Err(refusal) => kept(writing.waits(&refusal, Vec::new())),
            Ok(_) => kept(Plan::default()),
        },
        Stage::Cordon => kept(Plan {
            cordon: Some(Cordon::Set),
            ..writing.waits(
                &Refusal::new(reasons::CORDONED, format!("cordoning node {}", found.place.name)),
                vec![cordoned_by_us(&found.place.name)],
            )
        }),
        Stage::Drain => kept(drain(update, found, &writing)),
    }
}

fn cordoned_by_us(node: &str) -> Owned {
    let message = format!("the operator has cordoned node {node}");
    Owned::new(types::CORDONED, true, reasons::CORDONED, message)
}

fn drain(update: &NodeUpdate, found: &Found, writing: &Writing<'_>) -> Plan {
    let node = &found.place.name;
    let cordoned = match condition(writing.status, types::CORDONED) {
        Some(there) if there.status == "True" => {
            Owned::new(types::CORDONED, true, &there.reason, there.message.clone())
        }
        _ if is_cordoned_for(found.place.node.as_ref(), update) => cordoned_by_us(node),
        _ => Owned::new(
            types::CORDONED,
            true,
            reasons::ALREADY_CORDONED,
            format!("an administrator had cordoned node {node}; it stays so"),
        ),
    };
    let settings = update.spec.drain.clone().unwrap_or_default();
    if settings.mode == DrainMode::None {
        let message = "drain.mode is None: Pods stay until the host goes down".to_owned();
        let drained = Owned::new(types::DRAINED, true, reasons::NOT_ASKED_FOR, message.clone());
        return writing.waits(&Refusal::new(reasons::PENDING, message), vec![cordoned, drained]);
    }
    let Some(pods) = &found.pods else {
        return Plan {
            again: Some(LOOK),
            ..Plan::default()
        };
    };
    if pods.left.is_empty() {
        let message = format!("no ordinary Pod is left on node {node}");
        let drained = Owned::new(types::DRAINED, true, reasons::DRAINED, message);
        let waits = Refusal::new(reasons::PENDING, format!("the agent of node {node} may begin"));
        return writing.waits(&waits, vec![cordoned, drained]);
    }
    let left = tell(pods);
    // From when the node was cordoned on.
    let limit = duration::parse(&settings.timeout).unwrap_or(Duration::from_secs(3600));
    let limit = SignedDuration::try_from(limit).unwrap_or(SignedDuration::MAX);
    let since = condition(writing.status, types::CORDONED)
        .filter(|there| there.status == "True")
        .map_or(writing.now, |there| there.last_transition_time.0);
    if writing.now.duration_since(since) >= limit {
        let message = format!("{left}; waited for {} (drain.timeout)", settings.timeout);
        return writing.end(
            NodeUpdatePhase::Failed,
            &Refusal::new(reasons::DRAIN_TIMED_OUT, message),
        );
    }
    let drained = Owned::new(types::DRAINED, false, reasons::DRAINING, left.clone());
    Plan {
        again: Some(LOOK),
        ..writing.waits(&Refusal::new(reasons::DRAINING, left), vec![cordoned, drained])
    }
}

/// Which Pods are left, the first few by name.
fn tell(pods: &Pods) -> String {
    const SOME: usize = 5;
    let mut names: Vec<&str> = pods.left.iter().take(SOME).map(String::as_str).collect();
    if pods.left.len() > SOME {
        names.push("…");
    }
    let mut text = format!("{} left: {}", pods.left.len(), names.join(", "));
    if let Some((name, why)) = pods.blocked.first() {
        text.push_str(&format!(
            "; {} may not be evicted now, such as {name}: {why}",
            pods.blocked.len()
        ));
    }
    text
}

fn is_cordoned_for(node: Option<&NodeView>, update: &NodeUpdate) -> bool {
    node.is_some_and(|node| node.cordoned_for.as_deref() == Some(&update.name_any()))
}

fn over(update: &NodeUpdate, writing: &Writing<'_>) -> Plan {
    let node = writing.place.node.as_ref();
    let is_kept = update.metadata.deletion_timestamp.is_none() || has_finalizer(&update.metadata, FINALIZER);
    if is_cordoned_for(node, update) {
        return Plan {
            is_kept,
            cordon: Some(Cordon::Release),
            // Once the node is seen without the note the rest follows.
            status: Some(writing.conditions_only(vec![Owned::new(
                types::UNCORDONED,
                true,
                reasons::UNCORDONED,
                format!("the operator has uncordoned node {}", writing.place.name),
            )])),
            ..Plan::default()
        };
    }
    let was = condition(writing.status, types::CORDONED).filter(|there| there.status == "True");
    let told = condition(writing.status, types::UNCORDONED).is_some_and(|there| there.status == "True");
    let status = was.filter(|_| !told).map(|there| {
        let (reason, message) = match there.reason.as_str() {
            reasons::ALREADY_CORDONED => (
                reasons::ALREADY_CORDONED,
                format!(
                    "node {} stays cordoned: an administrator had cordoned it",
                    writing.place.name
                ),
            ),
            _ => (
                reasons::UNCORDONED,
                format!("the operator has uncordoned node {}", writing.place.name),
            ),
        };
        writing.conditions_only(vec![Owned::new(types::UNCORDONED, true, reason, message)])
    });
    let of_credential = || writing.said.map(|_| writing.conditions_only(Vec::new()));
    Plan {
        // Sessions that wait to be resumed need the credential, and that goes with the NodeUpdate.
        is_kept: is_kept && credential::is_needed(update, writing.place),
        status: status.or_else(of_credential),
        ..Plan::default()
    }
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
