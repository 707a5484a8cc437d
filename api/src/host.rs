//! `Host`: what a node agent tells of its node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::never_observed;

/// A node, named as it. Made and written by its node agent.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "understudy.dev",
    version = "v1alpha1",
    kind = "Host",
    plural = "hosts",
    category = "understudy",
    status = "HostStatus",
    derive = "PartialEq",
    doc = "What the node agent tells of its node: boot, capabilities, credential providers, and whether a reboot that the host begins would wait long enough.",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".status.kernelRelease"}"#,
    printcolumn = r#"{"name":"Sessions-Safe","type":"string","jsonPath":".status.conditions[?(@.type==\"SessionsSafe\")].status","description":"Whether a reboot that the host begins would wait until all sessions are saved"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Agent","type":"string","jsonPath":".status.agentVersion","priority":1}"#,
    printcolumn = r#"{"name":"Boot-ID","type":"string","jsonPath":".status.bootID","priority":1}"#
)]
pub struct HostSpec {}

/// What the node agent saw last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostStatus {
    /// Generation of the spec that this status was written for; -1: none yet.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// UID of the Node, in a cluster.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,
    /// `/etc/machine-id`: checkpoints are bound to it.
    #[serde(default, rename = "machineID", skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// The kernel's boot ID.
    #[serde(default, rename = "bootID", skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// When the kernel was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted_at: Option<Time>,
    /// Kernel release (`uname -r`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// Version of the node agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// Version of the VMM that new guests get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_version: Option<String>,
    /// What KVM offers here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<KvmCapabilities>,
    /// Memory that new guests can have, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory_bytes: Option<i64>,
    /// Free space where sessions are saved, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_disk_bytes: Option<i64>,
    /// The credential providers that the node's configuration registers, the default first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub credential_providers: Vec<CredentialProvider>,
    /// Whether a reboot that the host begins waits for sessions to be saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inhibitor: Option<Inhibitor>,
    /// The host's last request to be rebooted or powered off, and what was made of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reboot_request: Option<HostRebootRequest>,
    /// When the agent wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<Time>,
    /// `Ready`, `Reconciling` and `Stalled` (as kstatus reads them), `SessionsSafe`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Default for HostStatus {
    fn default() -> HostStatus {
        HostStatus {
            observed_generation: never_observed(),
            node_uid: None,
            machine_id: None,
            boot_id: None,
            booted_at: None,
            kernel_release: None,
            agent_version: None,
            vmm_version: None,
            kvm: None,
            free_memory_bytes: None,
            free_disk_bytes: None,
            credential_providers: Vec::new(),
            inhibitor: None,
            reboot_request: None,
            heartbeat: None,
            conditions: Vec::new(),
        }
    }
}

/// What KVM offers on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KvmCapabilities {
    /// Whether `/dev/kvm` can be used.
    pub available: bool,
    /// The processor, as `/proc/cpuinfo` names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// Processors of the node.
    #[serde(default)]
    pub cpus: i64,
}

/// A credential provider of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialProvider {
    /// Its name, for `spec.sessions.credentialProvider`.
    pub name: String,
    /// Whether it can keep keys over a reboot now.
    pub ready: bool,
    /// Why not, and what would do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Whether a reboot that the host begins waits for sessions to be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Inhibitor {
    /// Whether logind's delay inhibitor is held.
    pub held: bool,
    /// How long logind waits for it, in milliseconds: the effective `InhibitDelayMaxSec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_milliseconds: Option<i64>,
    /// How long the service's own stop job may take behind it, in milliseconds (`TimeoutStopSec`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_milliseconds: Option<i64>,
    /// How long saving the sessions that there are is expected to take, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_milliseconds: Option<i64>,
}

/// The host's request to be rebooted or powered off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostRebootRequest {
    /// In the host's words, such as `reboot` or `poweroff`.
    pub reason: String,
    /// When the agent heard of it.
    pub requested_at: Time,
    /// Name of the NodeUpdate that was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_update: Option<String>,
}
