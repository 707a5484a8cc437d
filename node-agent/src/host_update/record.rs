//! The record of a host update: all that a restarted agent, in this boot or a later one, needs to finish or
//! undo it.

use serde::{Deserialize, Serialize};
use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::{HostBoot, Origin, SessionState};
use uuid::Uuid;

use super::effects::FoundGuest;
use super::plan::Plan;
use crate::moment::Moment;

/// Version of the record's format. A record of another version is refused, never guessed at.
pub const RECORD_VERSION: u32 = 1;

/// What is done next. Names are in the record and in logs; the order is that of a run without trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Step {
    /// Look at the host, and at what `expect` names.
    Inspect,
    /// `update.command`, after the pre-reboot notification (patent US10387187B2, step 1).
    RunCommand,
    /// Operations on guests come to their end; none is begun.
    Quiesce,
    /// Look at what saving needs, and at whose sessions there are.
    Preflight,
    /// A fresh key for each session, registered with the credential provider.
    RegisterKeys,
    /// Save each session (patent, step 2).
    Save,
    /// Every guest is asked once more whether it is saved still; leases outlast the reboot.
    Verify,
    /// The acknowledgement (patent, step 3): the record of it is durable before its effect.
    Acknowledge,
    /// Ask for the reboot, in response to the acknowledgement.
    Reboot,
    /// Wait until this boot ends.
    AwaitReboot,
    /// Undo: `update.command` is ended.
    EndCommand,
    /// Undo: the reboot is called off.
    CallOff,
    /// Undo: each guest runs on, its checkpoint void.
    Cancel,
    /// Undo: keys and what is left of checkpoints are removed.
    Forget,
    /// After the reboot: obtain the key of each session (patent, step 4).
    LogOn,
    /// Resume each session (patent, steps 5 and 6), in order of priority.
    Resume,
    /// Operations on guests may begin again.
    Release,
    /// Checkpoints and keys are destroyed once their guests have run for a while.
    Settle,
    /// Nothing is left to do.
    Done,
}

impl Step {
    /// All steps.
    pub const ALL: [Step; 19] = [
        Step::Inspect,
        Step::RunCommand,
        Step::Quiesce,
        Step::Preflight,
        Step::RegisterKeys,
        Step::Save,
        Step::Verify,
        Step::Acknowledge,
        Step::Reboot,
        Step::AwaitReboot,
        Step::EndCommand,
        Step::CallOff,
        Step::Cancel,
        Step::Forget,
        Step::LogOn,
        Step::Resume,
        Step::Release,
        Step::Settle,
        Step::Done,
    ];

    /// Whether the step goes towards the reboot, which was not asked for yet: an abort may end it.
    pub fn is_before_reboot(self) -> bool {
        self < Step::Reboot
    }

    /// Whether the step comes after the host's reboot.
    pub fn is_after_reboot(self) -> bool {
        matches!(self, Step::LogOn | Step::Resume)
    }
}

/// How an update ended, or shall end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// `Resumed`, `Failed` or `Aborted`.
    pub phase: NodeUpdatePhase,
    /// One of [`understudy_api::conditions::reasons`].
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Verdict {
    /// It failed.
    pub fn failed(reason: &str, message: impl Into<String>) -> Verdict {
        Verdict {
            phase: NodeUpdatePhase::Failed,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    /// It was aborted.
    pub fn aborted(reason: &str, message: impl Into<String>) -> Verdict {
        Verdict {
            phase: NodeUpdatePhase::Aborted,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    /// It has come to a good end.
    pub fn resumed(reason: &str, message: impl Into<String>) -> Verdict {
        Verdict {
            phase: NodeUpdatePhase::Resumed,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }
}

/// A phase and when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The phase.
    pub phase: NodeUpdatePhase,
    /// When it began.
    pub at: Moment,
}

/// A step that failed and is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trouble {
    /// When it failed first.
    pub since: Moment,
    /// When it is tried again.
    pub until: Moment,
    /// How often it has failed.
    pub count: u32,
    /// One of [`understudy_api::conditions::reasons`].
    pub reason: String,
    /// What went wrong last.
    pub message: String,
}

/// The host goes down by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GoingDown {
    /// Since when that is known.
    pub since: Moment,
    /// Until when it waits.
    pub deadline: Moment,
    /// In its words.
    pub reason: String,
}

/// One guest's session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// `namespace/name` of the guest.
    pub guest: String,
    /// UID of the Guest, bound into the checkpoint.
    pub uid: String,
    /// The incarnation whose session it is.
    pub incarnation: u64,
    /// Higher ones are resumed first.
    pub priority: i32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Bytes that the save is expected to write.
    pub expected_bytes: u64,
    /// Names the checkpoint, its directory and its key.
    pub checkpoint: Uuid,
    /// How far it is.
    pub state: SessionState,
    /// Why it is so, where something went wrong: one of [`understudy_api::conditions::reasons`] or the name
    /// of a [`understudy_vmm_control::session::Refusal`].
    pub reason: Option<String>,
    /// The same for people.
    pub message: Option<String>,
    /// Whether its key is registered.
    pub key_registered: bool,
    /// Whether the host, which goes down by itself, is not made to wait for it any more. It may come to be
    /// saved all the same.
    pub given_up: bool,
    /// Whether its VMM is known to have ended while it was being saved.
    pub vmm_gone: bool,
    /// Rounds of pre-copying.
    pub rounds: u32,
    /// Bytes of memory written by a save that was completed, all rounds together.
    pub saved_bytes: u64,
    /// Bytes of the checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// When its vCPUs stopped.
    pub paused_at: Option<Moment>,
    /// When it was known to be durable.
    pub saved_at: Option<Moment>,
    /// Whether its checkpoint was looked at in this boot.
    pub is_inspected: bool,
    /// Whether its key was obtained in this boot.
    pub has_key: bool,
    /// When it was its turn to be resumed.
    pub resume_began: Option<Moment>,
    /// Its first instruction after the reboot.
    pub first_instruction: Option<Moment>,
    /// Whether its memory proved bad after it was resumed.
    pub is_damaged: bool,
    /// Whether nothing of it is left to be removed.
    pub is_settled: bool,
    /// What changes all the time: shown, not kept.
    #[serde(skip)]
    pub live: Live,
    /// What failed and is tried again.
    pub trouble: Option<Trouble>,
}

/// What changes all the time, so that it is no reason to write the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Bytes of memory written, all rounds together.
    pub written_bytes: u64,
    /// Bytes that are known to be left.
    pub remaining_bytes: u64,
    /// When it is looked at again.
    pub look_at: Option<Moment>,
    /// Whether its guest can be paused: all but a little of its memory is written.
    pub is_ready: bool,
    /// Whether it was seen to be saved since [`Step::Verify`] began.
    pub is_verified: bool,
    /// Whether its memory is all loaded, or its guest is gone.
    pub is_loaded: bool,
}

impl Session {
    /// A session that was found.
    pub fn new(found: FoundGuest) -> Session {
        Session {
            guest: found.guest,
            uid: found.uid,
            incarnation: found.incarnation,
            priority: found.priority,
            memory_bytes: found.memory_bytes,
            expected_bytes: found.expected_bytes,
            checkpoint: found.checkpoint,
            state: SessionState::Waiting,
            reason: None,
            message: None,
            key_registered: false,
            given_up: false,
            vmm_gone: false,
            rounds: 0,
            saved_bytes: 0,
            checkpoint_bytes: 0,
            paused_at: None,
            saved_at: None,
            is_inspected: false,
            has_key: false,
            resume_began: None,
            first_instruction: None,
            is_damaged: false,
            is_settled: false,
            live: Live::default(),
            trouble: None,
        }
    }

    /// Bytes of memory written so far, all rounds together.
    pub fn written_bytes(&self) -> u64 {
        self.saved_bytes.max(self.live.written_bytes)
    }

    pub(super) fn explain(&mut self, reason: &str, message: impl Into<String>) {
        self.reason = Some(reason.to_owned());
        self.message = Some(message.into());
    }

    /// Whether it waits for another try or another look.
    pub(super) fn waits_until(&self, now: Moment) -> Option<Moment> {
        let trouble = self.trouble.as_ref().map(|trouble| trouble.until);
        [trouble, self.live.look_at]
            .into_iter()
            .flatten()
            .filter(|until| until.since(now) > 0)
            .max_by_key(|until| until.since(now))
    }
}

/// One NodeUpdate on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// UID of the NodeUpdate.
    pub uid: String,
    /// Name of the NodeUpdate.
    pub name: String,
    /// What was asked for.
    pub plan: Plan,
    /// What is done next.
    pub step: Step,
    /// When it was made.
    pub created: Moment,
    /// Phases so far, with times.
    pub transitions: Vec<Transition>,
    /// The host as it was found; its boot ID is that of the saving boot.
    pub before: Option<HostBoot>,
    /// The host after the reboot: the last boot in which an agent logged on for this update.
    pub after: Option<HostBoot>,
    /// When the kernel of `after` was started: microseconds since 1970.
    pub after_booted_at: i64,
    /// When the agent of `after` was started: microseconds since 1970.
    pub after_agent_at: i64,
    /// When operations were quiesced.
    pub quiesced_at: Option<Moment>,
    /// The host goes down by itself.
    pub going_down: Option<GoingDown>,
    /// The sessions, from preflight on, in the order of guests' names.
    pub sessions: Vec<Session>,
    /// When every session was last known to be saved.
    pub verified_at: Option<Moment>,
    /// Whether the acknowledgement was given and not taken back.
    pub acknowledged: bool,
    /// Whether the host may have been asked for its reboot.
    pub reboot_asked: bool,
    /// Since when the host is waited for to go down.
    pub awaiting_since: Option<Moment>,
    /// Output of `update.command` where it failed.
    pub command_output: Option<String>,
    /// Why it is being undone; `None` while it goes forward.
    pub undo: Option<Verdict>,
    /// How it ended. After that checkpoints are destroyed, and kept sessions tried again.
    pub verdict: Option<Verdict>,
    /// When the step is looked at again; not kept.
    #[serde(skip)]
    pub look_at: Option<Moment>,
    /// What failed and is tried again.
    pub trouble: Option<Trouble>,
}

impl Update {
    /// The record of an update that was just begun.
    pub fn new(uid: String, name: String, plan: Plan, now: Moment) -> Update {
        Update {
            version: RECORD_VERSION,
            uid,
            name,
            plan,
            step: Step::Inspect,
            created: now,
            transitions: vec![Transition {
                phase: NodeUpdatePhase::Pending,
                at: now,
            }],
            before: None,
            after: None,
            after_booted_at: 0,
            after_agent_at: 0,
            quiesced_at: None,
            going_down: None,
            sessions: Vec::new(),
            verified_at: None,
            acknowledged: false,
            reboot_asked: false,
            awaiting_since: None,
            command_output: None,
            undo: None,
            verdict: None,
            look_at: None,
            trouble: None,
        }
    }

    /// The phase it is in.
    pub fn phase(&self) -> NodeUpdatePhase {
        self.transitions
            .last()
            .map_or(NodeUpdatePhase::Pending, |last| last.phase)
    }

    /// When the phase it is in began.
    pub fn phase_since(&self) -> Moment {
        self.transitions.last().map_or(self.created, |last| last.at)
    }

    /// Whether nothing is left to do in this run of the agent. Where sessions are kept the record stays,
    /// and the next run tries again.
    pub fn is_finished(&self) -> bool {
        self.step == Step::Done
    }

    /// Whether the record can be forgotten once its end was told.
    pub fn is_over(&self) -> bool {
        self.is_finished()
            && self
                .sessions
                .iter()
                .all(|session| session.state != SessionState::Kept)
    }

    /// Whether the host, not a HostUpdate, decides when it goes down.
    pub fn is_forced(&self) -> bool {
        self.going_down.is_some() || self.plan.origin == Origin::Host
    }

    /// Whether operations on guests (SeamlessReboots) are held back: an agent that finds such a record when
    /// it starts holds them back before it does anything else.
    pub fn holds_operations(&self) -> bool {
        self.step >= Step::Quiesce && self.step <= Step::Release
    }

    /// Whether no guest at all is started, stopped or restarted: from quiescing to the reboot or the undo.
    /// After the reboot only those stay away that [`super::hold::hold`] names.
    pub fn holds_all_guests(&self) -> bool {
        self.step >= Step::Quiesce && self.step <= Step::Forget
    }

    /// The record without what changes all the time: what is worth a write.
    pub(super) fn durable_part(&self) -> Update {
        let mut update = self.clone();
        update.look_at = None;
        for session in &mut update.sessions {
            session.live = Live::default();
        }
        update
    }

    pub(super) fn enter(&mut self, phase: NodeUpdatePhase, now: Moment) {
        // Once the end was told nothing changes it: what is done later is cleaning up.
        if self.phase() != phase && !self.phase().is_terminal() {
            debug_assert!(self.phase().may_become(phase), "{} → {phase}", self.phase());
            self.transitions.push(Transition { phase, at: now });
        }
    }

    pub(super) fn decide(&mut self, verdict: Verdict, now: Moment) {
        self.enter(verdict.phase, now);
        self.verdict = Some(verdict);
    }

    pub(super) fn boot_before(&self) -> &str {
        self.before.as_ref().map_or("", |before| before.boot_id.as_str())
    }

    /// The boot in which the record was last at work.
    pub(super) fn boot_known(&self) -> &str {
        self.after
            .as_ref()
            .map_or(self.boot_before(), |after| after.boot_id.as_str())
    }

    pub(super) fn lost(session: &mut Session, message: impl Into<String>) {
        session.state = SessionState::Lost;
        session.trouble = None;
        let message = message.into();
        // Why it was given up says more than that it is not there.
        if session.reason.is_none() {
            session.explain(reasons::SESSION_LOST, message);
        }
    }

    pub(super) fn kept(session: &mut Session, reason: &str, message: impl Into<String>) {
        session.state = SessionState::Kept;
        session.trouble = None;
        session.explain(reason, message);
    }
}
