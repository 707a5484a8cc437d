//! `NodeUpdate`: one reboot of one host, over which the sessions of its guests go on.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::host_update::{Drain, HostExpect, Reboot, Sessions, Update};
use crate::never_observed;
use crate::node_phase::NodeUpdatePhase;

/// Name of the credential provider that is the operator.
pub const OPERATOR_PROVIDER: &str = "operator";

/// One reboot of one host.
///
/// Made for a HostUpdate, or by the node agent when the host itself goes down; never by hand. Nothing in
/// its spec can be changed.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "understudy.dev",
    version = "v1alpha1",
    kind = "NodeUpdate",
    plural = "nodeupdates",
    shortname = "nu",
    category = "understudy",
    status = "NodeUpdateStatus",
    derive = "PartialEq",
    doc = "One reboot of one host, over which the sessions of its guests go on. Made for a HostUpdate, or when the host itself goes down.",
    selectable = ".spec.nodeName",
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.nodeName"}"#,
    printcolumn = r#"{"name":"Origin","type":"string","jsonPath":".spec.origin","description":"Who began it"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase","description":"How far it is"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.reason","description":"Why it is in this phase, in one word"}"#,
    printcolumn = r#"{"name":"Sessions","type":"integer","jsonPath":".status.result.sessions","description":"Sessions of guests"}"#,
    printcolumn = r#"{"name":"Resumed","type":"integer","jsonPath":".status.result.resumed","description":"How many of them go on after the reboot"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".status.result.after.kernelRelease","priority":1}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.message","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct NodeUpdateSpec {
    /// The node.
    pub node_name: String,
    /// Who began it.
    pub origin: Origin,
    /// For which HostUpdate, where it is one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_update: Option<HostUpdateReference>,
    /// Why, for people; where the host began it, in its words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What becomes of ordinary Pods before, as the HostUpdate had it. Where the host began it nobody is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// What is done on the host before, as the HostUpdate had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Update>,
    /// What holds afterwards, as the HostUpdate had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<HostExpect>,
    /// How the host is rebooted. Where the host began it, only its `timeout` counts.
    #[serde(default)]
    pub reboot: Reboot,
    /// How sessions are saved.
    #[serde(default)]
    pub sessions: Sessions,
}

/// Who began it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Origin {
    /// A HostUpdate.
    HostUpdate,
    /// The host: somebody typed `reboot`, or its own updates did.
    Host,
}

impl Origin {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::HostUpdate => "HostUpdate",
            Origin::Host => "Host",
        }
    }
}

/// A generation of a HostUpdate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostUpdateReference {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Generation of its spec.
    pub generation: i64,
}

/// How far it is, and what it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeUpdateStatus {
    /// Generation of the spec that this status was written for; -1: none yet.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// UID of the Node, in a cluster; a node of the same name with another UID is another node.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,
    /// The credential that the operator keeps, where `sessions.credentialProvider` is `operator`. Written by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Credential>,
    /// The node agent asks for the credential: for the boot after the reboot, and in a later one where the host
    /// went down again before every session had gone on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential_request: Option<CredentialRequest>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<NodeUpdatePhase>,
    /// Why it is in this phase, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When each phase began, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phase_transitions: Vec<NodeUpdateTransition>,
    /// Progress within the phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<NodeUpdateProgress>,
    /// What was found, done and measured; grows as the update proceeds.
    #[serde(default, rename = "result", skip_serializing_if = "Option::is_none")]
    pub result: Option<NodeUpdateResult>,
    /// `Ready`, `Reconciling` and `Stalled` (as kstatus reads them), `Complete` and `Failed` (as Jobs have); in a
    /// cluster `AgentAvailable`, and for a HostUpdate's `Cordoned`, `Drained` and `Uncordoned`; `CredentialKept`
    /// where the operator keeps the credential.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Default for NodeUpdateStatus {
    fn default() -> NodeUpdateStatus {
        NodeUpdateStatus {
            observed_generation: never_observed(),
            node_uid: None,
            credential: None,
            credential_request: None,
            phase: None,
            reason: None,
            message: None,
            phase_transitions: Vec::new(),
            progress: None,
            result: None,
            conditions: Vec::new(),
        }
    }
}

/// The credential that the operator keeps for one NodeUpdate: the private half of a key pair, in a Secret. Nothing of
/// it that is written here can be read without a key that never leaves the operator, or the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Credential {
    /// The public half (X25519, in Base64): the node agent seals the keys of sessions to it, before any guest is
    /// paused.
    #[schemars(length(max = 64))]
    pub public_key: String,
    /// To which boot of the host it was released last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<CredentialRelease>,
    /// Which request was refused, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<CredentialRefusal>,
}

/// A release of the credential. To each boot of the host it is released once, to one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialRelease {
    /// The boot that asked.
    #[serde(rename = "bootID")]
    #[schemars(length(max = 64))]
    pub boot_id: String,
    /// The public key that asked.
    #[schemars(length(max = 64))]
    pub public_key: String,
    /// The credential, sealed to that key (HPKE, in Base64), and bound to this NodeUpdate, the Node, the machine and
    /// the boot.
    #[schemars(length(max = 512))]
    pub sealed_credential: String,
    /// How many boots it was released to so far. More than one: the host went down again before every session had
    /// gone on.
    pub count: i32,
}

/// A request that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialRefusal {
    /// The boot that asked.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// The public key that asked.
    pub public_key: String,
    /// Why, for people.
    pub message: String,
}

/// The node agent asks for the credential.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialRequest {
    /// The host's boot, which is another one than that in which sessions were saved.
    #[serde(rename = "bootID")]
    #[schemars(length(max = 64))]
    pub boot_id: String,
    /// Public half (X25519, in Base64) of a key pair that was made for this request, and that ends with the boot.
    #[schemars(length(max = 64))]
    pub public_key: String,
}

/// A phase and when it began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeUpdateTransition {
    /// The phase.
    pub phase: NodeUpdatePhase,
    /// When it began.
    pub transition_time: Time,
}

/// Progress within a phase.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeUpdateProgress {
    /// What is being done, for people.
    pub message: String,
    /// How much of the phase is done, where that can be told: 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Bytes of memory written so far, of all guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written_bytes: Option<i64>,
    /// Bytes of memory that are known to be left, of all guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_bytes: Option<i64>,
}

/// What was found, done and measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeUpdateResult {
    /// The host before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<HostBoot>,
    /// The host after its reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<HostBoot>,
    /// End of the output of `update.command`, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_output: Option<String>,
    /// How many sessions there were to save.
    #[serde(default)]
    pub sessions: i64,
    /// How many of them go on after the reboot.
    #[serde(default)]
    pub resumed: i64,
    /// Each guest's session.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<GuestSession>,
}

/// One life of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostBoot {
    /// The kernel's boot ID.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// Kernel release (`uname -r`).
    pub kernel_release: String,
}

/// What became of one guest's session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestSession {
    /// Namespace of the Guest.
    pub namespace: String,
    /// Name of the Guest.
    pub name: String,
    /// How far it is.
    pub state: SessionState,
    /// Why, in one word, where something went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The checkpoint's UUID.
    pub checkpoint: String,
    /// Memory of the guest, in bytes.
    #[serde(default)]
    pub memory_bytes: i64,
    /// Bytes of memory written, all rounds together.
    #[serde(default)]
    pub written_bytes: i64,
    /// Bytes of the checkpoint on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_bytes: Option<i64>,
    /// Rounds of pre-copying while the guest ran.
    #[serde(default)]
    pub rounds: i64,
    /// How long the guest did not run, once it was resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interruption: Option<Interruption>,
}

impl NodeUpdate {
    /// Whether the operator keeps the credential of its sessions.
    pub fn is_kept_by_operator(&self) -> bool {
        self.spec.sessions.credential_provider.as_deref() == Some(OPERATOR_PROVIDER)
    }
}

impl NodeUpdateStatus {
    /// Whether a session may still need its key: what was saved, and neither goes on nor was given up.
    pub fn needs_keys(&self) -> bool {
        let is_over = self.phase.is_some_and(NodeUpdatePhase::is_terminal);
        let sessions = self.result.iter().flat_map(|result| &result.guests);
        !is_over || sessions.into_iter().any(|session| session.state.needs_key())
    }
}

impl SessionState {
    /// Whether it may still be resumed from its checkpoint, or come to be saved, for which its key is needed.
    pub fn needs_key(self) -> bool {
        !matches!(
            self,
            SessionState::RunsOn | SessionState::Resumed | SessionState::Lost
        )
    }
}

/// How far a guest's session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SessionState {
    /// Not begun; the guest runs.
    Waiting,
    /// Its memory is written; the guest runs, but for the last short pause.
    Saving,
    /// It is saved; the guest is paused.
    Saved,
    /// It was not saved, or that was taken back; the guest runs on.
    RunsOn,
    /// It is being resumed.
    Resuming,
    /// It goes on.
    Resumed,
    /// It could not be resumed; `reason` tells why. Its files are untouched, and the guest is not started
    /// anew. The node agent tries again when it is started.
    Kept,
    /// It ended with the host: there was no time to save it, or nothing was saved. The guest boots anew.
    Lost,
}

/// How long a guest did not run, in milliseconds, and on what the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Interruption {
    /// From its last instruction before the reboot to its first after it.
    pub total_milliseconds: i64,
    /// From its last instruction until its session was durable.
    pub pause_milliseconds: i64,
    /// From then until the host's new kernel started: other guests' saves, the host's shutdown, firmware
    /// and boot loader.
    pub shutdown_milliseconds: i64,
    /// From the start of the new kernel to that of the node agent.
    pub host_boot_milliseconds: i64,
    /// From the start of the node agent until this session's turn came: keys, sessions of higher priority.
    pub agent_start_milliseconds: i64,
    /// From then to its first instruction.
    pub resume_milliseconds: i64,
}
