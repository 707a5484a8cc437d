//! The status of a NodeUpdate, as far as it is the operator's. Pure.

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use understudy_api::conditions::{reasons, table, types};
use understudy_api::node_update::{NodeUpdateStatus, NodeUpdateTransition};
use understudy_api::{Condition, NodeUpdate, NodeUpdatePhase, Time};

use super::build::Plan;
use super::credential::Said;
use crate::place::{Owned, Place, Refusal};
use crate::write::diff::{carry, is_claimed, owns};
use crate::write::{Note, Status};

/// One of its conditions.
pub fn condition<'a>(status: &'a NodeUpdateStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|there| there.type_ == kind)
}

/// A status that is being put together.
pub struct Writing<'a> {
    /// The NodeUpdate.
    pub update: &'a NodeUpdate,
    /// Its status as it is.
    pub status: &'a NodeUpdateStatus,
    /// Its node.
    pub place: &'a Place,
    /// What is new of the credential.
    pub said: Option<&'a Said>,
    /// The time.
    pub now: Timestamp,
}

impl Writing<'_> {
    /// The operator's conditions: what is wanted now, and what stays of what it said before.
    fn conditions(&self, wanted: &[Owned]) -> Value {
        let mut all: Vec<Owned> = wanted.to_vec();
        all.extend(self.said.map(|said| said.condition.clone()));
        for kind in [
            types::CORDONED,
            types::DRAINED,
            types::UNCORDONED,
            types::CREDENTIAL_KEPT,
        ] {
            let is_new = all.iter().any(|there| there.wanted().kind == kind);
            if let Some(there) = condition(self.status, kind).filter(|_| !is_new) {
                all.push(Owned::new(
                    kind,
                    there.status == "True",
                    &there.reason,
                    there.message.clone(),
                ));
            }
        }
        let wanted: Vec<_> = all.iter().map(Owned::wanted).collect();
        let generation = self.update.metadata.generation.unwrap_or(0);
        json!(carry(&self.status.conditions, generation, self.now, &wanted))
    }

    fn uid(&self) -> Option<String> {
        let known = self.status.node_uid.clone();
        known.or_else(|| self.place.node.as_ref().map(|node| node.uid.clone()))
    }

    fn fields(&self, wanted: &[Owned]) -> Map<String, Value> {
        let mut fields = Map::from_iter([("conditions".to_owned(), self.conditions(wanted))]);
        if let Some(uid) = self.uid() {
            fields.insert("nodeUID".into(), json!(uid));
        }
        let credential = match self.said {
            Some(said) => &said.credential,
            None => &self.status.credential,
        };
        if let Some(credential) = credential {
            fields.insert("credential".into(), json!(credential));
        }
        fields
    }

    fn phase(&self, phase: NodeUpdatePhase, refusal: &Refusal, wanted: Vec<Owned>) -> Map<String, Value> {
        let mut all = wanted;
        for (kind, status) in table(phase.into()) {
            all.push(Owned::new(kind, status, refusal.reason, refusal.message.clone()));
        }
        let mut transitions = self.status.phase_transitions.clone();
        if transitions.last().map(|last| last.phase) != Some(phase) {
            transitions.push(NodeUpdateTransition {
                phase,
                transition_time: Time(self.now),
            });
        }
        let mut fields = self.fields(&all);
        fields.insert(
            "observedGeneration".into(),
            json!(self.update.metadata.generation.unwrap_or(0)),
        );
        fields.insert("phase".into(), json!(phase));
        fields.insert("reason".into(), json!(refusal.reason));
        fields.insert("message".into(), json!(refusal.message));
        fields.insert("phaseTransitions".into(), json!(transitions));
        fields
    }

    /// It is over, and only the operator's conditions change; whose the phase is stays as it is.
    pub fn conditions_only(&self, mut wanted: Vec<Owned>) -> Status {
        if !owns(&self.update.metadata, "phase") {
            // The end may be seen before the first heartbeat after a reboot, and nothing is written later on: what
            // is told for good is who has reported it.
            wanted.push(Owned::new(
                types::AGENT_AVAILABLE,
                true,
                reasons::AGENT_LIVES,
                format!("the agent of node {} has reported the end", self.place.name),
            ));
            return Status {
                fields: self.fields(&wanted),
                ..Status::default()
            };
        }
        let phase = self.status.phase.unwrap_or_default();
        let reason = Refusal::new("", String::new());
        let mut fields = self.phase(phase, &reason, with_agent(wanted.clone(), self.place));
        // The end that the operator itself has written stays word by word.
        let kept: Vec<Owned> = self
            .status
            .conditions
            .iter()
            .filter_map(|there| {
                let kinds = [
                    types::READY,
                    types::RECONCILING,
                    types::STALLED,
                    types::COMPLETE,
                    types::FAILED,
                ];
                let kind = kinds.into_iter().find(|kind| *kind == there.type_)?;
                Some(Owned::new(
                    kind,
                    there.status == "True",
                    &there.reason,
                    there.message.clone(),
                ))
            })
            .chain(with_agent(wanted, self.place))
            .collect();
        fields.insert("conditions".into(), self.conditions(&kept));
        fields.insert("reason".into(), json!(self.status.reason));
        fields.insert("message".into(), json!(self.status.message));
        Status {
            fields,
            ..Status::default()
        }
    }

    /// It is the agent's: until it has claimed it the phase is the operator's still.
    pub fn agents(&self, wanted: Vec<Owned>) -> Plan {
        if is_claimed(&self.update.metadata) {
            return Plan {
                status: Some(Status {
                    fields: self.fields(&with_agent(wanted, self.place)),
                    ..Status::default()
                }),
                ..Plan::default()
            };
        }
        let refusal = match self.place.vacancy() {
            Err(refusal) => refusal,
            Ok(_) => Refusal::new(
                reasons::PENDING,
                format!("the agent of node {} may begin", self.place.name),
            ),
        };
        Plan {
            note: None,
            ..self.waits(&refusal, wanted)
        }
    }

    /// Not begun yet: the phase is the operator's.
    pub fn waits(&self, refusal: &Refusal, wanted: Vec<Owned>) -> Plan {
        let is_news = self.status.reason.as_deref() != Some(refusal.reason);
        let wanted = with_agent(wanted, self.place);
        let fields = match is_claimed(&self.update.metadata) {
            true => self.fields(&wanted),
            false => self.phase(NodeUpdatePhase::Pending, refusal, wanted),
        };
        Plan {
            status: Some(Status {
                fields,
                ..Status::default()
            }),
            note: is_news.then(|| Note {
                warning: false,
                reason: refusal.reason.to_owned(),
                message: refusal.message.clone(),
            }),
            ..Plan::default()
        }
    }

    /// It has come to its end without an agent.
    pub fn end(&self, phase: NodeUpdatePhase, why: &Refusal) -> Plan {
        Plan {
            status: Some(Status {
                fields: self.phase(phase, why, with_agent(Vec::new(), self.place)),
                ..Status::default()
            }),
            note: Some(Note {
                warning: true,
                reason: why.reason.to_owned(),
                message: why.message.clone(),
            }),
            ..Plan::default()
        }
    }
}

fn with_agent(mut wanted: Vec<Owned>, place: &Place) -> Vec<Owned> {
    wanted.push(place.agent_available());
    wanted
}
