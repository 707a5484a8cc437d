//! `Guest`: a virtual machine that we own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{SeamlessReboot, SeamlessRebootSpec, never_observed};

/// A virtual machine.
///
/// Its disks are files on the node. What the guest runs on at any moment is one *incarnation* of it; a
/// SeamlessReboot moves its use over to the next one.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "understudy.dev",
    version = "v1alpha1",
    kind = "Guest",
    plural = "guests",
    shortname = "gst",
    category = "understudy",
    namespaced,
    status = "GuestStatus",
    derive = "PartialEq",
    selectable = ".status.nodeName",
    doc = "A virtual machine whose disks are files on a node. It is rebooted without interruption by a SeamlessReboot.",
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase","description":"What the guest does now"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status","description":"Whether the guest runs as declared"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".status.kernelRelease","description":"Kernel release that the guest runs"}"#,
    printcolumn = r#"{"name":"Reboot","type":"string","jsonPath":".status.conditions[?(@.type==\"RebootRequired\")].status","description":"Whether the guest says that it waits for a reboot"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.nodeName","priority":1}"#,
    printcolumn = r#"{"name":"Incarnation","type":"integer","jsonPath":".status.incarnation","priority":1}"#,
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.addresses","priority":1}"#,
    printcolumn = r#"{"name":"Boot-ID","type":"string","jsonPath":".status.bootID","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct GuestSpec {
    /// Node whose agent runs the guest. Required in a cluster; without one the agent that reads the
    /// manifest runs it. Cannot be changed: the disks are on that node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Number of virtual CPUs, 1 to 64; at most those of the node. A change takes effect when the guest
    /// next boots.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub cpus: i32,
    /// Memory of the guest, such as `512Mi` or `2Gi`: whole mebibytes, 64Mi to 1Ti. A change takes effect
    /// when the guest next boots. A reboot needs the same amount once more on the node while the clone
    /// boots.
    pub memory: String,
    /// Where the kernel comes from: the guest's own disk (the default), or files on the node. A change
    /// takes effect when the guest next boots.
    #[serde(default)]
    pub boot: Boot,
    /// Disks, in the order in which the guest sees them (`/dev/vda` is the first). Exactly one has the
    /// role `Root`. Cannot be changed.
    #[schemars(length(min = 1, max = 8))]
    pub disks: Vec<Disk>,
    /// Network interfaces, in the order in which the guest sees them. Cannot be changed.
    #[serde(default)]
    #[schemars(length(max = 4))]
    pub networks: Vec<Network>,
    /// Whether the guest shall run: `Always` (it is started, and started again when it stops by itself),
    /// or `Halted` (it is powered off by its power button).
    #[serde(default)]
    pub run_strategy: RunStrategy,
    /// What happens when the guest itself asks for a reboot (`understudy-guest request-reboot` inside
    /// it): `Seamless` makes a SeamlessReboot in its name, `Deny` tells it no.
    #[serde(default)]
    pub on_guest_request: OnGuestRequest,
    /// What becomes of the disks when the Guest is deleted: `Retain` keeps them, `Delete` removes the
    /// source files of its writable disks and all their layers.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// Order in which sessions are resumed after a reboot of the host: higher ones first, from -1000 to
    /// 1000; the name decides among equals.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
}

fn one() -> i32 {
    1
}

/// Where the kernel comes from: either `fromDisk`, or `kernel` with `initrd` and `cmdline`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Boot {
    /// The newest kernel with its initrd, and the command line, are found on the guest's own root disk as
    /// Debian's GRUB would, so that a kernel update inside the guest is what its next boot runs. The root
    /// file system is ext4, on a partition or on the whole disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_disk: Option<FromDisk>,
    /// Kernel image (bzImage) on the node: a name beneath the node's directory for the namespace, or an
    /// absolute path where the node's configuration allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Initial RAM disk for `kernel`; named in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line for `kernel`, such as `root=/dev/vda1 ro console=ttyS0`; at most 2047 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// Boots as the guest's own disk says. It has no fields yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FromDisk {}

impl Default for Boot {
    fn default() -> Boot {
        Boot {
            from_disk: Some(FromDisk {}),
            kernel: None,
            initrd: None,
            cmdline: None,
        }
    }
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Name of the disk within the guest; its first 20 bytes are the disk's serial number
    /// (`/dev/disk/by-id/virtio-NAME`).
    pub name: String,
    /// `Root`: the guest boots from it, and a reboot splits it. `Data`: anything else.
    pub role: DiskRole,
    /// Raw image on the node: a name beneath the node's directory for the namespace, or an absolute path
    /// where the node's configuration allows it. State is kept beside it in `SOURCE.understudy/`.
    pub source: String,
    /// Refuses writes by the guest. A guest whose `Data` disks are writable cannot be rebooted
    /// seamlessly yet.
    #[serde(default)]
    pub read_only: bool,
}

/// What a disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DiskRole {
    /// Holds the root file system.
    Root,
    /// Anything else.
    Data,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Bridge on the node to which the interface's tap is attached; must exist and be allowed by the
    /// node's configuration.
    pub bridge: String,
    /// MAC address, `52:54:00:12:34:56`: unicast, the same in every incarnation. Absent: derived from the
    /// Guest's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Whether the guest shall run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunStrategy {
    /// Started, and started again when it stops by itself.
    #[default]
    Always,
    /// Powered off.
    Halted,
}

/// What happens when the guest itself asks for a reboot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnGuestRequest {
    /// A SeamlessReboot is made in its name.
    #[default]
    Seamless,
    /// The guest is told no.
    Deny,
}

/// What becomes of the disks when the Guest is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// Kept.
    #[default]
    Retain,
    /// Writable disks and their layers are removed.
    Delete,
}

/// What the node agent saw last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestStatus {
    /// Generation of the spec that this status was written for; -1: none yet.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// What the guest does now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<GuestPhase>,
    /// Node whose agent runs the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// UID of that Node, in a cluster; a node of the same name with another UID is another node.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,
    /// Which life of the guest this is: grows by one at every cutover and cold boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<i64>,
    /// The kernel's boot ID in the guest (`/proc/sys/kernel/random/boot_id`).
    #[serde(default, rename = "bootID", skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Kernel release that the guest runs (`uname -r`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// The agent inside the guest; absent until it has spoken since the last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_agent: Option<GuestAgent>,
    /// IP addresses of the guest's interfaces, without prefix length.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// The incarnation before this one, paused and kept after a cutover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dormant: Option<Dormant>,
    /// Its session, from when it is saved until it goes on; where it could not be resumed, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SavedSession>,
    /// The guest's last request to be rebooted, and what became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reboot_request: Option<RebootRequest>,
    /// `Ready`, `Reconciling` and `Stalled` (as kstatus reads them), `AgentConnected`, `RebootRequired`; in a cluster
    /// `Accepted`, `AgentAvailable`, and `Released` once nothing of a deleted guest is left on its node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Default for GuestStatus {
    fn default() -> GuestStatus {
        GuestStatus {
            observed_generation: never_observed(),
            phase: None,
            node_name: None,
            node_uid: None,
            incarnation: None,
            boot_id: None,
            kernel_release: None,
            guest_agent: None,
            addresses: Vec::new(),
            dormant: None,
            session: None,
            reboot_request: None,
            conditions: Vec::new(),
        }
    }
}

/// What a guest does now. Unlike the phases of a SeamlessReboot these follow what is seen, in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum GuestPhase {
    /// Seen, and not started yet; the `Ready` condition tells what it waits for.
    Pending,
    /// Its VMM runs, and the guest agent has not told of a complete boot.
    Booting,
    /// The guest runs.
    Running,
    /// Its power button was pressed.
    Stopping,
    /// Its session is being saved; it runs, but for the last short pause.
    Saving,
    /// Its session is saved, and it does not run: the host is about to reboot. Or it could not be resumed:
    /// the `Ready` condition tells why, its files are untouched, and it is not started anew.
    Saved,
    /// It is being resumed from its session.
    Resuming,
    /// It does not run, as `runStrategy` asks.
    Halted,
    /// It does not run although it shall; the `Ready` condition tells why.
    Failed,
}

/// The agent inside the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestAgent {
    /// Version of the guest agent's package.
    pub version: String,
    /// `systemctl is-system-running`: running, degraded, maintenance, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_state: Option<String>,
    /// Units that have failed; the first 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_units: Vec<String>,
}

/// The incarnation before this one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dormant {
    /// Its number.
    pub incarnation: i64,
    /// When it is removed.
    pub deadline: Time,
}

/// A guest's saved session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SavedSession {
    /// The checkpoint's UUID.
    pub checkpoint: String,
    /// Name of the NodeUpdate for which it was saved.
    pub node_update: String,
    /// When it was durable.
    pub saved_at: Time,
    /// Bytes of the checkpoint on disk.
    #[serde(default)]
    pub saved_bytes: i64,
}

/// A guest's own request to be rebooted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebootRequest {
    /// Made by the guest.
    pub id: String,
    /// In the words of whoever asked inside the guest.
    pub reason: String,
    /// When the agent heard of it.
    pub requested_at: Time,
    /// Name of the SeamlessReboot that was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seamless_reboot: Option<String>,
    /// Why none was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denied: Option<String>,
}

/// Name of the SeamlessReboot that is made for a guest's own request, in a cluster: the same whoever computes it.
pub fn asked_reboot_name(guest: &str, id: &str) -> String {
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    // With `-asked-` and the id at most 63 characters, as a rule of SeamlessReboots says.
    let guest: String = guest.chars().take(48).collect();
    let guest = guest.trim_end_matches(['-', '.']);
    format!("{guest}-asked-{}", id.to_ascii_lowercase())
        .trim_end_matches('-')
        .to_owned()
}

/// The SeamlessReboot for a guest's own request: everything as it is by default.
pub fn asked_reboot(guest: &str, name: &str, reason: &str) -> SeamlessReboot {
    // As much as a reason may have, with what stands before it.
    const MOST: usize = 900;
    let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
    let mut end = reason.len().min(MOST);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let spec = SeamlessRebootSpec {
        guest_name: guest.to_owned(),
        reason: (!reason.is_empty()).then(|| format!("asked for by the guest: {}", &reason[..end])),
        expect: None,
        services: Default::default(),
        capture: Default::default(),
        cutover: Default::default(),
        timeouts: Default::default(),
        retain_dormant_for: "10m".to_owned(),
        ttl_seconds_after_finished: None,
        action: None,
    };
    SeamlessReboot::new(name, spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_reboot_that_a_guest_asks_for_is_valid_whatever_the_guest_says() {
        assert_eq!(
            asked_reboot_name("web", "0a1b2c3d-4e5f-6789"),
            "web-asked-0a1b2c3d"
        );
        assert_eq!(asked_reboot_name("web", "../A\n ü!b"), "web-asked-ab");
        assert_eq!(asked_reboot_name("web", "…"), "web-asked");
        let long = asked_reboot_name(&format!("{}.{}", "a".repeat(47), "b".repeat(15)), "0a1b2c3d");
        assert_eq!(long, format!("{}-asked-0a1b2c3d", "a".repeat(47)));
        assert!(long.len() <= 63);
    }

    #[test]
    fn the_reason_fits_its_bounds() {
        let reboot = asked_reboot("web", "web-1", &"ü\n".repeat(1000));
        let reason = reboot.spec.reason.unwrap();
        assert!(reason.len() <= 1024 && !reason.contains('\n'), "{reason}");
        assert_eq!(asked_reboot("web", "web-1", "").spec.reason, None);
    }
}
