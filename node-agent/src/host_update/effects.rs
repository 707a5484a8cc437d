//! What the engine asks of the world. The node agent implements it with VMMs, credential providers, systemd
//! and logind, the crash simulation with a world of its own.

use understudy_vmm_control::session::{Refusal, SaveState};
use uuid::Uuid;

use super::quiesce::{InFlight, Rules};
use super::record::{Session, Update};
use crate::moment::Moment;

/// Why an effect did not happen, by what the engine does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// It may work if tried again: a peer that does not answer, a timeout. Whether the effect happened is
    /// unknown.
    Retry,
    /// Somebody was asked who is not on this host, and has not answered: tried again as long as it takes. Nothing else
    /// would help, and what waits is kept.
    Awaited,
    /// Trying again is no use: what was asked was refused.
    Refused,
    /// The guest's VMM is gone: its process ended, or the guest powered off or crashed.
    GuestGone,
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

/// The host as it is in this boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Kernel release (`uname -r`).
    pub kernel_release: String,
    /// When the kernel was started (`btime`): microseconds since 1970.
    pub booted_at: i64,
    /// When this agent's process was started: microseconds since 1970.
    pub agent_started_at: i64,
}

/// What the host itself is about to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostIntent {
    /// Nobody can tell at the moment: logind was not asked yet, or does not answer.
    Unknown,
    /// It stays up; or it has called off what it had begun.
    StaysUp,
    /// It goes down: logind's `PrepareForShutdown`, or the stop job of our own service within a shutdown.
    GoesDown {
        /// Until when it waits for us, as far as is known. It may grow when the stop job takes over from
        /// the inhibitor.
        deadline: Moment,
        /// In the host's words, such as `reboot` or `poweroff`.
        reason: String,
    },
}

/// How `update.command` ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandEnd {
    /// Whether it succeeded.
    pub success: bool,
    /// Exit status in words, and the end of its output (at most 4 KiB).
    pub output: String,
}

/// What preflight found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preflight {
    /// Every guest whose VMM runs: all that have a session.
    pub guests: Vec<FoundGuest>,
    /// Why the credential provider cannot keep keys over a reboot, if so: none of that name, or what it
    /// lacks, and what would do.
    pub provider_problem: Option<String>,
}

/// A guest with a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGuest {
    /// `namespace/name`.
    pub guest: String,
    /// Its UID.
    pub uid: String,
    /// The incarnation that runs.
    pub incarnation: u64,
    /// A fresh UUID: names the checkpoint, its directory and its key.
    pub checkpoint: Uuid,
    /// `spec.priority`.
    pub priority: i32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Bytes that a save is expected to write: what is resident, at most RAM.
    pub expected_bytes: u64,
    /// Why its session cannot be saved, if so: its VMM does not answer, there is no space left for it (how
    /// much is missing), an operation is still in flight.
    pub problem: Option<String>,
}

/// How far a save is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveProgress {
    /// As the VMM says.
    pub state: SaveState,
    /// Rounds of pre-copying.
    pub rounds: u32,
    /// Bytes of memory written, all rounds together.
    pub written_bytes: u64,
    /// Bytes that are known to be left.
    pub remaining_bytes: u64,
    /// Bytes of the checkpoint on disk, once saved.
    pub checkpoint_bytes: u64,
    /// From the stopping of the vCPUs until all was durable, in microseconds, once saved.
    pub pause_us: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// What a checkpoint's directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointFacts {
    /// No manifest: it never was complete, or it was made void.
    Missing,
    /// A manifest is in place, and it was not consumed. Whether it is good is for the resume to say.
    Complete,
    /// It was consumed, and no VMM that came from it runs any more.
    Consumed,
    /// A VMM that came from it runs, in this boot.
    Running,
    /// The guest goes on without it: a VMM of it runs that did not come from it, or the session was given up
    /// by a user, or the Guest was deleted.
    Unwanted,
}

/// What became of a resume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resumption {
    /// The guest runs.
    Runs {
        /// Its first instruction.
        first_instruction: Moment,
    },
    /// The VMM has refused the checkpoint, and changed nothing.
    Refused {
        /// Why, in one word.
        refusal: Refusal,
        /// For people.
        message: String,
    },
}

/// How a resumed guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settling {
    /// It runs, and some of its memory is in the checkpoint alone.
    Loading,
    /// It runs, and the checkpoint's files are needed no more.
    Loaded,
    /// Its VMM is gone: the guest crashed, was powered off, or moved on to another incarnation.
    Gone,
    /// Memory in the checkpoint proved bad: the guest is paused, everything is kept.
    Damaged {
        /// What the VMM said.
        message: String,
    },
}

/// The effects.
///
/// Every effect is idempotent: an agent that died within it, or just after it, performs it again with the
/// same record. Each returns within a bounded time of its own, seconds. The record that calls for an effect
/// is durable before it is called (where the machine says so).
///
/// From [`Effects::quiesce_operations`] to [`Effects::release_operations`] the engine alone starts and ends
/// VMMs of the guests that [`super::hold::hold`] names; so it is for an agent that finds such a record when
/// it starts, before it does anything else with guests.
pub trait Effects {
    /// The time.
    fn now(&mut self) -> Moment;

    /// Waits until then; returns early when [`Effects::abort_requested`], [`Effects::host_intent`] or
    /// [`Effects::must_stop`] change.
    fn wait(&mut self, until: Moment);

    /// Why the update shall be aborted, if it shall (deleted, `action`). Ignored once the reboot was asked
    /// for, and for the origin `Host`.
    fn abort_requested(&mut self, update: &Update) -> Option<String>;

    /// What the host itself is about to do. After a restart of the agent: `Unknown` until logind was
    /// asked, never a guess; a wrong `StaysUp` lets saved guests run on.
    fn host_intent(&mut self) -> HostIntent;

    /// Whether the agent is being stopped, so that the driver returns and the update goes on from the
    /// journal. While the host goes down this is false until the update's phase is `Rebooting`, so that
    /// the service's stop job waits for the saves.
    fn must_stop(&mut self) -> bool;

    /// Looks at the host.
    fn inspect_host(&mut self) -> Effected<HostFacts>;

    /// `update.command` on the host; begun where it was not yet for this update's UID, its end waited for
    /// at most about a second; `None`: not yet. A transient unit named after the update, so that a
    /// restarted agent finds it running or its result; where neither is known it is run again.
    fn run_command(&mut self, update: &Update) -> Effected<Option<CommandEnd>>;

    /// `update.command` does not run any more when this returns, and its result is forgotten.
    fn end_command(&mut self, update: &Update) -> Effected<()>;

    /// From now on no SeamlessReboot, start, stop or restart of a guest is begun (they tell
    /// [`understudy_api::conditions::reasons::HOST_UPDATING`]); to those in flight `rules` is applied:
    /// suspended, aborted or left to finish. Returns those that are still in flight; asked again, about
    /// every 200 ms, until there is none. Dormant incarnations are removed: they end with the host.
    fn quiesce_operations(&mut self, update: &Update, rules: &Rules) -> Effected<Vec<InFlight>>;

    /// Operations may begin again, suspended ones go on; guests that [`super::hold::hold`] does not name are
    /// the guest manager's again. Where the host goes down all the same, it is not delayed any more.
    fn release_operations(&mut self, update: &Update) -> Effected<()>;

    /// Looks at every guest whose VMM runs, at the space for all sessions together, at the credential
    /// provider. Capabilities of CPU and KVM are recorded by the VMMs in their manifests.
    fn preflight(&mut self, update: &Update) -> Effected<Preflight>;

    /// Makes a fresh key of 32 bytes for [`Session::checkpoint`], gives it to the credential provider, bound
    /// to node, guest, checkpoint and this boot, and puts it where the VMM reads it (a root-only file in
    /// memory, `/run`). When this returns, the provider's part survives a power cut. Asked again before the
    /// session is saved it may make another key in place of the first.
    fn register_key(&mut self, update: &Update, session: &Session) -> Effected<()>;

    /// `PUT /v1/save`: begins the save where it has not begun, tells how far it is. It holds before its pause,
    /// until [`Effects::pause_for_save`]. The checkpoint's directory is made. `lease_ms` counts for a save that
    /// begins. `GuestGone` where the VMM's process has ended.
    fn save(&mut self, update: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress>;

    /// `PUT /v1/save/pause`: the guest may be paused for the rest; tells how far the save is. `GuestGone` where
    /// the VMM's process has ended.
    fn pause_for_save(&mut self, update: &Update, session: &Session) -> Effected<SaveProgress>;

    /// `PUT /v1/save/keep`: renews the lease of a saved guest, tells whether it is saved still. `GuestGone`
    /// where the VMM's process has ended.
    fn keep_saved(&mut self, update: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress>;

    /// `PUT /v1/save/cancel`: when this returns the guest runs, and its checkpoint is void, durably. Fine
    /// where no save was begun, or it has failed. `GuestGone` where the VMM's process has ended.
    fn cancel_save(&mut self, update: &Update, session: &Session) -> Effected<()>;

    /// Every save is durable, and that is recorded: for the origin `Host`, or where the host goes down
    /// meanwhile, releases logind's inhibitor and lets the service's stop job end. Nothing else.
    fn acknowledge(&mut self, update: &Update) -> Effected<()>;

    /// Asks for the host's reboot, as [`super::plan::Plan::reboot`] says, in response to the
    /// acknowledgement. Returns when it was accepted, not when it happens. Asked again while the reboot is
    /// under way: fine. `Refused` where systemd or the command refuse.
    fn request_reboot(&mut self, update: &Update) -> Effected<()>;

    /// Calls the reboot off. When this returns `Ok` the host does not go down because of it any more;
    /// `Refused`: it cannot be called off, the host is going down.
    fn call_off_reboot(&mut self, update: &Update) -> Effected<()>;

    /// Looks at a session's checkpoint.
    fn inspect_checkpoint(&mut self, update: &Update, session: &Session) -> Effected<CheckpointFacts>;

    /// Logs on: obtains the session's key from the credential provider and puts it where the VMM reads it.
    /// `Refused` where the provider says that there is no such key or that it may not give it, or where nobody wants
    /// the session any more; `Retry` where it does not answer; `Awaited` where it was asked, and its answer is on the
    /// way from elsewhere.
    fn obtain_key(&mut self, update: &Update, session: &Session) -> Effected<()>;

    /// Starts a VMM that resumes from the checkpoint, with the guest's taps and disks. Where one that came
    /// from it runs already that is found. Returns when the guest has run its first instruction, or was
    /// refused; the network is announced, the guest agent told (time, vsock), before or soon after.
    /// `GuestGone`: the VMM ended after the checkpoint was consumed, so that it is of no more use.
    fn resume(&mut self, update: &Update, session: &Session) -> Effected<Resumption>;

    /// Looks at a resumed guest.
    fn look_after(&mut self, update: &Update, session: &Session) -> Effected<Settling>;

    /// Removes the checkpoint's directory, its key at the credential provider and the key's file in memory.
    /// Fine where they are gone. Called for sessions that went on (and need it no more), that ran on, that
    /// were lost, or whose Guest was deleted; never for one that is kept.
    fn destroy(&mut self, update: &Update, session: &Session) -> Effected<()>;
}

/// Where progress goes. Called before each step and whenever something was learned; must not block.
pub trait Report {
    /// The update as it stands.
    fn progress(&mut self, update: &Update);

    /// The journal could not be written; the update is undone or finished without it.
    fn journal_trouble(&mut self, update: &Update, error: &str);
}
