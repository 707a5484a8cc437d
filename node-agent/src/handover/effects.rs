//! What the engine asks of the world. The node agent implements it with VMMs and guest agents, the crash
//! simulation with a world of its own.

use serde::{Deserialize, Serialize};
use understudy_api::reboot::{ActionType, Conflict, FailedUnit, Remains, StartedUnit};
use understudy_vmm_control::owner::Owner;

use super::record::{Moment, Operation};

/// Why an effect did not happen, by what the engine does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// It may work if tried again: a peer that does not answer, a timeout, an interrupted session. Whether
    /// the effect happened is unknown.
    Retry,
    /// Trying again is no use: what was asked was refused.
    Refused,
    /// A lease or watchdog ran out, so that what was done under it counts for nothing: the cutover is
    /// taken back.
    Lapsed,
    /// The guest's VMM of this incarnation is gone (its process ended, or the guest powered off or crashed).
    GuestGone,
    /// The clone's VMM is gone, or the clone's kernel panicked.
    CloneGone,
}

/// An effect that did not happen, or may not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EffectError {
    /// What the engine does about it.
    pub kind: ErrorKind,
    /// One of [`understudy_api::conditions::reasons`]; where empty the engine chooses.
    pub reason: &'static str,
    /// What was tried, what failed, and what would do.
    pub message: String,
}

impl EffectError {
    /// An error for which the engine chooses the reason.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> EffectError {
        EffectError {
            kind,
            reason: "",
            message: message.into(),
        }
    }

    /// The same with a reason of its own.
    pub fn because(mut self, reason: &'static str) -> EffectError {
        self.reason = reason;
        self
    }
}

/// Result of an effect.
pub type Effected<T> = Result<T, EffectError>;

/// The guest as preflight found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preflight {
    /// The incarnation that owns the guest.
    pub incarnation: u64,
    /// Epoch in `owner.json`.
    pub epoch: u64,
    /// The kernel's boot ID.
    pub boot_id: String,
    /// Kernel release.
    pub kernel_release: String,
    /// When it was booted: microseconds since 1970.
    pub booted_at: i64,
    /// Units that have failed on it.
    pub failed_units: Vec<String>,
}

/// What became of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitOutcome {
    /// File systems were frozen from before until after.
    Done {
        /// How long they were frozen, in microseconds.
        frozen_us: u64,
    },
    /// The disk is split, but nobody can tell whether file systems were frozen: the watchdog had thawed
    /// them, or the disk was found split already (an agent before this one had begun it).
    Unsure {
        /// Which of them.
        message: String,
    },
}

/// The clone's boot notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneBoot {
    /// The kernel's boot ID.
    pub boot_id: String,
    /// Kernel release.
    pub kernel_release: String,
    /// When it was booted: microseconds since 1970.
    pub booted_at: i64,
    /// `systemctl is-system-running`.
    pub system_state: String,
    /// Units that have failed on it.
    pub failed_units: Vec<String>,
}

/// What a round of integration did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Its number, as the guest's filter counts: above the last one that was applied.
    pub round: u64,
    /// Entries applied.
    pub entries: u64,
    /// Bytes of content applied.
    pub bytes: u64,
    /// Entries that became dirty while it ran.
    pub dirty: u64,
    /// Files that both sides had changed; at most 100 are kept.
    pub conflicts: Vec<Conflict>,
    /// How many they were.
    pub conflict_count: u64,
    /// What a cutover could not carry over, as of the end of the round. Not of a last one: its time counts.
    pub remains: Option<Remains>,
}

/// What is asked of an operation now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Why it shall be aborted, if it shall: whatever its object's action says.
    pub abort: Option<String>,
    /// What its object's action says.
    pub action: Option<ActionType>,
}

/// What a clone answered to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether it is ready.
    pub ready: bool,
    /// What was seen, for people.
    pub message: String,
}

/// What a rollback can go back to, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dormancy {
    /// Epoch in `owner.json`.
    pub epoch: u64,
}

/// The guest, sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Block writes completed when the write gate closed.
    pub block_writes: u64,
    /// When the transmit gate closed.
    pub at: Moment,
}

/// What the clone's guest agent did at its activation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activation {
    /// Units that were started.
    pub started: Vec<StartedUnit>,
    /// Units that did not start.
    pub failed: Vec<FailedUnit>,
    /// When the clone's first frame went out, where that is known.
    pub first_frame: Option<Moment>,
}

/// The effects.
///
/// Every effect is idempotent: an agent that died within it, or just after it, performs it again with the
/// same record. Each returns within a bounded time of its own (seconds; [`Effects::integrate`]: while it
/// makes progress). While an operation is in flight, its engine alone starts and ends VMMs of that guest.
/// An effect on the guest first makes sure that the VMM which answers is
/// [`Operation::guest_incarnation`], one on the clone that it is [`Operation::clone_incarnation`]; else it
/// is `GuestGone` or `CloneGone`.
pub trait Effects {
    /// The time.
    fn now(&mut self) -> Moment;

    /// Waits until then; returns early when [`Effects::must_stop`] changes, or what is asked of the operation
    /// ([`super::approval::is_news`]).
    fn wait(&mut self, operation: &Operation, until: Moment);

    /// What is asked of the operation. An abort is ignored after the commit point.
    fn asked(&mut self, operation: &Operation) -> Asked;

    /// Whether the agent is being stopped: the driver returns before the next step, but never while the
    /// guest is held.
    fn must_stop(&mut self) -> bool;

    /// Checks what the reboot needs: guest running with a fresh agent, no writable data disks, memory and
    /// disk for the clone, no other operation. `Retry` for what may come (an agent that is still
    /// connecting), `Refused` with what is missing and how much.
    fn preflight(&mut self, operation: &Operation) -> Effected<Preflight>;

    /// Guest agent `Confirm`: when this returns, the filter captures for this operation.
    fn confirm(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest's VMM `prepare-split`: both layers exist durably.
    fn prepare_split(&mut self, operation: &Operation) -> Effected<()>;

    /// The clone's VMM process runs, prepared, not booted; adopted where it exists already.
    fn prepare_clone(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest agent `Sync` and `FreezeFilesystems`, guest's VMM `split`, guest agent `ThawFilesystems`; thaws
    /// also when the split failed. A disk that is split already is [`SplitOutcome::Unsure`]; it is looked at
    /// while frozen, so that a split that was on its way from an earlier try is not taken for this one's.
    fn split(&mut self, operation: &Operation) -> Effected<SplitOutcome>;

    /// Clone's VMM `boot`.
    fn boot_clone(&mut self, operation: &Operation) -> Effected<()>;

    /// Waits for the clone's boot notice, at most about a second; `None`: not yet. `CloneGone` with the end
    /// of the console where its VMM ended or its kernel panicked.
    fn await_clone_boot(&mut self, operation: &Operation) -> Effected<Option<CloneBoot>>;

    /// One round: guest's export after [`Operation::applied`], relayed to the clone's import. With `last`
    /// the guest's programs are frozen, open files are compared, and what was applied is durable in the
    /// clone's layer when this returns. `deadline`: gives up then with `Lapsed`; abandoned rounds are sent
    /// again. `Refused` for a conflict that the plan forbids, and for a capture that was lost.
    fn integrate(&mut self, operation: &Operation, last: bool, deadline: Option<Moment>) -> Effected<Round>;

    /// Asks the clone's guest agent once what [`super::readiness::current`] names. A clone that is not ready is an
    /// answer and no error; `Refused` where its guest agent cannot ask.
    fn probe(&mut self, operation: &Operation) -> Effected<Answer>;

    /// Looks after guest and clone while the cutover is waited for: `GuestGone` or `CloneGone` where one of them
    /// has ended, or its guest has crashed; no other error.
    fn watch(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest's VMM `hold` of the receive gate, for `lease_ms`.
    fn hold_ingress(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()>;

    /// Guest agent `FreezeUserland`, with a watchdog of `lease_ms`.
    fn freeze_userland(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()>;

    /// Guest's VMM `hold` of the transmit and write gates, for `lease_ms`.
    fn seal(&mut self, operation: &Operation, lease_ms: u64) -> Effected<Sealed>;

    /// How many entries are dirty since the last round, by an export that only counts.
    fn count_dirty(&mut self, operation: &Operation) -> Effected<u64>;

    /// Guest's VMM `hold` of the vCPUs, for `lease_ms`.
    fn pause(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()>;

    /// Guest's VMM `commit` with [`Operation::commit_epoch`], [`Operation::clone_incarnation`],
    /// [`Operation::clone_layer`] and [`Operation::block_writes`].
    fn commit(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest's VMM `release`. When this returns, its gates are open and its vCPUs run, or it is dormant; a
    /// commit sent before that has not been carried out yet never will be. `GuestGone` where its process
    /// has ended.
    fn release(&mut self, operation: &Operation) -> Effected<()>;

    /// Reads `owner.json`.
    fn read_owner(&mut self, operation: &Operation) -> Effected<Owner>;

    /// Guest agent `ThawUserland`.
    fn thaw_userland(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest agent `ThawFilesystems`.
    fn thaw_filesystems(&mut self, operation: &Operation) -> Effected<()>;

    /// Guest agent `EndCapture`.
    fn end_capture(&mut self, operation: &Operation) -> Effected<()>;

    /// The clone's VMM process is gone when this returns, however it got there.
    fn kill_clone(&mut self, operation: &Operation) -> Effected<()>;

    /// Removes the clone's layer; it is gone, or never was, when this returns. (A `prepare-split` that comes
    /// late may make it again; the guest manager removes layers that no chain names.) After a rollback no
    /// incarnation is dormant from here on.
    fn discard_clone(&mut self, operation: &Operation) -> Effected<()>;

    /// Dormant VMM `network/give` to the clone's. `GuestGone` where it has ended.
    fn hand_over_network(&mut self, operation: &Operation) -> Effected<()>;

    /// Clone's VMM `activate`; with `open_taps` it opens by name what no descriptor came for.
    fn activate_clone(&mut self, operation: &Operation, open_taps: bool) -> Effected<()>;

    /// Clone's guest agent `Activate`.
    fn activate_agent(&mut self, operation: &Operation) -> Effected<Activation>;

    /// Starts the guest anew on what `owner.json` names, as the next incarnation; what is left of the
    /// clone's and the guest's VMMs is ended before. Done already where such an incarnation runs.
    fn cold_boot(&mut self, operation: &Operation) -> Effected<()>;

    /// Records durably that the guest goes on as the clone, and that the old incarnation is dormant until
    /// `deadline` (removed at once where that is past, or its VMM is gone). A dormant from before is removed.
    fn retire(&mut self, operation: &Operation, deadline: Moment) -> Effected<()>;

    /// Whether [`Operation::guest_incarnation`] is dormant by this operation, its VMM ready to go on, and
    /// [`Operation::clone_incarnation`] the owner. `Refused` with what is not so; changes nothing.
    fn find_dormant(&mut self, operation: &Operation) -> Effected<Dormancy>;

    /// Clone's VMM `hold` of all gates, for `lease_ms`; block writes completed by then.
    fn hold_clone(&mut self, operation: &Operation, lease_ms: u64) -> Effected<u64>;

    /// Clone's VMM `commit` with the epoch and block writes of [`Operation::rollback`], to
    /// [`Operation::guest_incarnation`] and [`Operation::guest_layer`].
    fn commit_back(&mut self, operation: &Operation) -> Effected<()>;

    /// Clone's VMM `release`, as [`Effects::release`] is the guest's. `CloneGone` where its process has ended.
    fn release_clone(&mut self, operation: &Operation) -> Effected<()>;

    /// Dormant VMM `activate`: it takes its taps back, and runs. `GuestGone` where it has ended.
    fn activate_guest(&mut self, operation: &Operation) -> Effected<()>;

    /// Tells the guest agent that time has passed: it sets the clock and announces its addresses. Returns when the
    /// first frame went out, where that is known.
    fn reinstate(&mut self, operation: &Operation) -> Effected<Option<Moment>>;
}

/// Where progress goes. Called before each step and whenever something was learned; must not block.
pub trait Report {
    /// The operation as it stands.
    fn progress(&mut self, operation: &Operation);

    /// The journal could not be written; the operation is undone or finished without it.
    fn journal_trouble(&mut self, operation: &Operation, error: &str);
}
