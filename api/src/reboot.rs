//! `SeamlessReboot`: one reboot of one guest, run once, like a Job.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::never_observed;
use crate::phase::Phase;
use crate::readiness::{Probe, ProbeResult};
use crate::window::Window;

/// One reboot of one guest.
///
/// A clone of the guest reboots in the background while the guest serves; what the guest changed meanwhile
/// is integrated into the clone; then the clone takes the guest's place. Runs once, like a Job. Nothing but
/// `action` can be changed after it was made. Deleting it before the clone has taken over aborts it.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "understudy.dev",
    version = "v1alpha1",
    kind = "SeamlessReboot",
    plural = "seamlessreboots",
    shortname = "sr",
    category = "understudy",
    namespaced,
    status = "SeamlessRebootStatus",
    derive = "PartialEq",
    selectable = ".status.nodeName",
    doc = "One reboot of one Guest without interruption: a clone reboots in the background, then takes the guest's place. Runs once, like a Job.",
    printcolumn = r#"{"name":"Guest","type":"string","jsonPath":".spec.guestName"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase","description":"How far the reboot is"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.reason","description":"Why it is in this phase, in one word"}"#,
    printcolumn = r#"{"name":"Interruption-ms","type":"integer","jsonPath":".status.result.interruptionMilliseconds","description":"Measured: from the guest's last frame to the clone's first"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".status.result.after.kernelRelease","priority":1}"#,
    printcolumn = r#"{"name":"Rounds","type":"integer","jsonPath":".status.result.rounds","priority":1}"#,
    printcolumn = r#"{"name":"Files","type":"integer","jsonPath":".status.result.files","priority":1}"#,
    printcolumn = r#"{"name":"Conflicts","type":"integer","jsonPath":".status.result.conflictCount","priority":1}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.message","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct SeamlessRebootSpec {
    /// Name of the Guest to reboot, in the same namespace.
    pub guest_name: String,
    /// Why, for people; at most 1024 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What holds afterwards. Where all of it holds already, the reboot is `Succeeded` at once with the
    /// reason `AlreadySatisfied`, so that applying the same manifest again is harmless. Where the clone
    /// does not satisfy it, the reboot is `Failed` before anything has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expect>,
    /// Units that need more than to be frozen.
    #[serde(default)]
    pub services: Services,
    /// How captured changes are treated.
    #[serde(default)]
    pub capture: Capture,
    /// How the clone takes over.
    #[serde(default)]
    pub cutover: Cutover,
    /// The longest that each phase may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// How long the old incarnation is kept, paused, after the clone has taken over: a duration such as
    /// `10m`, at most `24h`. Its memory stays in use until then.
    #[serde(default = "ten_minutes")]
    pub retain_dormant_for: String,
    /// Seconds after which a finished SeamlessReboot is deleted. Absent: it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i64>,
    /// What shall become of it now. Written by hand when it is wanted, by `kubectl patch` or a command of
    /// `understudy-node`, and never kept in Git: what was taken in stands in `status.action`, and removing
    /// the field afterwards changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Action>,
}

fn ten_minutes() -> String {
    "10m".to_owned()
}

/// What holds after the reboot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Expect {
    /// Kernel release that runs (`uname -r`), such as `6.1.0-50-cloud-amd64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// The guest was booted after this time (RFC 3339), such as `2026-11-22T18:00:00Z`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted_after: Option<Time>,
}

/// Units of the guest that need more than to be frozen. Names with their type, such as `mail.service`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Services {
    /// Units that must not run twice: on the clone they start when it takes over, not before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub hold: Vec<String>,
    /// Units that are stopped cleanly on the guest, instead of frozen, when the clone takes over: for what
    /// writes its state when it is told to stop. They count towards `cutover.maxPause`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub stop: Vec<String>,
}

/// How captured changes are treated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Capture {
    /// What becomes of files that both the guest and the clone changed, but logs that only grew (they are
    /// joined). The losing version is kept under `/var/lib/understudy/conflicts/` in the guest.
    #[serde(default)]
    pub on_conflict: OnConflict,
}

/// What becomes of files that both sides changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnConflict {
    /// The guest's version wins.
    #[default]
    PreferGuest,
    /// The clone's version wins.
    PreferClone,
    /// The reboot is `Failed` with the paths.
    Fail,
}

/// What shall become of a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Action {
    /// What is asked for.
    #[serde(rename = "type")]
    pub kind: ActionType,
    /// What becomes of that which the clone has changed since it took over: to be said for `Rollback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
}

/// What is asked of a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActionType {
    /// Approves the cutover of a reboot whose `cutover.mode` is `Manual`, at once or in advance.
    Proceed,
    /// Takes the reboot back: the clone is discarded, and the guest serves on. Refused once the clone has
    /// taken over.
    Abort,
    /// Lets the incarnation before take the guest's place again, as long as it is dormant
    /// (`retainDormantFor`). Before the clone has taken over it is an `Abort`.
    Rollback,
}

impl ActionType {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            ActionType::Proceed => "Proceed",
            ActionType::Abort => "Abort",
            ActionType::Rollback => "Rollback",
        }
    }
}

/// What becomes of that which the clone has changed since it took over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Changes {
    /// It is discarded.
    Discard,
}

/// How the clone takes over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cutover {
    /// Whether the clone takes over by itself.
    #[serde(default)]
    pub mode: CutoverMode,
    /// When the clone may take over. Until then it waits in the phase `AwaitingCutover`, for
    /// `timeouts.awaitingCutover` at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// What the clone must answer before it takes over: a clone that is not ready fails the reboot, and the guest
    /// has lost nothing. Asked one after the other when the guest's changes are integrated, again after a wait for
    /// approval or window, and of a rehearsed clone before it is discarded; within `timeouts.integrating`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub readiness: Vec<Probe>,
    /// The longest that the guest may be held before the clone takes over, `100ms` to `2m`. A cutover
    /// that would take longer is taken back: the guest serves on and is integrated anew.
    #[serde(default = "ten_seconds")]
    pub max_pause: String,
}

fn ten_seconds() -> String {
    "10s".to_owned()
}

impl Default for Cutover {
    fn default() -> Cutover {
        Cutover {
            mode: CutoverMode::default(),
            window: None,
            readiness: Vec::new(),
            max_pause: ten_seconds(),
        }
    }
}

/// Whether the clone takes over by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CutoverMode {
    /// As soon as it is ready.
    #[default]
    Automatic,
    /// When it is ready and `action: Proceed` was asked for. It is kept up to date meanwhile, and its memory
    /// stays in use.
    Manual,
    /// Never: it boots, the guest's changes are integrated, and it is discarded. The guest is left alone;
    /// the result tells what a reboot would do.
    Rehearse,
}

/// The longest that each phase may take, `1s` to `24h`; a phase that takes longer fails the reboot, which
/// costs the guest nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Timeouts {
    /// Waiting for what preflight asks (guest agent, memory, disk).
    #[serde(default = "five_minutes")]
    pub pending: String,
    /// From the guest's confirmation to the split of its disk; making the clone's VMM included.
    #[serde(default = "five_minutes")]
    pub cloning: String,
    /// From the clone's first instruction to its boot notice.
    #[serde(default = "ten_minutes")]
    pub rebooting: String,
    /// All rounds together, of one attempt.
    #[serde(default = "thirty_minutes")]
    pub integrating: String,
    /// Waiting for `action: Proceed` and for `cutover.window`.
    #[serde(default = "one_day")]
    pub awaiting_cutover: String,
}

fn five_minutes() -> String {
    "5m".to_owned()
}

fn thirty_minutes() -> String {
    "30m".to_owned()
}

fn one_day() -> String {
    "24h".to_owned()
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            pending: five_minutes(),
            cloning: five_minutes(),
            rebooting: ten_minutes(),
            integrating: thirty_minutes(),
            awaiting_cutover: one_day(),
        }
    }
}

/// How far the reboot is, and what it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SeamlessRebootStatus {
    /// Generation of the spec that this status was written for; -1: none yet.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// Node whose agent runs the reboot: that of its Guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// UID of that Node, in a cluster; a node of the same name with another UID is another node.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Why it is in this phase, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When each phase began, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phase_transitions: Vec<PhaseTransition>,
    /// The last `spec.action` that was taken in. It counts whatever the spec says afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<ActionStatus>,
    /// Progress within the phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What was found, done and measured; grows as the reboot proceeds.
    #[serde(default, rename = "result", skip_serializing_if = "Option::is_none")]
    pub result: Option<RebootResult>,
    /// `Ready`, `Reconciling` and `Stalled` (as kstatus reads them), `Complete` and `Failed` (as Jobs have); in a
    /// cluster `Accepted` and `AgentAvailable`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Default for SeamlessRebootStatus {
    fn default() -> SeamlessRebootStatus {
        SeamlessRebootStatus {
            observed_generation: never_observed(),
            node_name: None,
            node_uid: None,
            phase: None,
            reason: None,
            message: None,
            phase_transitions: Vec::new(),
            action: None,
            progress: None,
            result: None,
            conditions: Vec::new(),
        }
    }
}

/// A `spec.action` that was taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ActionStatus {
    /// What was asked for.
    #[serde(rename = "type")]
    pub kind: ActionType,
    /// When it was taken in.
    pub time: Time,
    /// Why it was not done; absent: it was done, or is being done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A phase and when it began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTransition {
    /// The phase.
    pub phase: Phase,
    /// When it began.
    pub transition_time: Time,
}

/// Progress within a phase.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// What is being done, for people.
    pub message: String,
    /// How much of the phase is done, where that can be told: 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Round of integration, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<i64>,
    /// Files integrated so far, in all rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i64>,
    /// Bytes integrated so far, in all rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Files that became dirty again during the last round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<i64>,
}

/// What was found, done and measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebootResult {
    /// The guest before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Incarnation>,
    /// The clone, from its boot notice on; the guest afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Incarnation>,
    /// Interruption as measured: from the closing of the guest's transmit gate to the clone's first frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interruption_milliseconds: Option<i64>,
    /// From the guest's holding of ingress to the commit point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_milliseconds: Option<i64>,
    /// How long the guest's file systems were frozen for the split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split_freeze_microseconds: Option<i64>,
    /// From the clone's first instruction to its boot notice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_boot_milliseconds: Option<i64>,
    /// Rounds of integration, the last one included.
    #[serde(default)]
    pub rounds: i64,
    /// Files and other paths integrated, in all rounds.
    #[serde(default)]
    pub files: i64,
    /// Bytes of content integrated, in all rounds.
    #[serde(default)]
    pub bytes: i64,
    /// Files that both sides had changed.
    #[serde(default)]
    pub conflict_count: i64,
    /// The first 100 of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<Conflict>,
    /// What could not be carried over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remains: Option<Remains>,
    /// How the probes of `cutover.readiness` ended, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub readiness: Vec<ProbeResult>,
    /// Interruption of a rollback as measured: from the holding of the clone to the first frame of the
    /// incarnation that was dormant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_interruption_milliseconds: Option<i64>,
    /// How often a cutover was taken back before this one.
    #[serde(default)]
    pub taken_back: i64,
    /// Units started on the clone when it took over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub started_units: Vec<StartedUnit>,
    /// Units that did not start on the clone, or that failed on it and not on the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_units: Vec<FailedUnit>,
}

/// One life of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Incarnation {
    /// Its number.
    pub incarnation: i64,
    /// The kernel's boot ID.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// Kernel release (`uname -r`).
    pub kernel_release: String,
}

/// A file that both sides had changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Conflict {
    /// Path in the guest.
    pub path: String,
    /// What became of it: `joined`, `guest` or `clone`.
    pub resolution: String,
    /// Where the losing version is kept in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

/// What could not be carried over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Remains {
    /// Files that were open and had no name any more, with their holders; the first 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unlinked_open_files: Vec<String>,
    /// Established TCP connections; they were reset, as by any reboot.
    #[serde(default)]
    pub tcp_connections: i64,
    /// Running processes.
    #[serde(default)]
    pub processes: i64,
}

/// A unit started on the clone when it took over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartedUnit {
    /// Its name.
    pub unit: String,
    /// How long its start took, as systemd tells.
    pub milliseconds: i64,
}

/// A unit that did not start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedUnit {
    /// Its name.
    pub unit: String,
    /// What systemd said.
    pub message: String,
}
