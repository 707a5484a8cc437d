//! The manifest: what the checkpoint is, and where its sealed parts begin.
//!
//! The file is one JSON object whose first members stand at fixed places, so that each covers all that
//! follows it, byte by byte:
//!
//! ```text
//! {"sha256":"<64 digits>","mac":"<64 digits>","format":1,"salt":"<64>","keyCheck":"<32>","manifest":{…}}
//! ```
//!
//! `sha256` needs no key and tells damage from a wrong key; `mac` is HMAC-SHA256 and tells a manifest that
//! was written by who holds the key.

use std::fmt::Write;
use std::path::Path;

use ring::digest;
use serde::{Deserialize, Serialize};
use understudy_vmm_control::session::Refusal;
use uuid::Uuid;

use crate::refused::RefusedCheckpoint;
use crate::seal::{CHECK, KEY, Key, Sealer};
use crate::{CHUNK, MAX_MEMORY, MAX_STATE};

/// Version of the format of all files of a checkpoint.
pub const FORMAT: u32 = 2;

/// Longest manifest that is read, in bytes.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;

/// Whose checkpoint it is. A [`crate::Writer`] binds it into the checkpoint; a [`crate::Reader`] refuses what
/// does not belong to the same checkpoint, guest and machine, and what was saved in the same boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The checkpoint.
    pub checkpoint: Uuid,
    /// UID of the Guest.
    pub guest_uid: String,
    /// Machine ID of the host.
    pub machine_id: String,
    /// Boot ID of the host, now: that of the saving boot when it saves, another one when it resumes.
    pub host_boot_id: String,
}

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RamRange {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Offset of its first byte in the checkpoint's memory.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A disk of the guest as the session left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedDisk {
    /// Its name.
    pub name: String,
    /// Its layers, the topmost first; empty: the source file itself.
    pub layers: Vec<Uuid>,
    /// Its write session: a disk that stands at a later one was written since.
    pub write_session: u64,
}

/// What the VMM says about the session in [`crate::Writer::finish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name of the guest.
    pub guest_name: String,
    /// Its incarnation.
    pub incarnation: u64,
    /// Epoch of its owner record.
    pub owner_epoch: u64,
    /// Version of the VMM that saves.
    pub vmm_version: String,
    /// When it was saved: milliseconds since 1970.
    pub saved_at_ms: u64,
    /// vCPUs.
    pub cpus: u32,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// Where guest RAM is; the ranges' offsets follow one another and cover all of it.
    pub ram: Vec<RamRange>,
    /// Its disks.
    pub disks: Vec<SavedDisk>,
    /// What a host must have to resume it, in the VMM's own words: CPUID, MSRs, KVM's capabilities. Less than
    /// 1 MiB as JSON.
    pub compatibility: serde_json::Value,
}

/// A sealed part of the checkpoint: frames of 64 KiB, each followed by its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sealed {
    /// Length in bytes, without tags.
    pub length: u64,
    /// Counter of the first frame; the others follow.
    pub first_counter: u64,
}

/// The manifest of a checkpoint. See [`Description`] and [`Identity`] for the fields that the VMM gives.
///
/// Readers ignore members that they do not know: one that must not be ignored raises [`FORMAT`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)] // Documented where they come from.
pub struct Manifest {
    pub checkpoint: Uuid,
    pub guest_uid: String,
    pub guest_name: String,
    pub incarnation: u64,
    pub owner_epoch: u64,
    pub machine_id: String,
    /// Boot ID of the host that saved.
    pub host_boot_id: String,
    pub vmm_version: String,
    pub saved_at_ms: u64,
    pub cpus: u32,
    pub memory_mib: u64,
    pub ram: Vec<RamRange>,
    pub disks: Vec<SavedDisk>,
    /// Size of a chunk in bytes: [`CHUNK`].
    pub chunk_bytes: u64,
    /// Chunks of memory.
    pub chunks: u64,
    /// Rounds in which memory was written, the final one included.
    pub rounds: u32,
    pub index: Sealed,
    /// What was set in the index after it was written.
    pub changes: Sealed,
    pub state: Sealed,
    pub compatibility: serde_json::Value,
}

/// What follows the two authentication codes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tail {
    format: u32,
    salt: String,
    key_check: String,
    manifest: Manifest,
}

/// The part of [`Tail`] that all formats have.
#[derive(Deserialize)]
struct Probe {
    format: u32,
}

const DIGEST_KEY: &str = "\"sha256\":\"";
const MAC_KEY: &str = "\"mac\":\"";
const DIGITS: usize = 64;

impl Manifest {
    /// Whether its numbers fit one another; else what does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let bytes = self.memory_mib.saturating_mul(1 << 20);
        if bytes > MAX_MEMORY || bytes == 0 {
            return Err(format!(
                "{} MiB of memory, where 1 to {} are possible",
                self.memory_mib,
                MAX_MEMORY >> 20
            ));
        }
        if self.chunk_bytes != CHUNK as u64 || self.chunks != bytes / CHUNK as u64 {
            return Err(format!(
                "{} chunks of {} bytes for {} MiB of memory",
                self.chunks, self.chunk_bytes, self.memory_mib
            ));
        }
        let mut end = 0;
        for range in &self.ram {
            if range.offset != end {
                return Err(format!("RAM ranges with a gap at offset {end}"));
            }
            end = range
                .offset
                .checked_add(range.length)
                .ok_or("a RAM range without end")?;
        }
        if end != bytes {
            return Err(format!(
                "RAM ranges of {end} bytes for {} MiB of memory",
                self.memory_mib
            ));
        }
        if self.index.length != self.chunks * crate::index::ENTRY as u64 {
            return Err(format!(
                "an index of {} bytes for {} chunks",
                self.index.length, self.chunks
            ));
        }
        let change = crate::index::CHANGE as u64;
        if !self.changes.length.is_multiple_of(change) || self.changes.length > self.chunks * change {
            return Err(format!(
                "{} bytes of changes of the index for {} chunks",
                self.changes.length, self.chunks
            ));
        }
        if self.state.length > MAX_STATE {
            return Err(format!(
                "a state of {} bytes, where {MAX_STATE} are possible",
                self.state.length
            ));
        }
        Ok(())
    }

    /// The file's content.
    pub(crate) fn encode(self, sealer: &Sealer, salt: &[u8; KEY]) -> Result<Vec<u8>, serde_json::Error> {
        let tail = Tail {
            format: FORMAT,
            salt: hex(salt),
            key_check: hex(sealer.check()),
            manifest: self,
        };
        let tail = serde_json::to_string_pretty(&tail)?;
        // Without the brace that opens it, with a newline at the end.
        let tail = format!("{}\n", tail.strip_prefix('{').unwrap_or(&tail));
        let signed = format!("{MAC_KEY}{}\",{tail}", hex(&sealer.sign(tail.as_bytes())));
        let text = format!("{{{DIGEST_KEY}{}\",{signed}", sha256(signed.as_bytes()));
        Ok(text.into_bytes())
    }

    /// Verifies the content of the file at `path` and that it is what `expected` names.
    pub(crate) fn decode(
        text: &[u8],
        path: &Path,
        key: &Key,
        expected: &Identity,
    ) -> Result<(Manifest, Sealer), RefusedCheckpoint> {
        let path = path.display();
        let refuse = |refusal, message: String| RefusedCheckpoint::new(refusal, message);
        let damaged = |what: &str| {
            refuse(
                Refusal::CheckpointDamaged,
                format!("{path} is not what was written: {what}; the checkpoint cannot be used"),
            )
        };

        let rest = text
            .strip_prefix(b"{")
            .ok_or_else(|| damaged("it does not begin as a manifest"))?;
        let (digest, signed) = code(rest, DIGEST_KEY).ok_or_else(|| damaged("it has no checksum"))?;
        if digest != sha256(signed).as_bytes() {
            return Err(damaged("its checksum is wrong"));
        }
        let (mac, tail) = code(signed, MAC_KEY).ok_or_else(|| damaged("it is not signed"))?;
        let object = [b"{", tail].concat();
        let probe: Probe =
            serde_json::from_slice(&object).map_err(|_| damaged("it has no format version"))?;
        if probe.format != FORMAT {
            return Err(refuse(
                Refusal::CheckpointIncompatible,
                format!(
                    "{path} has format version {}, this VMM knows {FORMAT}; resume it with a VMM of the \
                     version that saved it",
                    probe.format
                ),
            ));
        }
        let Tail {
            salt,
            key_check,
            manifest,
            ..
        } = serde_json::from_slice(&object).map_err(|e| damaged(&e.to_string()))?;

        // Claims that nobody vouches for yet; they can only lead to a refusal here.
        for (what, found, wanted) in [
            (
                "checkpoint",
                &manifest.checkpoint.to_string(),
                &expected.checkpoint.to_string(),
            ),
            ("guest", &manifest.guest_uid, &expected.guest_uid),
            ("machine", &manifest.machine_id, &expected.machine_id),
        ] {
            if found != wanted {
                return Err(refuse(
                    Refusal::CheckpointForeign,
                    format!("{path} belongs to {what} {found:?}, asked for was {wanted:?}"),
                ));
            }
        }

        let salt: [u8; KEY] = unhex(salt.as_bytes()).ok_or_else(|| damaged("its salt is malformed"))?;
        let key_check: [u8; CHECK] =
            unhex(key_check.as_bytes()).ok_or_else(|| damaged("its key check is malformed"))?;
        let sealer = Sealer::derive(key, &salt, manifest.checkpoint, &manifest.guest_uid)
            .map_err(|_| damaged("no keys can be derived from it"))?;
        if key_check != *sealer.check() {
            return Err(refuse(
                Refusal::CheckpointKey,
                format!("{path} was sealed with another key than the one given"),
            ));
        }
        let mac: [u8; 32] = unhex(mac).ok_or_else(|| damaged("its signature is malformed"))?;
        if !sealer.is_signed(tail, &mac) {
            return Err(damaged("its signature is wrong"));
        }
        manifest.check().map_err(|what| damaged(&what))?;
        if manifest.host_boot_id == expected.host_boot_id {
            return Err(refuse(
                Refusal::CheckpointSameBoot,
                format!(
                    "{path} was saved in this boot of the host ({}); it can be resumed after a reboot",
                    manifest.host_boot_id
                ),
            ));
        }
        Ok((manifest, sealer))
    }
}

/// Takes a member with a code of 64 digits from the front.
fn code<'a>(text: &'a [u8], key: &str) -> Option<(&'a [u8], &'a [u8])> {
    let rest = text.strip_prefix(key.as_bytes())?;
    let (digits, rest) = rest.split_at_checked(DIGITS)?;
    Some((digits, rest.strip_prefix(b"\",")?))
}

fn sha256(text: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, text).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim;

    fn decode(text: &str) -> Result<Manifest, RefusedCheckpoint> {
        Manifest::decode(
            text.as_bytes(),
            Path::new("manifest.json"),
            &sim::key(),
            &sim::resuming_identity(),
        )
        .map(|(manifest, _)| manifest)
    }

    fn saved() -> String {
        let disk = sim::saved(&sim::memory(|_| 1), b"state");
        String::from_utf8(disk.content("manifest.json")).unwrap()
    }

    /// Makes the checksum right again.
    fn summed(text: &str) -> String {
        let start = 1 + DIGEST_KEY.len() + DIGITS + 2;
        format!(
            "{{{DIGEST_KEY}{}\",{}",
            sha256(&text.as_bytes()[start..]),
            &text[start..]
        )
    }

    #[test]
    fn the_manifest_is_json_that_any_tool_reads() {
        let value: serde_json::Value = serde_json::from_str(&saved()).unwrap();
        assert_eq!(value["format"], FORMAT);
        assert_eq!(value["manifest"]["guestName"], "default/web");
        assert_eq!(value["manifest"]["disks"][0]["writeSession"], 4);
    }

    #[test]
    fn a_newer_format_is_incompatible_and_not_damaged() {
        let format = |version| format!("\"format\": {version},");
        let newer = saved().replace(&format(FORMAT), &format(FORMAT + 1));
        assert_eq!(decode(&newer).unwrap_err().refusal, Refusal::CheckpointDamaged);
        let refused = decode(&summed(&newer)).unwrap_err();
        assert_eq!(refused.refusal, Refusal::CheckpointIncompatible);
        assert!(
            refused.message.contains(&format!("version {}", FORMAT + 1)),
            "{refused}"
        );
    }

    #[test]
    fn a_manifest_that_was_changed_by_who_has_no_key_is_damaged() {
        let changed = saved().replace("\"writeSession\": 4", "\"writeSession\": 5");
        let refused = decode(&summed(&changed)).unwrap_err();
        assert_eq!(refused.refusal, Refusal::CheckpointDamaged);
        assert!(refused.message.contains("signature"), "{refused}");
        // The checksum is made right by `summed`: an unchanged manifest passes.
        decode(&summed(&saved())).unwrap();
    }

    #[test]
    fn numbers_that_do_not_fit_one_another_are_refused() {
        let good = decode(&saved()).unwrap();
        assert_eq!(good.check(), Ok(()));
        let change = |change: fn(&mut Manifest)| {
            let mut manifest = good.clone();
            change(&mut manifest);
            manifest.check()
        };
        assert!(change(|m| m.chunks += 1).is_err());
        assert!(change(|m| m.chunk_bytes = 4096).is_err());
        assert!(change(|m| m.memory_mib = 0).is_err());
        assert!(change(|m| m.memory_mib = u64::MAX).is_err());
        assert!(change(|m| m.ram[0].offset = 4096).is_err());
        assert!(change(|m| m.ram[0].length = u64::MAX).is_err());
        assert!(change(|m| m.ram.push(m.ram[0])).is_err());
        assert!(change(|m| m.index.length += 24).is_err());
        assert!(change(|m| m.changes.length = 24).is_err());
        assert!(change(|m| m.changes.length = (m.chunks + 1) * 32).is_err());
        assert!(change(|m| m.state.length = u64::MAX).is_err());
    }
}
