//! How far a HostUpdate is, and what is begun or taken back next. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use serde_json::{Map, Value, json};
use understudy_api::conditions::{reasons, types};
use understudy_api::host_update::UpdatedNode;
use understudy_api::node_update::HostBoot;
use understudy_api::rollout::{Seen, Want, aborted, pass_name, want};
use understudy_api::window::Passage;
use understudy_api::{HostUpdate, NodeUpdate, NodeUpdatePhase, duration};

use super::{FINALIZER, history};
use crate::node_update;
use crate::place::{Agent, NodeView, Owned, Place};
use crate::write::diff::{carry, has_finalizer};
use crate::write::{Note, Status};

/// How often it is looked for Pods and alerts that block.
const LOOK: Duration = Duration::from_secs(15);

/// What a HostUpdate depends on.
pub struct Found {
    /// The selected nodes, by name.
    pub places: Vec<Place>,
    /// Its NodeUpdates.
    pub passes: Vec<Arc<NodeUpdate>>,
    /// Nodes that are not to be disturbed now, and why.
    pub blocked: BTreeMap<String, String>,
}

/// What shall be.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Whether the finalizer shall be there.
    pub is_kept: bool,
    /// The status; `None` leaves it alone.
    pub status: Option<Status>,
    /// Whether the status holds new picks.
    pub picks: bool,
    /// NodeUpdates to be made: picked before.
    pub make: Vec<NodeUpdate>,
    /// NodeUpdates to be taken back.
    pub delete: Vec<Arc<NodeUpdate>>,
    /// Finished NodeUpdates beyond what is kept of them.
    pub forget: Vec<Arc<NodeUpdate>>,
    /// Told when the status changes.
    pub notes: Vec<Note>,
    /// When time alone changes something.
    pub again: Option<Duration>,
}

/// One node, and where it stands.
struct Row {
    node: UpdatedNode,
    state: State,
    /// The NodeUpdate to make, where it is picked already.
    make: Option<NodeUpdate>,
    /// How the NodeUpdate would be called, where one may begin.
    pass: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Satisfied,
    /// Counts against `maxUnavailable`.
    Underway,
    /// Under way, and too long away: counts as failed as well.
    NotBack,
    Failed,
    /// A pass may begin.
    Ready,
    /// Not now.
    Waits,
}

/// What shall become of `update`.
pub fn build(update: &HostUpdate, found: &Found, now: Timestamp) -> Plan {
    let is_deleting = update.metadata.deletion_timestamp.is_some();
    let mut again: Option<Duration> = None;
    let mut rows: Vec<Row> = found
        .places
        .iter()
        .map(|place| row(update, place, found, now, &mut again))
        .collect();
    let picks = pick(update, &mut rows);
    let aborts = is_deleting || aborted(update).is_some();
    let delete: Vec<_> = found
        .passes
        .iter()
        .filter(|pass| aborts && pass.metadata.deletion_timestamp.is_none() && may_be_taken_back(pass))
        .cloned()
        .collect();
    let is_held = found
        .passes
        .iter()
        .filter(|pass| !node_update::has_given_back_its_node(pass))
        .any(|pass| has_finalizer(&pass.metadata, node_update::FINALIZER) || !phase_of(pass).is_terminal());
    let make = match is_deleting {
        true => Vec::new(),
        false => rows.iter_mut().filter_map(|row| row.make.take()).collect(),
    };
    Plan {
        is_kept: !is_deleting || (is_held && has_finalizer(&update.metadata, FINALIZER)),
        status: Some(status(update, &rows, now)),
        picks,
        make,
        delete,
        forget: history::beyond(update, found),
        notes: notes(update, &rows),
        again,
    }
}

pub(super) fn phase_of(pass: &NodeUpdate) -> NodeUpdatePhase {
    let phase = pass.status.as_ref().and_then(|status| status.phase);
    phase.unwrap_or_default()
}

/// Whether the host is not rebooting yet.
fn may_be_taken_back(pass: &NodeUpdate) -> bool {
    use NodeUpdatePhase::{Acknowledged, Notified, Pending, Saving};
    matches!(phase_of(pass), Pending | Notified | Saving | Acknowledged)
}

fn row(
    update: &HostUpdate,
    place: &Place,
    found: &Found,
    now: Timestamp,
    again: &mut Option<Duration>,
) -> Row {
    let node = place.node.clone().unwrap_or_default();
    let passes: Vec<NodeUpdate> = found
        .passes
        .iter()
        .filter(|pass| pass.spec.node_name == place.name)
        .map(|pass| NodeUpdate::clone(pass))
        .collect();
    let seen = Seen {
        name: place.name.clone(),
        identity: node.uid.clone(),
        labels: node.labels.clone(),
        kernel_release: node.kernel_release.clone(),
        // Unknown: no `bootedAfter` holds yet.
        booted_at: place.booted_at.unwrap_or(i64::MIN),
        now,
    };
    let before = update.status.iter().flat_map(|status| &status.nodes);
    let before = before.into_iter().find(|there| there.name == place.name);
    let mut row = Row {
        node: UpdatedNode {
            name: place.name.clone(),
            satisfied: false,
            node_update: before.and_then(|before| before.node_update.clone()),
            phase: before.and_then(|before| before.phase),
            reason: None,
            message: None,
        },
        state: State::Waits,
        make: None,
        pass: None,
    };
    // With the pass of this generation its node is unavailable until it can have Pods again.
    let name = pass_name(update, &node.uid);
    let was_back =
        before.is_some_and(|before| before.satisfied && before.node_update.as_ref() == Some(&name));
    let resumed = passes
        .iter()
        .find(|pass| pass.name_any() == name && phase_of(pass) == NodeUpdatePhase::Resumed);
    if let Some(pass) = resumed.filter(|_| !was_back)
        && let Some(why) = not_ready(pass, &node)
    {
        row.shows(pass, State::Underway);
        row.is(State::Underway, reasons::NODE_NOT_READY, why);
        row.is_back_in(update, pass, now, again);
        return row;
    }
    match want(update, &passes, &seen) {
        Want::NotSelected => {}
        Want::Satisfied(message) => {
            // While the API server was away its end may be all that was told of a pass.
            if let Some(pass) = resumed {
                row.shows(pass, State::Satisfied);
            }
            row.is(State::Satisfied, reasons::ALREADY_SATISFIED, message);
        }
        Want::Waits { reason, message } => {
            // A pick of which nothing was made is none any more.
            if row.node.phase.is_none() {
                row.node.node_update = None;
            }
            row.is(State::Waits, reason, message);
            if reason == reasons::WINDOW_CLOSED {
                sooner(again, opens_in(update, now));
            }
        }
        Want::Underway(pass) => {
            row.shows(&pass, State::Underway);
            if is_away(&pass, place) {
                row.is_back_in(update, &pass, now, again);
            }
        }
        Want::Failed(pass) => row.shows(&pass, State::Failed),
        Want::Pass(pass) => row.wants(update, *pass, &node.uid, before, place),
    }
    if row.state == State::Ready
        && let Some(why) = found.blocked.get(&place.name)
    {
        row.is(State::Waits, reasons::BLOCKED, why.clone());
        sooner(again, Some(LOOK));
    }
    row
}

fn sooner(again: &mut Option<Duration>, than: Option<Duration>) {
    *again = match (*again, than) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
}

/// How long the window stays closed.
fn opens_in(update: &HostUpdate, now: Timestamp) -> Option<Duration> {
    match update.spec.window.as_ref()?.at(now) {
        Ok(Passage::Closed { until, .. }) => {
            let left = until.duration_since(now).unsigned_abs() + Duration::from_millis(50);
            // A timer of months is none; it is looked at again tomorrow.
            Some(left.min(Duration::from_secs(86_400)))
        }
        _ => None,
    }
}

/// Whether the host was asked to reboot and its agent does not speak.
fn is_away(pass: &NodeUpdate, place: &Place) -> bool {
    use NodeUpdatePhase::{Acknowledged, Rebooting};
    place.agent != Agent::Lives && matches!(phase_of(pass), Rebooting | Acknowledged)
}

/// Why a node whose sessions go on cannot have Pods yet. The agent does not wait for the kubelet.
fn not_ready(pass: &NodeUpdate, node: &NodeView) -> Option<String> {
    let result = pass.status.as_ref().and_then(|status| status.result.as_ref());
    let boot = |boot: Option<&HostBoot>| boot.map(|boot| boot.boot_id.clone());
    let before = result.and_then(|result| boot(result.before.as_ref()));
    let after = result.and_then(|result| boot(result.after.as_ref()));
    if before != after && before.as_ref() == Some(&node.boot_id) {
        return Some("the host is back, and its kubelet does not tell of the new boot yet".to_owned());
    }
    node.is_unready
        .then(|| "the host is back, and its Node is not Ready yet".to_owned())
}

impl Row {
    fn is(&mut self, state: State, reason: &str, message: String) {
        self.state = state;
        self.node.satisfied = state == State::Satisfied;
        self.node.reason = Some(reason.to_owned());
        self.node.message = (!message.is_empty()).then_some(message);
    }

    fn shows(&mut self, pass: &NodeUpdate, state: State) {
        let status = pass.status.clone().unwrap_or_default();
        self.node.node_update = Some(pass.name_any());
        self.node.phase = Some(status.phase.unwrap_or_default());
        let reason = status.reason.unwrap_or_else(|| reasons::PENDING.to_owned());
        self.is(state, &reason, status.message.unwrap_or_default());
    }

    /// Under way until it is back: not for longer than `returnTimeout` after the pass has reached its phase.
    fn is_back_in(
        &mut self,
        update: &HostUpdate,
        pass: &NodeUpdate,
        now: Timestamp,
        again: &mut Option<Duration>,
    ) {
        let transitions = pass.status.iter().flat_map(|status| &status.phase_transitions);
        let Some(since) = transitions.last().map(|last| last.transition_time.0) else {
            return;
        };
        let limit = duration::parse(&update.spec.return_timeout).unwrap_or(Duration::from_secs(900));
        let limit = SignedDuration::try_from(limit).unwrap_or(SignedDuration::MAX);
        let left = limit - now.duration_since(since);
        if left.is_positive() {
            sooner(again, Some(left.unsigned_abs() + Duration::from_millis(50)));
            return;
        }
        let what = match phase_of(pass) {
            NodeUpdatePhase::Resumed => self.node.message.clone().unwrap_or_default(),
            _ => "the host was asked to reboot and is not back".to_owned(),
        };
        let message = format!(
            "{what}; waited for {} (returnTimeout)",
            update.spec.return_timeout
        );
        self.is(State::NotBack, reasons::HOST_NOT_BACK, message);
    }

    /// A pass is wanted, and there is none. Was it picked, or was it made and is gone?
    fn wants(
        &mut self,
        update: &HostUpdate,
        pass: NodeUpdate,
        uid: &str,
        before: Option<&UpdatedNode>,
        place: &Place,
    ) {
        let name = pass_name(update, uid);
        let picked = before.filter(|before| before.node_update.as_deref() == Some(&name));
        match picked.map(|before| before.phase) {
            Some(None) => {
                self.node.phase = None;
                self.is(State::Underway, reasons::PENDING, "it is picked".to_owned());
                self.make = Some(owned(update, pass));
            }
            Some(Some(NodeUpdatePhase::Resumed)) if update.spec.expect.is_none() => {
                let message = format!("it was updated by NodeUpdate {name}");
                self.is(State::Satisfied, reasons::ALREADY_SATISFIED, message);
            }
            Some(Some(_)) => {
                let message = format!("NodeUpdate {name} is gone; a change of the HostUpdate is another try");
                self.is(State::Failed, reasons::NODE_UPDATE_GONE, message);
            }
            None => match place.vacancy() {
                Ok(_) => {
                    let why = pass.spec.reason.clone().unwrap_or_default();
                    self.pass = Some(name);
                    self.is(State::Ready, reasons::PENDING, why);
                }
                Err(refusal) => self.is(State::Waits, refusal.reason, refusal.message),
            },
        }
    }
}

fn owned(update: &HostUpdate, mut pass: NodeUpdate) -> NodeUpdate {
    pass.metadata.owner_references = Some(vec![OwnerReference {
        api_version: HostUpdate::api_version(&()).into_owned(),
        kind: HostUpdate::kind(&()).into_owned(),
        name: update.name_any(),
        uid: update.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    pass
}

/// Picks the next nodes; whether there are any.
fn pick(update: &HostUpdate, rows: &mut [Row]) -> bool {
    let count =
        |rows: &[Row], states: &[State]| rows.iter().filter(|row| states.contains(&row.state)).count();
    let failed = count(rows, &[State::Failed, State::NotBack]);
    let may_fail = usize::try_from(update.spec.max_failures).unwrap_or(0);
    let most = update.spec.may_be_unavailable(rows.len());
    let mut underway = count(rows, &[State::Underway, State::NotBack]);
    let mut picks = false;
    for row in rows.iter_mut().filter(|row| row.state == State::Ready) {
        let why = row.node.message.clone().unwrap_or_default();
        if failed > may_fail {
            let message =
                format!("{failed} nodes have failed (maxFailures: {may_fail}): no other is begun; {why}");
            row.is(State::Waits, reasons::NODES_FAILED, message);
        } else if underway >= most {
            let message = format!("{underway} nodes are under way (maxUnavailable); {why}");
            row.is(State::Waits, reasons::MAX_UNAVAILABLE, message);
        } else {
            underway += 1;
            picks = true;
            row.state = State::Underway;
            row.node.phase = None;
            row.node.node_update = row.pass.take();
        }
    }
    picks
}

fn status(update: &HostUpdate, rows: &[Row], now: Timestamp) -> Status {
    let number = |states: &[State]| {
        let count = rows.iter().filter(|row| states.contains(&row.state)).count();
        i32::try_from(count).unwrap_or(i32::MAX)
    };
    let generation = update.metadata.generation.unwrap_or(0);
    let live = update.status.clone().unwrap_or_default();
    let overall = overall(update, rows);
    let wanted = [
        (types::READY, overall.ready),
        (types::RECONCILING, overall.reconciling),
        (types::STALLED, overall.stalled),
    ]
    .map(|(kind, status)| Owned::new(kind, status, overall.reason, overall.message.clone()));
    let wanted: Vec<_> = wanted.iter().map(Owned::wanted).collect();
    let conditions = carry(&live.conditions, generation, now, &wanted);
    let nodes: Vec<&UpdatedNode> = rows.iter().map(|row| &row.node).collect();
    let mut fields = json!({
        "observedGeneration": generation,
        "selected": rows.len(),
        "updated": number(&[State::Satisfied]),
        "underway": number(&[State::Underway, State::NotBack]),
        "failed": number(&[State::Failed, State::NotBack]),
        "nodes": nodes,
        "conditions": conditions,
    });
    if let Some(aborted) = aborted(update) {
        fields["aborted"] = json!(aborted);
    }
    Status {
        fields: match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        },
        force: false,
        exact: true,
    }
}

struct Overall {
    ready: bool,
    reconciling: bool,
    stalled: bool,
    reason: &'static str,
    message: String,
}

fn overall(update: &HostUpdate, rows: &[Row]) -> Overall {
    let names = |states: &[State]| {
        let names: Vec<String> = rows
            .iter()
            .filter(|row| states.contains(&row.state))
            .map(|row| match &row.node.reason {
                Some(reason) => format!("{} ({reason})", row.node.name),
                None => row.node.name.clone(),
            })
            .collect();
        names
    };
    let some = |names: &[String]| {
        let mut some = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        if names.len() > 5 {
            some.push_str(", …");
        }
        some
    };
    let updated = rows.iter().filter(|row| row.state == State::Satisfied).count();
    let (underway, failed, waits) = (
        names(&[State::Underway, State::NotBack]),
        names(&[State::Failed, State::NotBack]),
        names(&[State::Waits]),
    );
    let mut message = format!("{updated} of {} nodes are as declared", rows.len());
    for (what, names) in [("under way", &underway), ("failed", &failed), ("waiting", &waits)] {
        if !names.is_empty() {
            message.push_str(&format!("; {what}: {}", some(names)));
        }
    }
    let is = |ready, reconciling, stalled, reason| Overall {
        ready,
        reconciling,
        stalled,
        reason,
        message: message.clone(),
    };
    let may_fail = usize::try_from(update.spec.max_failures).unwrap_or(0);
    if rows.is_empty() {
        let mut overall = is(true, false, false, reasons::NOT_SELECTED);
        overall.message = "spec.nodeSelector selects no node".to_owned();
        return overall;
    }
    if updated == rows.len() {
        return is(true, false, false, reasons::ALREADY_SATISFIED);
    }
    let is_moving = rows.iter().any(|row| row.state == State::Underway);
    if failed.len() > may_fail || (!failed.is_empty() && !is_moving && waits.is_empty()) {
        // What is under way is still waited for; it does not make the failure good.
        return is(false, false, true, reasons::NODES_FAILED);
    }
    if is_moving || update.metadata.deletion_timestamp.is_some() {
        return is(false, true, false, reasons::IN_PROGRESS);
    }
    if aborted(update).is_some() {
        return is(false, false, false, reasons::ABORTED);
    }
    if update.spec.paused {
        return is(false, false, false, reasons::PAUSED);
    }
    is(false, true, false, reasons::PENDING)
}

/// What is news of single nodes.
fn notes(update: &HostUpdate, rows: &[Row]) -> Vec<Note> {
    let before = |name: &str| {
        let mut nodes = update.status.iter().flat_map(|status| &status.nodes);
        nodes.find(|there| there.name == name)
    };
    rows.iter()
        .filter(|row| {
            let reason = before(&row.node.name).and_then(|before| before.reason.as_ref());
            let is_news = reason != row.node.reason.as_ref();
            is_news && matches!(row.state, State::Failed | State::NotBack)
        })
        .map(|row| Note {
            warning: true,
            reason: row.node.reason.clone().unwrap_or_default(),
            message: format!(
                "node {}: {}",
                row.node.name,
                row.node.message.clone().unwrap_or_default()
            ),
        })
        .collect()
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
