//! Objects of every phase, with the status that operator and agent write for it.

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use understudy_api::conditions::{self, Standing, Wanted, reasons, types};
use understudy_api::crd::Kind;
use understudy_api::guest::GuestPhase;
use understudy_api::{API_VERSION, Condition, GuestStatus, NodeUpdatePhase, Phase};
use understudy_node::guests::status as guests;

use crate::Verdict;

/// Generation of the objects, and of their status.
pub const GENERATION: i64 = 3;

/// An object and what is to be said of it.
pub struct Recorded {
    /// For people.
    pub what: String,
    /// As the API server has it.
    pub object: Value,
    /// What all readers say.
    pub expected: Verdict,
}

/// An object of this kind without a status.
pub fn bare(kind: Kind) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": kind.name(),
        "metadata": {"name": "web", "generation": GENERATION},
        "spec": {},
    })
}

/// Objects of every phase of this kind.
pub fn of(kind: Kind) -> Vec<Recorded> {
    match kind {
        Kind::Guest => guest(),
        Kind::SeamlessReboot => operations(kind, &Phase::ALL, Phase::as_str, |phase| match phase {
            Phase::Succeeded => Verdict::Current,
            Phase::RolledBack | Phase::Failed | Phase::Aborted => Verdict::Failed,
            Phase::AwaitingCutover => Verdict::Suspended,
            _ => Verdict::InProgress,
        }),
        Kind::NodeUpdate => {
            operations(
                kind,
                &NodeUpdatePhase::ALL,
                NodeUpdatePhase::as_str,
                |phase| match phase {
                    NodeUpdatePhase::Resumed => Verdict::Current,
                    NodeUpdatePhase::Failed | NodeUpdatePhase::Aborted => Verdict::Failed,
                    _ => Verdict::InProgress,
                },
            )
        }
        Kind::HostUpdate => by_conditions(
            kind,
            &[
                (
                    "every node is as declared",
                    reasons::ALREADY_SATISFIED,
                    [true, false, false],
                    Verdict::Current,
                ),
                (
                    "a node is under way",
                    reasons::IN_PROGRESS,
                    [false, true, false],
                    Verdict::InProgress,
                ),
                (
                    "paused",
                    reasons::PAUSED,
                    [false, false, false],
                    Verdict::Suspended,
                ),
                (
                    "aborted",
                    reasons::ABORTED,
                    [false, false, false],
                    Verdict::Suspended,
                ),
                (
                    "a node has failed",
                    reasons::SAVE_FAILED,
                    [false, false, true],
                    Verdict::Failed,
                ),
            ],
        ),
        Kind::Host => by_conditions(
            kind,
            &[
                (
                    "fit for guests",
                    "Available",
                    [true, false, false],
                    Verdict::Current,
                ),
                (
                    "not fit for guests",
                    "NoKvm",
                    [false, false, true],
                    Verdict::Failed,
                ),
            ],
        ),
    }
}

/// The values that a phase can have in the API.
fn phases<P: DeserializeOwned>(kind: Kind) -> Vec<P> {
    kind.schema()["properties"]["status"]["properties"]["phase"]["enum"]
        .as_array()
        .expect("phases in the schema")
        .iter()
        .map(|name| serde_json::from_value(name.clone()).expect("a phase"))
        .collect()
}

fn operations<P: Copy + Into<Standing> + DeserializeOwned + PartialEq + std::fmt::Debug>(
    kind: Kind,
    all: &[P],
    name: impl Fn(P) -> &'static str,
    expected: impl Fn(P) -> Verdict,
) -> Vec<Recorded> {
    assert_eq!(all, phases::<P>(kind), "{}", kind.name());
    all.iter()
        .map(|phase| {
            let mut conditions = Vec::new();
            conditions::set_for_phase(
                &mut conditions,
                GENERATION,
                Timestamp::UNIX_EPOCH,
                *phase,
                reasons::IN_PROGRESS,
                "what happened",
            );
            let mut object = bare(kind);
            object["status"] = json!({
                "observedGeneration": GENERATION, "phase": name(*phase), "conditions": conditions,
            });
            Recorded {
                what: name(*phase).to_owned(),
                object,
                expected: expected(*phase),
            }
        })
        .collect()
}

/// Guests: phases as the agent writes them, with the reasons that change what they mean.
fn guest() -> Vec<Recorded> {
    let mut recorded = Vec::new();
    for phase in phases::<GuestPhase>(Kind::Guest) {
        let cases: &[(&'static str, Verdict)] = match phase {
            GuestPhase::Running => &[
                (guests::reasons::RUNNING, Verdict::Current),
                (guests::reasons::VMM_SILENT, Verdict::InProgress),
            ],
            GuestPhase::Saving => &[(reasons::HOST_UPDATING, Verdict::Current)],
            GuestPhase::Halted => &[(guests::reasons::HALTED, Verdict::Current)],
            GuestPhase::Failed => &[(guests::reasons::INVALID_SPEC, Verdict::Failed)],
            GuestPhase::Saved => &[
                (reasons::SESSION_SAVED, Verdict::InProgress),
                (reasons::SESSION_REFUSED, Verdict::Failed),
            ],
            GuestPhase::Pending => &[(guests::reasons::INSUFFICIENT_MEMORY, Verdict::InProgress)],
            GuestPhase::Booting => &[(guests::reasons::BOOTING, Verdict::InProgress)],
            GuestPhase::Stopping => &[(guests::reasons::STOPPING, Verdict::InProgress)],
            GuestPhase::Resuming => &[(reasons::HOST_UPDATING, Verdict::InProgress)],
        };
        for (reason, expected) in cases {
            let seen = guests::Seen::down(phase, *reason, "what happened");
            let mut status = GuestStatus::default();
            guests::update(&mut status, &seen, "node-a", GENERATION, Timestamp::UNIX_EPOCH);
            let mut object = bare(Kind::Guest);
            object["status"] = serde_json::to_value(&status).expect("a status");
            recorded.push(Recorded {
                what: format!("{phase:?}, {reason}"),
                object,
                expected: *expected,
            });
        }
    }
    recorded
}

/// Objects without a phase: `Ready`, `Reconciling` and `Stalled` tell all.
fn by_conditions(kind: Kind, rows: &[(&str, &str, [bool; 3], Verdict)]) -> Vec<Recorded> {
    rows.iter()
        .map(|(what, reason, [ready, reconciling, stalled], expected)| {
            let wanted = |kind, status| Wanted {
                kind,
                status: Some(status),
                reason,
                message: "what happened",
            };
            let mut conditions: Vec<Condition> = Vec::new();
            conditions::set(
                &mut conditions,
                GENERATION,
                Timestamp::UNIX_EPOCH,
                &[
                    wanted(types::READY, *ready),
                    wanted(types::RECONCILING, *reconciling),
                    wanted(types::STALLED, *stalled),
                ],
            );
            let mut object = bare(kind);
            object["status"] = json!({"observedGeneration": GENERATION, "conditions": conditions});
            Recorded {
                what: (*what).to_owned(),
                object,
                expected: *expected,
            }
        })
        .collect()
}
