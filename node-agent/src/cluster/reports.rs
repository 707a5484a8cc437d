//! What of a status is the agent's, whether it must be written now, and how. Pure.

use std::time::{Duration, Instant};

use kube::core::params::PatchParams;
use serde_json::{Map, Value, json};
use understudy_api::ObjectMeta;
use understudy_api::conditions::types::OPERATORS;
use understudy_api::managers::{AGENT, OPERATOR};

/// Fields of an assigned object's status that the operator writes.
const ASSIGNMENT: [&str; 3] = ["nodeName", "nodeUID", "credential"];
/// Of these a change is told at once; of conditions their status, as [`headline`] says.
const HEADLINES: [&str; 9] = [
    "phase",
    "credentialRequest",
    "action",
    "rebootRequest",
    "incarnation",
    "bootID",
    "session",
    "nodeUID",
    "agentVersion",
];

/// How often one object's progress is written, at most.
pub const PROGRESS: Duration = Duration::from_secs(5);
/// The same of the Host: its heartbeat.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// Pauses after a write that somebody else's stood against.
const CONFLICT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(60));
/// Pauses after a write that was refused as such: invalid, or not allowed.
const REFUSED: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// The agent's part of an assigned object's status: all but the assignment and the operator's conditions.
pub fn agents_part(status: Option<Value>) -> Value {
    let Some(Value::Object(mut fields)) = status else {
        return Value::Object(Map::new());
    };
    for field in ASSIGNMENT {
        fields.remove(field);
    }
    if let Some(Value::Array(conditions)) = fields.get_mut("conditions") {
        let is_ours = |condition: &Value| {
            let kind = condition["type"].as_str();
            kind.is_none_or(|kind| !OPERATORS.contains(&kind))
        };
        conditions.retain(is_ours);
        // A map by type in the API server: the order says nothing.
        conditions.sort_by_key(|condition| condition["type"].as_str().map(str::to_owned));
        if conditions.is_empty() {
            fields.remove("conditions");
        }
    }
    Value::Object(fields)
}

/// What is told at once when it changes.
fn headline(status: &Value) -> Vec<Value> {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    HEADLINES
        .iter()
        .map(|field| status[*field].clone())
        .chain(conditions.map(|condition| json!([condition["type"], condition["status"]])))
        .collect()
}

/// Whose the fields of a status are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The agent has it: it owns the phase.
    pub is_made: bool,
    /// The operator owns nothing any more that the agent writes: until it has let go of the phase that it had
    /// written, the agent's next phase would be a conflict.
    pub is_whole: bool,
}

impl Claim {
    /// Whether a write must force.
    ///
    /// `managedFields` decides, and nothing that we remember: it survives the loss of our state directory, and it
    /// shows when the operator has taken an object back that it thought lost. After that nobody forces.
    pub fn forces(self) -> bool {
        !(self.is_made && self.is_whole)
    }
}

/// Looks whose an object is. `field`: what the agent owns of every status of that kind, and the operator takes with it.
pub fn claim(meta: &ObjectMeta, field: &str) -> Claim {
    let field = format!("f:{field}");
    let mut claim = Claim {
        is_made: false,
        is_whole: true,
    };
    for entry in meta.managed_fields.iter().flatten() {
        let is_applied =
            entry.operation.as_deref() == Some("Apply") && entry.subresource.as_deref() == Some("status");
        let Some(fields) = entry.fields_v1.as_ref().filter(|_| is_applied) else {
            continue;
        };
        let status = &fields.0["f:status"];
        match entry.manager.as_deref() {
            Some(AGENT) => claim.is_made |= status[&field].is_object(),
            Some(OPERATOR) => claim.is_whole &= !has_ours(status),
            _ => {}
        }
    }
    claim
}

fn has_ours(status: &Value) -> bool {
    let fields = status.as_object().into_iter().flatten();
    fields
        .filter_map(|(name, value)| Some((name.strip_prefix("f:")?, value)))
        .any(|(name, value)| match name {
            "conditions" => value
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(key, _)| key.starts_with("k:"))
                .any(|(key, _)| !OPERATORS.iter().any(|kind| key.contains(&format!("{kind:?}")))),
            name => !ASSIGNMENT.contains(&name),
        })
}

/// What was tried for one object.
#[derive(Clone, Debug, Default)]
pub struct Attempts {
    written: Option<Instant>,
    failures: u32,
    not_before: Option<Instant>,
    told: Option<String>,
}

/// What a write came to, where the API server has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was written.
    Written,
    /// Somebody has written the object meanwhile, or owns a field of ours: look again.
    Conflict(String),
    /// The object is not there any more.
    Gone,
    /// The API server does not take this, whoever asks again: invalid, or not allowed.
    Refused(String),
}

impl Attempts {
    /// Takes an answer in. Returns what is to be logged: a trouble that is new.
    pub fn take(&mut self, answer: &Answer, now: Instant) -> Option<String> {
        let (trouble, (first, last)) = match answer {
            Answer::Written | Answer::Gone => {
                *self = Attempts {
                    written: Some(now),
                    ..Attempts::default()
                };
                return None;
            }
            Answer::Conflict(trouble) => (trouble, CONFLICT),
            Answer::Refused(trouble) => (trouble, REFUSED),
        };
        let pause = first.saturating_mul(1 << self.failures.min(12)).min(last);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + pause);
        // The first conflict is the ordinary course of optimistic writes.
        let is_told = self.failures == 1 && matches!(answer, Answer::Conflict(_));
        if is_told || self.told.as_ref() == Some(trouble) {
            return None;
        }
        self.told = Some(trouble.clone());
        Some(trouble.clone())
    }
}

/// When a status is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// It is there already.
    Never,
    /// Not before.
    At(Instant),
    /// At once.
    Now,
}

/// Decides when `wanted` is written where `there` is what the API server has. A phase is written once and at
/// once, progress now and then, what has not changed never, but to claim the object.
pub fn due(
    wanted: &Value,
    there: &Value,
    claim: Claim,
    attempts: &Attempts,
    pace: Duration,
    now: Instant,
) -> Due {
    if wanted == there && claim.is_made {
        return Due::Never;
    }
    let is_news = headline(wanted) != headline(there);
    let paced = attempts.written.filter(|_| !is_news).map(|then| then + pace);
    match paced.into_iter().chain(attempts.not_before).max() {
        Some(then) if then > now => Due::At(then),
        _ => Due::Now,
    }
}

/// How a write is made.
#[derive(Clone, Debug)]
pub struct Write {
    /// The patch's body.
    pub body: Value,
    /// Manager, and force at a claim only.
    pub params: PatchParams,
}

/// The object that is written to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// `apiVersion`.
    pub api_version: &'a str,
    /// `kind`.
    pub kind: &'a str,
    /// As the API server has it.
    pub meta: &'a ObjectMeta,
}

/// The write of a status. The UID goes with it, so that an object that was made anew meanwhile is not taken for
/// this one; the version of what was looked at where a decision hangs on it: at claims, and where it ends.
pub fn write(target: Target<'_>, status: Value, forces: bool, is_end: bool) -> Write {
    let mut metadata = Map::new();
    metadata.insert("name".to_owned(), json!(target.meta.name));
    for (field, value, is_sent) in [
        ("namespace", &target.meta.namespace, true),
        ("uid", &target.meta.uid, true),
        ("resourceVersion", &target.meta.resource_version, forces || is_end),
    ] {
        if let Some(value) = value.as_ref().filter(|_| is_sent) {
            metadata.insert(field.to_owned(), json!(value));
        }
    }
    let body = json!({
        "apiVersion": target.api_version,
        "kind": target.kind,
        "metadata": metadata,
        "status": status,
    });
    let mut params = PatchParams::apply(AGENT);
    params.force = forces;
    Write { body, params }
}

/// Whether one version of an object is older than another: what the answer to a write has told is not undone by
/// an event that was on its way.
pub fn is_older(event: &ObjectMeta, known: &ObjectMeta) -> bool {
    let version = |meta: &ObjectMeta| meta.resource_version.as_ref()?.parse::<u64>().ok();
    match (version(event), version(known)) {
        (Some(there), Some(here)) => event.uid == known.uid && there < here,
        _ => false,
    }
}

#[cfg(test)]
#[path = "reports_test.rs"]
mod tests;
