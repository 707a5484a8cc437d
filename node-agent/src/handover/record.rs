//! The record of an operation: all that a restarted agent needs to finish or undo it.

use serde::{Deserialize, Serialize};
use understudy_api::Phase;
use understudy_api::conditions::reasons;
use understudy_api::reboot::{ActionType, FailedUnit, Incarnation, RebootResult, StartedUnit};
use understudy_vmm_control::owner::Owner;
use uuid::Uuid;

use super::effects::Preflight;
use super::plan::Plan;
use super::readiness::Probing;
pub use crate::moment::Moment;

/// Version of the record's format. A record of another version is refused, never guessed at.
pub const RECORD_VERSION: u32 = 1;

/// What is done next. Names are in the record and in logs; the order is that of a run without trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Step {
    /// Check what the reboot needs; look at `expect`.
    Preflight,
    /// Tell the guest; its filter begins to capture (patent US10606632B2, step 2).
    Confirm,
    /// Make both layers, durably.
    PrepareSplit,
    /// Start the clone's VMM, not booted.
    PrepareClone,
    /// Freeze, split, thaw.
    Split,
    /// Start the clone's vCPUs (patent, step 3).
    BootClone,
    /// Wait for the clone's boot notice (patent, step 4).
    AwaitBoot,
    /// One round of integration (patent, step 5).
    Integrate,
    /// Ask the clone whether it is ready, as `cutover.readiness` says.
    Probe,
    /// The clone is ready; wait until its cutover is approved and the window is open.
    AwaitCutover,
    /// Hold ingress. From here to `Commit` nothing is taken for granted after a restart: all is taken back.
    HoldIngress,
    /// Freeze the guest's programs.
    FreezeUserland,
    /// The rest, and compare what is open.
    FinalIntegrate,
    /// Hold writes and egress.
    Seal,
    /// Nothing may have changed since the last round.
    Verify,
    /// Hold the vCPUs.
    Pause,
    /// The commit point (patent, step 6).
    Commit,
    /// Hand the taps to the clone.
    HandOverNetwork,
    /// Let the clone's VMM open its gates.
    ActivateClone,
    /// Let the clone's guest agent announce itself and start what was held.
    ActivateAgent,
    /// The clone's VMM is gone after the commit: boot its layer anew.
    ColdBoot,
    /// The old incarnation is dormant until its deadline (patent, step 7).
    Retire,
    /// Take back: open the guest's gates, run its vCPUs. A commit that is still on its way is void after it.
    Release,
    /// Take back: only `owner.json` knows whether the commit happened.
    ReadOwner,
    /// Take back: thaw the guest's programs.
    ThawUserland,
    /// Undo: thaw file systems.
    ThawFilesystems,
    /// Undo: the filter stops.
    EndCapture,
    /// Undo: end the clone's VMM.
    KillClone,
    /// Undo: remove the clone's layer.
    DiscardClone,
    /// Rollback: look whether there is a dormant incarnation to go back to.
    FindDormant,
    /// Rollback: hold the clone, all of it. From here to `CommitBack` nothing is taken for granted after a restart.
    HoldClone,
    /// Rollback: the commit point of the way back.
    CommitBack,
    /// Rollback: let the dormant incarnation's VMM open its gates.
    ActivateGuest,
    /// Rollback: the guest is told that time has passed, before its programs see it.
    Reinstate,
    /// Rollback: take back, and let the clone serve on. A commit that is still on its way is void after it.
    ReleaseClone,
    /// Nothing is left to do.
    Done,
}

impl Step {
    /// All steps.
    pub const ALL: [Step; 36] = [
        Step::Preflight,
        Step::Confirm,
        Step::PrepareSplit,
        Step::PrepareClone,
        Step::Split,
        Step::BootClone,
        Step::AwaitBoot,
        Step::Integrate,
        Step::Probe,
        Step::AwaitCutover,
        Step::HoldIngress,
        Step::FreezeUserland,
        Step::FinalIntegrate,
        Step::Seal,
        Step::Verify,
        Step::Pause,
        Step::Commit,
        Step::HandOverNetwork,
        Step::ActivateClone,
        Step::ActivateAgent,
        Step::ColdBoot,
        Step::Retire,
        Step::Release,
        Step::ReadOwner,
        Step::ThawUserland,
        Step::ThawFilesystems,
        Step::EndCapture,
        Step::KillClone,
        Step::DiscardClone,
        Step::FindDormant,
        Step::HoldClone,
        Step::CommitBack,
        Step::ActivateGuest,
        Step::Reinstate,
        Step::ReleaseClone,
        Step::Done,
    ];

    /// Whether the guest is being held and the commit was not asked for yet.
    pub fn is_held(self) -> bool {
        matches!(
            self,
            Step::HoldIngress
                | Step::FreezeUserland
                | Step::FinalIntegrate
                | Step::Seal
                | Step::Verify
                | Step::Pause
        )
    }

    /// Whether the clone is known to own the guest: there is no way back from here.
    pub fn is_committed(self) -> bool {
        matches!(
            self,
            Step::HandOverNetwork | Step::ActivateClone | Step::ActivateAgent | Step::ColdBoot | Step::Retire
        )
    }

    /// Whether the step goes towards the commit point, so that an abort or a timeout may end it.
    pub fn is_forward(self) -> bool {
        self <= Step::Commit
    }

    /// Whether the step belongs to a rollback alone.
    pub fn is_rollback(self) -> bool {
        self >= Step::FindDormant && self < Step::Done
    }
}

/// A `spec.action` that was taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Latched {
    /// What was asked for.
    pub kind: ActionType,
    /// When it was taken in.
    pub at: Moment,
    /// Why it was not done.
    pub refused: Option<String>,
}

/// The way back, after the clone has taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollback {
    /// How the operation had ended before: how it ends again where the way back is closed.
    pub before: Verdict,
    /// Epoch that the commit back writes; 0 until the dormant incarnation was found.
    pub epoch: u64,
    /// When the clone was held, in this try.
    pub held_at: Option<Moment>,
    /// Block writes of the clone when it was held, in this try.
    pub block_writes: u64,
    /// How often the clone was released again.
    pub tries: u32,
}

/// Why an operation is being undone, or how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// `Succeeded`, `Failed`, `Aborted` or `RolledBack`.
    pub phase: Phase,
    /// One of [`understudy_api::conditions::reasons`].
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Why a cutover was taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TakenBack {
    /// One of [`understudy_api::conditions::reasons`]: that of the operation, should it be the last try.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// A phase and when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The phase.
    pub phase: Phase,
    /// When it began.
    pub at: Moment,
}

/// One SeamlessReboot on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// UID of the SeamlessReboot; names the operation to the guest, too.
    pub uid: String,
    /// `namespace/name` of the SeamlessReboot, for logs.
    pub name: String,
    /// `namespace/name` of the guest.
    pub guest: String,
    /// What was asked for.
    pub plan: Plan,
    /// Top layer of the guest after the split.
    pub guest_layer: Uuid,
    /// Top layer of the clone.
    pub clone_layer: Uuid,
    /// What is done next.
    pub step: Step,
    /// When it was made.
    pub created: Moment,
    /// Phases so far, with times; bounded, as cutovers are.
    pub transitions: Vec<Transition>,
    /// The guest as preflight found it.
    pub before: Option<Preflight>,
    /// Why it is being undone; `None` while it goes forward.
    pub undo: Option<Verdict>,
    /// How it ended.
    pub verdict: Option<Verdict>,
    /// Last round that the clone has applied.
    pub applied: u64,
    /// How long the last two rounds took, in microseconds, newest first.
    pub round_times: [Option<i64>; 2],
    /// Entries that became dirty during the last round.
    pub remaining: u64,
    /// Rounds since the last cutover that was taken back, or since the boot notice.
    pub rounds_of_attempt: u32,
    /// How often the final round was repeated in this cutover.
    pub repeats: u32,
    /// Why the last cutover was taken back.
    pub taken_back: Option<TakenBack>,
    /// When the clone's vCPUs were started.
    pub boot_started: Option<Moment>,
    /// When ingress was held, in this cutover.
    pub held_at: Option<Moment>,
    /// When the transmit gate was closed, in this cutover.
    pub sealed_at: Option<Moment>,
    /// When the clone was known to own the guest.
    pub committed_at: Option<Moment>,
    /// Whether the guest's VMM is known to be gone, so that an undo asks nothing of it.
    pub guest_gone: bool,
    /// Block writes of the guest when its write gate closed, in this cutover.
    pub block_writes: u64,
    /// Whether the taps' descriptors went from the guest's VMM to the clone's.
    pub network_given: bool,
    /// When the current step failed first, counted from its first failure; cleared by success.
    pub trouble: Option<Trouble>,
    /// What is reported.
    pub result: RebootResult,
    /// The last action that was taken in. (Records of older agents lack this and what follows.)
    #[serde(default)]
    pub action: Option<Latched>,
    /// Whether the cutover was approved.
    #[serde(default)]
    pub approved: bool,
    /// When a clone that waits for its cutover was brought up to date last.
    #[serde(default)]
    pub refreshed_at: Option<Moment>,
    /// When the wait for approval and window was over, in this attempt.
    #[serde(default)]
    pub cleared_at: Option<Moment>,
    /// Whether the clone has answered as `cutover.readiness` asks.
    #[serde(default)]
    pub ready: bool,
    /// How far its probes are, while they are asked.
    #[serde(default)]
    pub probing: Option<Probing>,
    /// The way back; `None` unless it was asked for.
    #[serde(default)]
    pub rollback: Option<Rollback>,
}

/// A step that failed and is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trouble {
    /// When it failed first.
    pub since: Moment,
    /// Not tried again before.
    pub until: Moment,
    /// How often it failed.
    pub count: u32,
    /// Reason, in one word.
    pub reason: String,
    /// What went wrong last.
    pub message: String,
}

impl Operation {
    /// A new operation. `guest_layer` and `clone_layer` are fresh random UUIDs.
    pub fn new(
        uid: String,
        name: String,
        guest: String,
        plan: Plan,
        layers: (Uuid, Uuid),
        now: Moment,
    ) -> Operation {
        Operation {
            version: RECORD_VERSION,
            uid,
            name,
            guest,
            plan,
            guest_layer: layers.0,
            clone_layer: layers.1,
            step: Step::Preflight,
            created: now,
            transitions: vec![Transition {
                phase: Phase::Pending,
                at: now,
            }],
            before: None,
            undo: None,
            verdict: None,
            applied: 0,
            round_times: [None, None],
            remaining: 0,
            rounds_of_attempt: 0,
            repeats: 0,
            taken_back: None,
            boot_started: None,
            held_at: None,
            sealed_at: None,
            committed_at: None,
            guest_gone: false,
            block_writes: 0,
            network_given: false,
            trouble: None,
            result: RebootResult::default(),
            action: None,
            approved: false,
            refreshed_at: None,
            cleared_at: None,
            ready: false,
            probing: None,
            rollback: None,
        }
    }

    /// The phase it is in.
    pub fn phase(&self) -> Phase {
        self.transitions.last().map_or(Phase::Pending, |last| last.phase)
    }

    /// When the phase it is in began.
    pub fn phase_since(&self) -> Moment {
        self.transitions.last().map_or(self.created, |last| last.at)
    }

    /// Whether nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.step == Step::Done
    }

    /// Incarnation of the guest at preflight; 0 before it.
    pub fn guest_incarnation(&self) -> u64 {
        self.before.as_ref().map_or(0, |before| before.incarnation)
    }

    /// Incarnation of the clone.
    pub fn clone_incarnation(&self) -> u64 {
        self.guest_incarnation() + 1
    }

    /// Epoch that the commit writes.
    pub fn commit_epoch(&self) -> u64 {
        self.before.as_ref().map_or(0, |before| before.epoch) + 1
    }

    /// Whether `owner.json` says that the commit happened. A cold boot after the commit counts further and
    /// stays on the clone's layer.
    pub fn is_owned_by_clone(&self, owner: &Owner) -> bool {
        owner.layer == Some(self.clone_layer)
            && owner.incarnation >= self.clone_incarnation()
            && owner.epoch >= self.commit_epoch()
    }

    /// Whether `owner.json` says that the commit back happened.
    pub fn is_rolled_back(&self, owner: &Owner) -> bool {
        self.rollback.as_ref().is_some_and(|rollback| {
            rollback.epoch > 0 && owner.layer == Some(self.guest_layer) && owner.epoch >= rollback.epoch
        })
    }

    /// The epoch that the last commit writes: a cold boot after it counts further.
    pub fn last_epoch(&self) -> u64 {
        match &self.rollback {
            Some(rollback) if rollback.epoch > 0 => rollback.epoch,
            _ => self.commit_epoch(),
        }
    }

    pub(super) fn enter(&mut self, phase: Phase, now: Moment) {
        if self.phase() != phase {
            debug_assert!(self.phase().may_become(phase), "{} → {phase}", self.phase());
            self.transitions.push(Transition { phase, at: now });
        }
    }

    pub(super) fn finish(&mut self, verdict: Verdict, now: Moment) {
        self.enter(verdict.phase, now);
        self.verdict = Some(verdict);
        self.step = Step::Done;
        self.trouble = None;
    }

    pub(super) fn incarnation(&self, number: u64, boot_id: &str, kernel_release: &str) -> Incarnation {
        Incarnation {
            incarnation: i64::try_from(number).unwrap_or(i64::MAX),
            boot_id: boot_id.to_owned(),
            kernel_release: kernel_release.to_owned(),
        }
    }

    pub(super) fn note_units(&mut self, started: Vec<StartedUnit>, failed: Vec<FailedUnit>) {
        self.result.started_units = started;
        self.result.failed_units = failed;
    }
}

impl Verdict {
    /// The reboot failed, and the guest has lost nothing.
    pub fn failed(reason: &str, message: impl Into<String>) -> Verdict {
        Verdict {
            phase: Phase::Failed,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    /// The reboot was aborted, and the guest has lost nothing.
    pub fn aborted(message: impl Into<String>) -> Verdict {
        Verdict {
            phase: Phase::Aborted,
            reason: reasons::ABORTED.to_owned(),
            message: message.into(),
        }
    }

    /// The incarnation before is the guest again.
    pub fn rolled_back(message: impl Into<String>) -> Verdict {
        Verdict {
            phase: Phase::RolledBack,
            reason: reasons::ROLLED_BACK.to_owned(),
            message: message.into(),
        }
    }

    /// The reboot succeeded.
    pub fn succeeded(reason: &str, message: impl Into<String>) -> Verdict {
        Verdict {
            phase: Phase::Succeeded,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }
}
