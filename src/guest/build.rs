//! What a Guest shall be, of what was found. Pure.

use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Map, json};
use understudy_api::conditions::{reasons, types};
use understudy_api::guest::{GuestPhase, GuestStatus, OnGuestRequest, asked_reboot, asked_reboot_name};
use understudy_api::{Guest, SeamlessReboot};

use super::{ANSWERED, FINALIZER};
use crate::place::{Owned, Place, Refusal};
use crate::write::diff::{carry, has_finalizer, is_claimed};
use crate::write::{Note, Status};

/// What a Guest depends on.
pub struct Found {
    /// The node to which it is assigned, or which it names.
    pub place: Option<Place>,
}

/// What shall be.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Whether the finalizer shall be there.
    pub is_kept: bool,
    /// The request that is noted as answered.
    pub answered: Option<String>,
    /// The reboot that the guest asks for, where it was not made yet.
    pub reboot: Option<SeamlessReboot>,
    /// The status; `None` leaves it alone.
    pub status: Option<Status>,
    /// Told when the status changes.
    pub note: Option<Note>,
}

/// What shall become of `guest`.
pub fn build(guest: &Guest, found: &Found, now: Timestamp) -> Plan {
    let status = guest.status.clone().unwrap_or_default();
    let answered = guest.annotations().get(ANSWERED).cloned();
    let mut plan = match (&found.place, status.node_uid.as_deref()) {
        (Some(place), Some(uid)) => assigned(guest, &status, place, uid, now),
        _ if guest.metadata.deletion_timestamp.is_some() => Plan::default(),
        (place, _) => unassigned(guest, &status, place.as_ref(), now),
    };
    plan.answered = answered;
    if let Some((id, reboot)) = request(guest, &status).filter(|(id, _)| plan.answered.as_ref() != Some(id)) {
        plan.answered = Some(id);
        plan.reboot = Some(reboot);
    }
    plan
}

fn assigned(guest: &Guest, status: &GuestStatus, place: &Place, uid: &str, now: Timestamp) -> Plan {
    let standing = place.standing(uid);
    let is_deleting = guest.metadata.deletion_timestamp.is_some();
    let released = status
        .conditions
        .iter()
        .any(|condition| condition.type_ == types::RELEASED && condition.status == "True");
    if is_deleting && (released || standing.releases()) {
        return Plan::default();
    }
    let mut writing = Writing {
        guest,
        status,
        now,
        fields: Map::new(),
    };
    writing.fields.insert("nodeName".into(), json!(place.name));
    writing.fields.insert("nodeUID".into(), json!(uid));
    // A finalizer cannot be added to what is being deleted.
    let is_kept = !is_deleting || has_finalizer(&guest.metadata, FINALIZER);
    if standing.is_lost() {
        let loss = standing.loss(&place.name);
        let note = Note {
            warning: true,
            reason: loss.reason.to_owned(),
            message: loss.message.clone(),
        };
        return Plan {
            is_kept,
            status: Some(writing.lost(&loss)),
            note: Some(note),
            ..Plan::default()
        };
    }
    let message = format!("assigned to node {}", place.name);
    let accepted = Owned::new(types::ACCEPTED, true, reasons::ASSIGNED, message.clone());
    let available = place.agent_available();
    let wanted = [accepted, available];
    let status = if is_claimed(&guest.metadata) {
        writing.with(&wanted)
    } else {
        writing.waiting(&wanted, reasons::ASSIGNED, &message, false)
    };
    Plan {
        is_kept,
        status: Some(status),
        note: change_of_agent(guest, place),
        ..Plan::default()
    }
}

/// Told when the agent has fallen silent, speaks again, or has something new to do.
fn change_of_agent(guest: &Guest, place: &Place) -> Option<Note> {
    let before = guest.status.as_ref().and_then(|status| {
        let mut all = status.conditions.iter();
        all.find(|condition| condition.type_ == types::AGENT_AVAILABLE)
            .map(|condition| condition.reason.clone())
    });
    let condition = place.agent_available();
    let wanted = condition.wanted();
    (before.as_deref() != Some(wanted.reason)).then(|| Note {
        warning: wanted.status != Some(true),
        reason: wanted.reason.to_owned(),
        message: wanted.message.to_owned(),
    })
}

fn unassigned(guest: &Guest, status: &GuestStatus, place: Option<&Place>, now: Timestamp) -> Plan {
    let mut writing = Writing {
        guest,
        status,
        now,
        fields: Map::new(),
    };
    let refusal = match place {
        None => Refusal::new(
            reasons::NODE_REQUIRED,
            "spec.nodeName names no node; in a cluster a Guest names the node that has its disks".to_owned(),
        ),
        Some(place) => match place.vacancy() {
            Ok(uid) => {
                writing.fields.insert("nodeName".into(), json!(place.name));
                writing.fields.insert("nodeUID".into(), json!(uid));
                let message = format!("assigned to node {}", place.name);
                let wanted = [
                    Owned::new(types::ACCEPTED, true, reasons::ASSIGNED, message.clone()),
                    place.agent_available(),
                ];
                return Plan {
                    is_kept: true,
                    status: Some(writing.waiting(&wanted, reasons::ASSIGNED, &message, false)),
                    note: Some(Note {
                        warning: false,
                        reason: reasons::ASSIGNED.to_owned(),
                        message,
                    }),
                    ..Plan::default()
                };
            }
            Err(refusal) => refusal,
        },
    };
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
    // Nodes and agents may still come; a name does not.
    let is_stuck = refusal.reason == reasons::NODE_REQUIRED;
    let status = writing.waiting(&[accepted, available], refusal.reason, &refusal.message, is_stuck);
    Plan {
        status: Some(status),
        note: Some(Note {
            warning: true,
            reason: refusal.reason.to_owned(),
            message: refusal.message,
        }),
        ..Plan::default()
    }
}

/// The reboot that the guest asks for, with the request's id.
fn request(guest: &Guest, status: &GuestStatus) -> Option<(String, SeamlessReboot)> {
    let request = status.reboot_request.as_ref()?;
    let refused = request.denied.is_some() || guest.spec.on_guest_request == OnGuestRequest::Deny;
    if refused || guest.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let guest_name = guest.name_any();
    let name = asked_reboot_name(&guest_name, &request.id);
    let mut reboot = asked_reboot(&guest_name, &name, &request.reason);
    reboot.metadata.namespace = guest.namespace();
    Some((request.id.clone(), reboot))
}

/// A status that is being put together.
struct Writing<'a> {
    guest: &'a Guest,
    status: &'a GuestStatus,
    now: Timestamp,
    fields: Map<String, serde_json::Value>,
}

impl Writing<'_> {
    fn with(mut self, wanted: &[Owned]) -> Status {
        let wanted: Vec<_> = wanted.iter().map(Owned::wanted).collect();
        let generation = self.guest.metadata.generation.unwrap_or(0);
        let conditions = carry(&self.status.conditions, generation, self.now, &wanted);
        self.fields.insert("conditions".into(), json!(conditions));
        Status {
            fields: self.fields,
            ..Status::default()
        }
    }

    /// Nobody has claimed it yet: its phase is the operator's.
    fn waiting(mut self, wanted: &[Owned], reason: &str, message: &str, is_stuck: bool) -> Status {
        let generation = self.guest.metadata.generation.unwrap_or(0);
        self.fields.insert("observedGeneration".into(), json!(generation));
        self.fields.insert("phase".into(), json!(GuestPhase::Pending));
        let mut all = wanted.to_vec();
        for (kind, status) in [
            (types::READY, false),
            (types::RECONCILING, !is_stuck),
            (types::STALLED, is_stuck),
        ] {
            all.push(Owned::new(kind, status, reason, message.to_owned()));
        }
        self.with(&all)
    }

    /// Nobody will ever report of it again: taken over.
    fn lost(mut self, loss: &Refusal) -> Status {
        self.fields.insert("phase".into(), json!(GuestPhase::Failed));
        let mut wanted = vec![
            Owned::new(types::ACCEPTED, false, loss.reason, loss.message.clone()),
            Owned::new(types::AGENT_AVAILABLE, false, loss.reason, loss.message.clone()),
        ];
        for (kind, status) in [
            (types::READY, false),
            (types::RECONCILING, false),
            (types::STALLED, true),
        ] {
            wanted.push(Owned::new(kind, status, loss.reason, loss.message.clone()));
        }
        Status {
            force: true,
            ..self.with(&wanted)
        }
    }
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
