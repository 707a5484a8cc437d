//! Requests and answers of the control API: HTTP/1.1 with JSON bodies on a Unix socket, one request per
//! connection or keep-alive, so that `curl --unix-socket` works. Errors are a status of 400 (bad
//! request), 404 (no such route or disk), 409 (not in this state) or 500, with an [`ErrorBody`].
//!
//! | route | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/vm` | | [`VmInfo`] |
//! | `GET /v1/console` | | [`ConsoleTail`] |
//! | `PUT /v1/vm/boot` | `{}` | `{}`: starts a prepared clone's vCPUs |
//! | `PUT /v1/vm/power-button` | `{}` | `{}`: ACPI power button |
//! | `PUT /v1/vm/reset` | `{}` | `{}`: as the guest's own reset |
//! | `PUT /v1/vm/stop` | `{}` | `{}`: ends the process after disks are flushed |
//! | `PUT /v1/hold` | [`HoldRequest`] | [`HoldReport`] |
//! | `PUT /v1/release` | `{}` | [`HoldReport`]: opens all gates, runs the vCPUs |
//! | `PUT /v1/disks/{name}/prepare-split` | [`PrepareSplit`] | `{}` |
//! | `PUT /v1/disks/{name}/split` | [`Split`] | [`SplitReport`] |
//! | `PUT /v1/disks/{name}/merge` | `{}` | [`DiskInfo`]: begins or continues merging down in the background |
//! | `PUT /v1/commit` | [`Commit`] | `{}` |
//! | `PUT /v1/network/give` | [`GiveNetwork`] | `{}` |
//! | `PUT /v1/activate` | [`Activate`] | [`ActivateReport`] |
//!
//! Saving and resuming sessions: [`crate::session`].
//!
//! Every `PUT` is idempotent: asked again with the same body it answers as before.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// State of the virtual machine within its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Built and waiting for `PUT /v1/vm/boot`.
    Prepared,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped under a lease.
    Paused,
    /// The session is saved: vCPUs are stopped until the save is cancelled or its lease runs out.
    Saved,
    /// `owner.json` names another incarnation: this one opens its gates no more, unless that one commits to it
    /// again.
    Dormant,
    /// The guest has powered itself off or crashed; the process ends or has ended its vCPUs.
    Exited,
}

/// Answer of `GET /v1/vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VmInfo {
    /// [`crate::API_VERSION`] of the VMM.
    pub api_version: u32,
    /// Version of the VMM's package.
    pub vmm_version: String,
    /// `namespace/name`.
    pub guest: String,
    /// Incarnation of this process.
    pub incarnation: u64,
    /// Process ID.
    pub pid: u32,
    /// What it does.
    pub state: VmState,
    /// Whether it owns the guest: named by `owner.json` and holding `owner.lock`.
    pub owner: bool,
    /// Boots since the process started: 1 after the first, +1 for each reset by the guest.
    pub boots: u64,
    /// Kernel that the current boot runs, as found: path and, where known, release.
    pub kernel: Option<String>,
    /// The last lines that tell why the guest stopped by itself (panic, triple fault, power-off).
    pub exit_reason: Option<String>,
    /// Gates as they stand.
    pub gates: Gates,
    /// Counters since the process started.
    pub counters: Counters,
    /// The disks.
    pub disks: Vec<DiskInfo>,
    /// The network interfaces.
    #[serde(default)]
    pub interfaces: Vec<InterfaceInfo>,
    /// Where the guest was resumed from, if it was and has not been reset since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<crate::session::ResumeInfo>,
}

/// A network interface as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceInfo {
    /// Index in the configuration.
    pub index: u16,
    /// Whether its frames go to the agent's responder and not to its tap.
    pub isolated: bool,
    /// When the guest sent its first frame since the interface got its present backend, in microseconds
    /// of the host's real time: the end of an interruption.
    pub first_sent_us: Option<u64>,
    /// When it sent its latest frame.
    pub last_sent_us: Option<u64>,
}

/// Answer of `GET /v1/console`: what the guest wrote last to its serial console, 16 KiB at most. It tells
/// why a kernel panicked or what a boot waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsoleTail {
    /// The text; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// What may pass. `true`: closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Gates {
    /// Frames from the tap to the guest; closed: they wait in the tap's queue.
    pub receive: bool,
    /// Frames from the guest; closed: they wait in the transmit ring.
    pub transmit: bool,
    /// Block writes, discards and flushes; closed: they wait in the device's ring.
    pub write: bool,
    /// vCPUs; closed: paused.
    pub vcpus: bool,
}

/// Counters since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// Write, discard and write-zeroes requests completed on all disks. A commit compares it.
    pub block_writes: u64,
    /// Requests that wait at the closed write gate now.
    pub block_writes_held: u64,
    /// Frames delivered to the guest.
    pub frames_received: u64,
    /// Frames sent by the guest.
    pub frames_sent: u64,
    /// Frames that were dropped for want of guest buffers.
    pub frames_dropped: u64,
}

/// Closes gates for a time. Gates that are already closed stay so; the lease is renewed for all. When
/// the lease runs out everything opens again and the vCPUs run, unless a commit came before: an agent
/// that dies costs a pause and no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HoldRequest {
    /// Gates to close, beside those that are closed.
    pub gates: Gates,
    /// Lease in milliseconds from now, 1 to 600,000.
    pub lease_ms: u64,
}

/// Answer of hold and release. In-flight requests have ended before a closed gate is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HoldReport {
    /// Gates as they stand.
    pub gates: Gates,
    /// Counters as they stand.
    pub counters: Counters,
}

/// Makes both layers of a split, durably and before the guest is frozen: `guest_layer` becomes the
/// guest's next top layer and `clone_layer` the clone's, both empty above the guest's current top. Then
/// names `guest_layer` in `owner.json`: it is empty, so that a crash in between loses nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PrepareSplit {
    /// New top layer of the guest.
    pub guest_layer: Uuid,
    /// Top layer of the clone.
    pub clone_layer: Uuid,
}

/// Switches the guest's writes to the prepared layer; what is below it is read-only from now on. O(1):
/// in-flight requests are drained, the old top is flushed, a pointer changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Split {
    /// The `guest_layer` of [`PrepareSplit`].
    pub guest_layer: Uuid,
}

/// Answer of a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SplitReport {
    /// How long block requests waited, in microseconds.
    pub held_us: u64,
}

/// A disk as the VMM has it open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskInfo {
    /// Name of the disk.
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Chain from the top; empty: the source file alone.
    pub layers: Vec<Uuid>,
    /// Write session of the top: grows each time a VMM opens it for writing.
    pub session: u64,
    /// Merge in progress.
    pub merge: Option<MergeInfo>,
    /// The host's file system has no room: writes of the guest wait, and are tried again by themselves.
    #[serde(default)]
    pub full: bool,
}

/// Progress of merging the layers down into the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeInfo {
    /// Bytes that were in layers when the merge began.
    pub total: u64,
    /// Bytes that still are.
    pub remaining: u64,
    /// Why it stopped, if it did (the host's disk is full, an I/O error).
    pub error: Option<String>,
}

/// The commit point. Asked of the *guest's own* VMM when its gates are closed and its vCPUs paused: it
/// replaces `owner.json`, releases `owner.lock`, and is dormant. Refused (409) when anything was written
/// since `block_writes` was reported, or when the lease has run out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Commit {
    /// New epoch: the current one plus one.
    pub epoch: u64,
    /// Incarnation that becomes the owner: the clone; at a rollback the one that is dormant.
    pub incarnation: u64,
    /// Its top layer.
    pub layer: Uuid,
    /// [`Counters::block_writes`] as reported when the write gate was closed.
    pub block_writes: u64,
}

/// Asks a dormant VMM to send its tap descriptors to the clone's handover socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GiveNetwork {
    /// The clone's [`crate::config::Paths::handover`].
    pub socket: PathBuf,
}

/// Asks a clone that `owner.json` names to take the lock, attach its interfaces and open its gates. At a rollback it
/// asks the dormant incarnation the same: it takes back the taps that it gave away, and its kvm-clock goes on where it
/// stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Activate {
    /// The epoch that was committed.
    pub epoch: u64,
    /// Open taps by name where no descriptor has arrived (the old VMM is gone).
    pub open_taps: bool,
}

/// Answer of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActivateReport {
    /// Interfaces that run on a descriptor handed over by the old VMM.
    pub taps_received: u32,
    /// Interfaces whose tap was opened by name.
    pub taps_opened: u32,
}

/// Body of every answer that is not 200.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// What was tried, what is wrong and what would do.
    pub error: String,
}
