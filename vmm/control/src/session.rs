//! Saving and resuming a guest's session: the messages of the control API and the words for why a
//! checkpoint is refused.
//!
//! | route | body | answer |
//! | --- | --- | --- |
//! | `PUT /v1/save` | [`SaveRequest`] | [`SaveInfo`]: begins to save; asked again, tells how far it is |
//! | `PUT /v1/save/pause` | [`PauseForSave`] | [`SaveInfo`]: a save that waits for it goes on to its pause |
//! | `GET /v1/save` | | [`SaveInfo`]; 404 where no save was asked for |
//! | `PUT /v1/save/keep` | [`KeepSaved`] | [`SaveInfo`]: renews the lease of a saved guest |
//! | `PUT /v1/save/cancel` | [`CancelSave`] | [`SaveInfo`]: the guest runs on, its checkpoint is void |
//!
//! A *save* writes a checkpoint into a directory while the guest runs, pauses it for the rest, and leaves it
//! paused: a saved guest has no later than what was saved. It runs on only after [`CancelSave`] or after its
//! lease has run out, and before that the checkpoint is made void, durably: its manifest is removed and the
//! write session of every writable disk grows, so that a copy of the checkpoint is refused as well.
//!
//! A *resume* is a VMM process that is started with [`crate::config::VmConfig::resume`]. What it refuses it
//! refuses before the checkpoint is consumed: the process ends with [`REFUSED_EXIT_CODE`] and the last line
//! of its log is `<Refusal>: <message>`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Exit code of a VMM that refuses to resume from a checkpoint. Nothing was changed.
pub const REFUSED_EXIT_CODE: i32 = 3;

/// Name of the manifest in a checkpoint's directory: it gets this name last, when all is durable.
pub const MANIFEST: &str = "manifest.json";

/// Name of the marker in a checkpoint's directory that says it was used: durable before the resumed guest's
/// first instruction.
pub const CONSUMED: &str = "consumed";

/// Asks a running guest's VMM to save its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SaveRequest {
    /// Names the checkpoint; asked again with the same one, the answer tells how far it is.
    pub checkpoint: Uuid,
    /// Where it is written: an existing directory that is empty, or left by a failed try.
    pub directory: PathBuf,
    /// File with the 32 bytes of a fresh key, read once; used for this checkpoint alone.
    pub key: PathBuf,
    /// UID of the Guest, bound into the checkpoint.
    pub guest_uid: String,
    /// Boot ID of the host, bound into the checkpoint: it is resumed in another boot than this.
    pub host_boot_id: String,
    /// The machine ID of the host, bound into the checkpoint.
    pub machine_id: String,
    /// How long the final pause should be at most, in milliseconds: when what is left can be written in this
    /// time, or rounds shrink no more, the guest is paused.
    pub target_pause_ms: u64,
    /// Waits before the pause until [`PauseForSave`] comes: guests of which each is ready are paused together,
    /// so that none waits for the save of another.
    #[serde(default)]
    pub hold: bool,
    /// How long a saved guest stays paused without [`KeepSaved`], in milliseconds, 1 to 3,600,000.
    pub lease_ms: u64,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaveState {
    /// Memory is written while the guest runs.
    PreCopying,
    /// What is left fits the pause. The guest runs on, and what it writes is written again now and then, until
    /// [`PauseForSave`] comes.
    Ready,
    /// The guest is paused, the rest is written.
    Pausing,
    /// All is durable and the manifest in place. The guest is paused.
    Saved,
    /// It failed; the guest runs. Files of the try may be left in the directory, never a manifest.
    Failed,
    /// It was cancelled, or its lease has run out; the guest runs and the checkpoint is void.
    Cancelled,
}

/// Answer of the save routes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SaveInfo {
    /// The checkpoint.
    pub checkpoint: Uuid,
    /// How far it is.
    pub state: SaveState,
    /// Rounds of pre-copying that were completed.
    pub rounds: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Bytes of memory written so far, all rounds together.
    pub written_bytes: u64,
    /// Bytes that are known to be left.
    pub remaining_bytes: u64,
    /// Bytes of all files of the checkpoint on disk, once saved.
    pub checkpoint_bytes: u64,
    /// From the stopping of the vCPUs until everything was durable and the manifest in place, in microseconds.
    pub pause_us: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Lets a save that was asked to [hold](SaveRequest::hold) pause the guest, now or once it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PauseForSave {
    /// The checkpoint.
    pub checkpoint: Uuid,
}

/// Renews the lease of a saved guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeepSaved {
    /// The checkpoint.
    pub checkpoint: Uuid,
    /// As in [`SaveRequest::lease_ms`], from now.
    pub lease_ms: u64,
}

/// Ends a save, or undoes it: the guest runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CancelSave {
    /// The checkpoint.
    pub checkpoint: Uuid,
}

/// From what a VMM process resumes, in [`crate::config::VmConfig::resume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resume {
    /// The checkpoint that is meant: another one in the directory is refused.
    pub checkpoint: Uuid,
    /// Its directory.
    pub directory: PathBuf,
    /// File with the key, read once at the start.
    pub key: PathBuf,
    /// UID of the Guest that is meant.
    pub guest_uid: String,
    /// Boot ID of the host now: that of the saving boot is refused.
    pub host_boot_id: String,
    /// Machine ID of the host now: another than the saving one's is refused.
    pub machine_id: String,
}

/// How far a resumed guest is, in [`crate::api::VmInfo::resume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeInfo {
    /// The checkpoint it came from.
    pub checkpoint: Uuid,
    /// Bytes of memory that are still in the checkpoint alone; its files are needed until this is 0.
    pub pending_bytes: u64,
    /// From the start of the process to the guest's first instruction, in microseconds.
    pub start_us: u64,
    /// Why memory could not be read (the guest is paused, everything is kept): `CheckpointDamaged`.
    pub error: Option<String>,
}

/// Why a checkpoint is not resumed. The names are reasons in a Guest's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// There is no checkpoint, or it is not complete.
    CheckpointMissing,
    /// It is torn, truncated, or its content is not what was written.
    CheckpointDamaged,
    /// It was sealed with another key.
    CheckpointKey,
    /// It belongs to another guest, host or checkpoint than was asked for.
    CheckpointForeign,
    /// It was resumed before, or the guest ran on after it was saved, or its disks were written since.
    CheckpointStale,
    /// The saving boot has not ended.
    CheckpointSameBoot,
    /// This CPU, KVM or VMM lacks what the session needs.
    CheckpointIncompatible,
}

impl SaveState {
    /// Whether the save has ended, well or not.
    pub fn has_ended(self) -> bool {
        matches!(self, SaveState::Saved | SaveState::Failed | SaveState::Cancelled)
    }
}

impl Refusal {
    /// All of them.
    pub const ALL: [Refusal; 7] = [
        Refusal::CheckpointMissing,
        Refusal::CheckpointDamaged,
        Refusal::CheckpointKey,
        Refusal::CheckpointForeign,
        Refusal::CheckpointStale,
        Refusal::CheckpointSameBoot,
        Refusal::CheckpointIncompatible,
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::CheckpointMissing => "CheckpointMissing",
            Refusal::CheckpointDamaged => "CheckpointDamaged",
            Refusal::CheckpointKey => "CheckpointKey",
            Refusal::CheckpointForeign => "CheckpointForeign",
            Refusal::CheckpointStale => "CheckpointStale",
            Refusal::CheckpointSameBoot => "CheckpointSameBoot",
            Refusal::CheckpointIncompatible => "CheckpointIncompatible",
        }
    }

    /// Finds the refusal in the end of a VMM's log: the last line that begins with a refusal's name and a
    /// colon, with its message.
    pub fn find(log: &str) -> Option<(Refusal, &str)> {
        log.lines().rev().find_map(|line| {
            let (name, message) = line.split_once(':')?;
            Some((name.parse().ok()?, message.trim()))
        })
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Refusal {
    type Err = ();

    fn from_str(name: &str) -> Result<Refusal, ()> {
        Refusal::ALL
            .into_iter()
            .find(|refusal| refusal.as_str() == name)
            .ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_in_the_end_of_a_log() {
        let log = "2026 INFO starting\nCheckpointStale: disk root was written: session 4, saved at 3\n";
        let (refusal, message) = Refusal::find(log).unwrap();
        assert_eq!(refusal, Refusal::CheckpointStale);
        assert_eq!(message, "disk root was written: session 4, saved at 3");
        assert_eq!(Refusal::find("INFO all is well: really"), None);
        for refusal in Refusal::ALL {
            assert_eq!(refusal.to_string().parse(), Ok(refusal));
        }
    }
}
