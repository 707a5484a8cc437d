//! What a SeamlessReboot shall be, of what was found. Pure.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use serde_json::{Map, json};
use understudy_api::conditions::{reasons, table, types};
use understudy_api::reboot::{PhaseTransition, SeamlessRebootStatus};
use understudy_api::{Guest, Phase, SeamlessReboot, Time, duration};

use super::FINALIZER;
use crate::place::{Owned, Place, Refusal};
use crate::write::diff::{carry, has_finalizer, is_claimed};
use crate::write::{Note, Status};

/// What a SeamlessReboot depends on.
pub struct Found {
    /// Its Guest.
    pub guest: Option<Arc<Guest>>,
    /// The node to which it or its Guest is assigned.
    pub place: Option<Place>,
}

/// What shall be.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Whether the finalizer shall be there.
    pub is_kept: bool,
    /// The status; `None` leaves it alone.
    pub status: Option<Status>,
    /// Told when the status changes.
    pub note: Option<Note>,
    /// Whether it was kept for as long as it asked.
    pub is_expired: bool,
    /// When time alone changes something.
    pub again: Option<Duration>,
}

/// What shall become of `reboot`.
pub fn build(reboot: &SeamlessReboot, found: &Found, now: Timestamp) -> Plan {
    let status = reboot.status.clone().unwrap_or_default();
    let is_deleting = reboot.metadata.deletion_timestamp.is_some();
    if status.phase.is_some_and(Phase::is_terminal) {
        return finished(reboot, &status, now);
    }
    let writing = Writing {
        reboot,
        status: &status,
        now,
    };
    match (&found.place, status.node_uid.as_deref()) {
        (Some(place), Some(uid)) => {
            let standing = place.standing(uid);
            if is_deleting && standing.releases() {
                return Plan::default();
            }
            let is_kept = !is_deleting || has_finalizer(&reboot.metadata, FINALIZER);
            if standing.is_lost() {
                let loss = standing.loss(&place.name);
                let mut plan = writing.end(&loss, Some((place, uid)));
                if let Some(status) = &mut plan.status {
                    status.force = true;
                }
                return plan;
            }
            let plan = writing.assigned(place, uid);
            Plan { is_kept, ..plan }
        }
        // Nobody has it: it may go.
        _ if is_deleting => Plan::default(),
        _ => unassigned(&writing, found),
    }
}

fn finished(reboot: &SeamlessReboot, status: &SeamlessRebootStatus, now: Timestamp) -> Plan {
    let ttl = reboot.spec.ttl_seconds_after_finished;
    let since = status.phase_transitions.last().map(|last| last.transition_time.0);
    let left = ttl.zip(since).map(|(ttl, since)| {
        now.duration_until(
            since
                .saturating_add(SignedDuration::from_secs(ttl))
                .unwrap_or(since),
        )
    });
    let is_deleting = reboot.metadata.deletion_timestamp.is_some();
    Plan {
        is_expired: !is_deleting && left.is_some_and(|left| !left.is_positive()),
        again: left
            .filter(|left| left.is_positive())
            .map(|left| left.unsigned_abs() + Duration::from_millis(50)),
        ..Plan::default()
    }
}

fn unassigned(writing: &Writing<'_>, found: &Found) -> Plan {
    let reboot = writing.reboot;
    let name = &reboot.spec.guest_name;
    let refusal = match (&found.guest, &found.place) {
        (None, _) => Refusal::new(
            reasons::GUEST_NOT_FOUND,
            format!(
                "there is no Guest {name} in namespace {}",
                reboot.namespace().unwrap_or_default()
            ),
        ),
        (Some(guest), _) if guest.metadata.deletion_timestamp.is_some() => {
            Refusal::new(reasons::GUEST_NOT_FOUND, format!("Guest {name} is being deleted"))
        }
        (Some(guest), Some(place)) if uid_of(guest).is_some() => {
            let uid = uid_of(guest).unwrap_or_default();
            let standing = place.standing(uid);
            if standing.is_lost() {
                standing.loss(&place.name)
            } else {
                match place.vacancy() {
                    Ok(uid) => {
                        return Plan {
                            is_kept: true,
                            ..writing.assigned(place, uid)
                        };
                    }
                    Err(refusal) => refusal,
                }
            }
        }
        (Some(guest), _) => Refusal::new(
            reasons::GUEST_NOT_ASSIGNED,
            format!("Guest {name} is not assigned to a node: {}", why_not(guest)),
        ),
    };
    let limit = duration::parse(&reboot.spec.timeouts.pending).unwrap_or(Duration::from_secs(300));
    let made = reboot.creation_timestamp().map_or(writing.now, |made| made.0);
    let waited = writing.now.duration_since(made);
    let limit = SignedDuration::try_from(limit).unwrap_or(SignedDuration::MAX);
    if waited >= limit {
        let message = format!(
            "{}; waited for {} (timeouts.pending)",
            refusal.message, reboot.spec.timeouts.pending
        );
        return writing.end(&Refusal::new(refusal.reason, message), None);
    }
    Plan {
        again: Some((limit - waited).unsigned_abs() + Duration::from_millis(50)),
        ..writing.waits(&refusal, found.place.as_ref())
    }
}

fn uid_of(guest: &Guest) -> Option<&str> {
    guest.status.as_ref()?.node_uid.as_deref()
}

fn why_not(guest: &Guest) -> String {
    let conditions = guest.status.iter().flat_map(|status| &status.conditions);
    let mut accepted = conditions.filter(|condition| condition.type_ == types::ACCEPTED);
    accepted.next().map_or_else(
        || "it was not looked at yet".to_owned(),
        |condition| condition.message.clone(),
    )
}

/// A status that is being put together.
struct Writing<'a> {
    reboot: &'a SeamlessReboot,
    status: &'a SeamlessRebootStatus,
    now: Timestamp,
}

impl Writing<'_> {
    fn conditions(&self, wanted: &[Owned]) -> serde_json::Value {
        let wanted: Vec<_> = wanted.iter().map(Owned::wanted).collect();
        let generation = self.reboot.metadata.generation.unwrap_or(0);
        json!(carry(&self.status.conditions, generation, self.now, &wanted))
    }

    fn phase(&self, phase: Phase, refusal: &Refusal, wanted: Vec<Owned>) -> Map<String, serde_json::Value> {
        let mut all = wanted;
        for (kind, status) in table(phase.into()) {
            all.push(Owned::new(kind, status, refusal.reason, refusal.message.clone()));
        }
        let mut transitions = self.status.phase_transitions.clone();
        if transitions.last().map(|last| last.phase) != Some(phase) {
            transitions.push(PhaseTransition {
                phase,
                transition_time: Time(self.now),
            });
        }
        let fields = json!({
            "observedGeneration": self.reboot.metadata.generation.unwrap_or(0),
            "phase": phase,
            "reason": refusal.reason,
            "message": refusal.message,
            "phaseTransitions": transitions,
            "conditions": self.conditions(&all),
        });
        match fields {
            serde_json::Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    /// It has a node: until its agent claims it the phase is the operator's.
    fn assigned(&self, place: &Place, uid: &str) -> Plan {
        let message = format!("assigned to node {}", place.name);
        let wanted = vec![
            Owned::new(types::ACCEPTED, true, reasons::ASSIGNED, message.clone()),
            place.agent_available(),
        ];
        let mut fields = if is_claimed(&self.reboot.metadata) {
            Map::from_iter([("conditions".to_owned(), self.conditions(&wanted))])
        } else {
            self.phase(
                Phase::Pending,
                &Refusal::new(reasons::ASSIGNED, message.clone()),
                wanted,
            )
        };
        fields.insert("nodeName".into(), json!(place.name));
        fields.insert("nodeUID".into(), json!(uid));
        let is_new = self.status.node_uid.is_none();
        let available = place.agent_available();
        let available = available.wanted();
        Plan {
            status: Some(Status {
                fields,
                ..Status::default()
            }),
            note: Some(match is_new {
                true => Note {
                    warning: false,
                    reason: reasons::ASSIGNED.to_owned(),
                    message,
                },
                false => Note {
                    warning: available.status != Some(true),
                    reason: available.reason.to_owned(),
                    message: available.message.to_owned(),
                },
            })
            // The claim is no news of the operator's.
            .filter(|_| is_new || self.is_news(available.reason)),
            ..Plan::default()
        }
    }

    fn is_news(&self, reason: &str) -> bool {
        let mut conditions = self.status.conditions.iter();
        conditions
            .find(|condition| condition.type_ == types::AGENT_AVAILABLE)
            .is_none_or(|condition| condition.reason != reason)
    }

    fn waits(&self, refusal: &Refusal, place: Option<&Place>) -> Plan {
        let available = match place {
            Some(place) => place.agent_available(),
            None => Owned::new(
                types::AGENT_AVAILABLE,
                false,
                refusal.reason,
                refusal.message.clone(),
            ),
        };
        let accepted = Owned::new(types::ACCEPTED, false, refusal.reason, refusal.message.clone());
        Plan {
            status: Some(Status {
                fields: self.phase(Phase::Pending, refusal, vec![accepted, available]),
                ..Status::default()
            }),
            note: Some(warning(refusal)),
            ..Plan::default()
        }
    }

    /// It has come to its end without an agent.
    fn end(&self, refusal: &Refusal, assigned: Option<(&Place, &str)>) -> Plan {
        let wanted = [types::ACCEPTED, types::AGENT_AVAILABLE]
            .map(|kind| Owned::new(kind, false, refusal.reason, refusal.message.clone()));
        let mut fields = self.phase(Phase::Failed, refusal, wanted.to_vec());
        if let Some((place, uid)) = assigned {
            fields.insert("nodeName".into(), json!(place.name));
            fields.insert("nodeUID".into(), json!(uid));
        }
        Plan {
            status: Some(Status {
                fields,
                ..Status::default()
            }),
            note: Some(warning(refusal)),
            ..Plan::default()
        }
    }
}

fn warning(refusal: &Refusal) -> Note {
    Note {
        warning: true,
        reason: refusal.reason.to_owned(),
        message: refusal.message.clone(),
    }
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
