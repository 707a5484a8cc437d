//! `HostUpdate`: a desired state of nodes, reached by rebooting them while their guests' sessions go on.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::never_observed;
use crate::node_phase::NodeUpdatePhase;
use crate::window::Window;

/// A desired state of nodes.
///
/// Every selected node shall satisfy `expect`. One that does not is updated (`update.command`) and rebooted;
/// the sessions of its guests are saved before, and go on afterwards. Each pass over a node is a NodeUpdate.
/// Deleting a HostUpdate aborts passes whose host is not rebooting yet.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "understudy.dev",
    version = "v1alpha1",
    kind = "HostUpdate",
    plural = "hostupdates",
    shortname = "hu",
    category = "understudy",
    status = "HostUpdateStatus",
    derive = "PartialEq",
    doc = "A desired state of nodes: each one that does not satisfy it is updated and rebooted, and the sessions of its guests go on.",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status","description":"Whether every selected node is as declared"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.selected","description":"How many nodes are selected"}"#,
    printcolumn = r#"{"name":"Updated","type":"integer","jsonPath":".status.updated","description":"How many of them are as declared"}"#,
    printcolumn = r#"{"name":"Underway","type":"integer","jsonPath":".status.underway","description":"How many of them are under way"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","description":"Why, in one word"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".spec.expect.kernelRelease","description":"Kernel release that is expected"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct HostUpdateSpec {
    /// Which nodes. Empty: every node.
    #[serde(default)]
    pub node_selector: NodeSelector,
    /// How many of the selected nodes may be under way at a time: a number from 1, or a part of them such as `20%`
    /// (rounded down, at least one). A node is under way from when it is picked until its NodeUpdate has come to its end.
    #[serde(default = "one")]
    pub max_unavailable: IntOrString,
    /// How many nodes may fail before no further one is begun. A node has failed when its NodeUpdate has, or when it
    /// is not back within `returnTimeout`. A change of the HostUpdate is another try.
    #[serde(default)]
    #[schemars(range(min = 0, max = 10_000))]
    pub max_failures: i32,
    /// How long a host may be away, `1m` to `24h`, from when it was asked to reboot until its agent speaks again.
    /// After that it counts as failed, and stays cordoned until it is back.
    #[serde(default = "fifteen_minutes")]
    pub return_timeout: String,
    /// When passes may begin. Those that have begun go on. Absent: at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// What keeps a pass over a node from beginning while it is so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub blockers: Vec<Blocker>,
    /// What becomes of ordinary Pods before the host is rebooted. Without a cluster there are none.
    #[serde(default)]
    pub drain: Drain,
    /// What is done on the host before it is rebooted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Update>,
    /// What holds afterwards. Nodes where it holds already are left alone; where it does not hold after
    /// the reboot, the pass has failed. Absent: each node is updated once for each generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<HostExpect>,
    /// How the host is rebooted.
    #[serde(default)]
    pub reboot: Reboot,
    /// How sessions are saved.
    #[serde(default)]
    pub sessions: Sessions,
    /// How many finished NodeUpdates are kept of each node, the latest ones; older ones are deleted. What has
    /// become of the present generation is kept in any case.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub history_limit: i32,
    /// No new pass is begun while this is true; those that have begun go on.
    #[serde(default)]
    pub paused: bool,
    /// What is asked of passes that have begun. Not to be kept in Git: it is noted in the status once it was seen,
    /// and removing it changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<HostUpdateAction>,
}

impl Default for HostUpdateSpec {
    fn default() -> HostUpdateSpec {
        HostUpdateSpec {
            node_selector: NodeSelector::default(),
            max_unavailable: one(),
            max_failures: 0,
            return_timeout: fifteen_minutes(),
            window: None,
            blockers: Vec::new(),
            drain: Drain::default(),
            update: None,
            expect: None,
            reboot: Reboot::default(),
            sessions: Sessions::default(),
            history_limit: three(),
            paused: false,
            action: None,
        }
    }
}

impl HostUpdateSpec {
    /// How many of `selected` nodes may be under way at a time; at least one.
    pub fn may_be_unavailable(&self, selected: usize) -> usize {
        let number = match &self.max_unavailable {
            IntOrString::Int(number) => usize::try_from(*number).unwrap_or(0),
            IntOrString::String(text) => match text.strip_suffix('%') {
                Some(percent) => selected.saturating_mul(percent.parse().unwrap_or(0)) / 100,
                None => text.parse().unwrap_or(0),
            },
        };
        number.max(1)
    }
}

/// What keeps a pass over a node from beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Blocker {
    /// How it is called where it blocks.
    pub name: String,
    /// Pods that shall not be disturbed: while one of them runs on a node, no pass over it begins. Without a
    /// cluster there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<PodSelector>,
    /// Alerts that shall not be made worse: while one of them fires, no pass begins over any node. In a cluster
    /// only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alerts: Option<AlertSelector>,
}

/// Alerts of a Prometheus server, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AlertSelector {
    /// Where the server is, such as `http://prometheus.monitoring:9090`; the operator asks it for `/api/v1/alerts`.
    /// One that cannot be asked blocks, too.
    pub server: String,
    /// Names of alerts (their label `alertname`); one that ends in `*` stands for all that begin like it.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub names: Vec<String>,
}

impl AlertSelector {
    /// Whether an alert of this name is selected.
    pub fn selects(&self, alert: &str) -> bool {
        self.names.iter().any(|name| match name.strip_suffix('*') {
            Some(beginning) => alert.starts_with(beginning),
            None => alert == name,
        })
    }
}

/// Pods, by their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSelector {
    /// Namespace of the Pods. Absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels with their values: a Pod is selected when it has all of them.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16, "additionalProperties" = {"type": "string", "maxLength": 63}))]
    pub match_labels: BTreeMap<String, String>,
}

/// What becomes of ordinary Pods before the host is rebooted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// `Evict`: they are evicted, as disruption budgets allow. `None`: they stay until the host goes down.
    /// Pods of DaemonSets, static Pods and that of the leading operator stay in any case.
    #[serde(default)]
    pub mode: DrainMode,
    /// The longest that it may take, `1s` to `24h`. After that the pass has failed, and the node is uncordoned.
    #[serde(default = "one_hour")]
    pub timeout: String,
}

impl Default for Drain {
    fn default() -> Drain {
        Drain {
            mode: DrainMode::Evict,
            timeout: one_hour(),
        }
    }
}

/// What becomes of ordinary Pods before the host is rebooted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DrainMode {
    /// They are evicted.
    #[default]
    Evict,
    /// They stay.
    None,
}

fn one() -> IntOrString {
    IntOrString::Int(1)
}

fn three() -> i32 {
    3
}

fn fifteen_minutes() -> String {
    "15m".to_owned()
}

fn one_hour() -> String {
    "1h".to_owned()
}

/// Nodes, by their labels. A node agent without a cluster knows these of its node: `kubernetes.io/hostname`
/// (the node's name), `kubernetes.io/os` and `kubernetes.io/arch`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Labels with their values: a node is selected when it has all of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16, "additionalProperties" = {"type": "string", "maxLength": 63}))]
    pub match_labels: BTreeMap<String, String>,
}

impl NodeSelector {
    /// Whether a node with these labels is selected.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels
            .iter()
            .all(|(label, value)| labels.get(label) == Some(value))
    }
}

/// What is done on the host before it is rebooted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// Program with arguments, run on the host as root while guests run; no shell. It must be fit to be
    /// run again: where the node agent cannot tell whether it ran to its end, it is. It must not reboot
    /// the host. When it fails, the update does, and nothing was saved or rebooted.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// The longest that it may take, `1s` to `24h`.
    #[serde(default = "thirty_minutes")]
    pub timeout: String,
}

/// What holds on the host after the reboot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostExpect {
    /// Kernel release that runs (`uname -r`), such as `6.1.0-50-amd64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// The host was booted after this time (RFC 3339), such as `2026-11-22T18:00:00Z`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted_after: Option<Time>,
}

impl HostExpect {
    /// Whether a boot satisfies this; `Err` says what it misses. `booted_at` is in microseconds since 1970.
    pub fn satisfied_by(&self, kernel_release: &str, booted_at: i64) -> Result<(), String> {
        if let Some(expected) = &self.kernel_release
            && expected != kernel_release
        {
            return Err(format!(
                "the host runs kernel {kernel_release} where {expected} is expected"
            ));
        }
        if let Some(after) = &self.booted_after
            && booted_at <= after.0.as_microsecond()
        {
            return Err(format!("the host was not booted after {}", after.0));
        }
        Ok(())
    }
}

/// How the host is rebooted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reboot {
    /// `Systemd`: as `systemctl reboot` does. `Command`: by `command`.
    #[serde(default)]
    pub method: RebootMethod,
    /// Program with arguments that reboots the host, for the method `Command`; run as root, no shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub command: Option<Vec<String>>,
    /// How long the host may take to go down, `1s` to `50m`. After that the update has failed, and the
    /// guests, which were paused until then, run on.
    #[serde(default = "ten_minutes")]
    pub timeout: String,
}

impl Default for Reboot {
    fn default() -> Reboot {
        Reboot {
            method: RebootMethod::Systemd,
            command: None,
            timeout: ten_minutes(),
        }
    }
}

/// How the host is rebooted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RebootMethod {
    /// As `systemctl reboot` does.
    #[default]
    Systemd,
    /// By a command.
    Command,
}

/// How sessions are saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sessions {
    /// Where they are kept meanwhile: `Disk`, encrypted, with a fresh key for each.
    #[serde(default)]
    pub store: SessionStore,
    /// Credential provider that keeps the keys over the reboot: the name of one that the node has, such as
    /// `systemd-creds` or `key-file` (`Host` shows them), or `operator`: in a cluster the operator keeps in a
    /// Secret what opens them, so that nothing on the host does, and releases it to the node after its reboot.
    /// Absent: the node's first. An update is refused before any guest is paused where it is missing or not able.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential_provider: Option<String>,
    /// The longest that saving may take for all guests together, `1s` to `24h`; they run meanwhile, but
    /// for a short pause each. After that the update has failed, and all run on.
    #[serde(default = "thirty_minutes")]
    pub timeout: String,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            store: SessionStore::Disk,
            credential_provider: None,
            timeout: thirty_minutes(),
        }
    }
}

/// Where sessions are kept over the reboot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SessionStore {
    /// In files of the node's state directory, encrypted.
    #[default]
    Disk,
}

fn ten_minutes() -> String {
    "10m".to_owned()
}

fn thirty_minutes() -> String {
    "30m".to_owned()
}

/// What is asked of passes that have begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostUpdateAction {
    /// `Abort`: passes whose host is not rebooting yet are taken back, their guests run on, and no other
    /// one is begun until anything in the spec but `action` and `paused` is changed.
    #[serde(rename = "type")]
    pub kind: HostUpdateActionKind,
}

/// What is asked of passes that have begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HostUpdateActionKind {
    /// Taken back.
    Abort,
}

/// How far the nodes are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostUpdateStatus {
    /// Generation of the spec that this status was written for; -1: none yet.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// How many nodes are selected.
    #[serde(default)]
    pub selected: i32,
    /// How many of them are as they shall be.
    #[serde(default)]
    pub updated: i32,
    /// How many of them are under way.
    #[serde(default)]
    pub underway: i32,
    /// How many of them have failed.
    #[serde(default)]
    pub failed: i32,
    /// The selected nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<UpdatedNode>,
    /// That it was aborted. It stays so when `action` is removed or `paused` set; any other change of the spec is another try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aborted: Option<Aborted>,
    /// `Ready`, `Reconciling` and `Stalled` (as kstatus reads them).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Default for HostUpdateStatus {
    fn default() -> HostUpdateStatus {
        HostUpdateStatus {
            observed_generation: never_observed(),
            selected: 0,
            updated: 0,
            underway: 0,
            failed: 0,
            nodes: Vec::new(),
            aborted: None,
            conditions: Vec::new(),
        }
    }
}

/// What was aborted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Aborted {
    /// The last generation of which it is known.
    pub generation: i64,
    /// Digest of the spec without `action` and `paused`.
    pub spec: String,
}

/// One selected node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdatedNode {
    /// The node.
    pub name: String,
    /// Whether it satisfies `expect`, or has been updated for this generation.
    pub satisfied: bool,
    /// The last pass over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_update: Option<String>,
    /// How far that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<NodeUpdatePhase>,
    /// Why it is not begun, or has come to this end, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_selector_selects_every_node_and_each_label_must_agree() {
        let labels = BTreeMap::from([
            ("kubernetes.io/hostname".to_owned(), "a".to_owned()),
            ("zone".to_owned(), "1".to_owned()),
        ]);
        let selects = |wanted: &[(&str, &str)]| {
            NodeSelector {
                match_labels: wanted
                    .iter()
                    .map(|(label, value)| ((*label).to_owned(), (*value).to_owned()))
                    .collect(),
            }
            .selects(&labels)
        };
        assert!(selects(&[]));
        assert!(selects(&[("kubernetes.io/hostname", "a")]));
        assert!(!selects(&[("kubernetes.io/hostname", "b")]));
        assert!(!selects(&[("kubernetes.io/hostname", "a"), ("rack", "1")]));
    }

    #[test]
    fn a_part_of_the_nodes_is_rounded_down_and_never_none() {
        let of = |wanted: IntOrString, selected| {
            HostUpdateSpec {
                max_unavailable: wanted,
                ..HostUpdateSpec::default()
            }
            .may_be_unavailable(selected)
        };
        let percent = |text: &str| IntOrString::String(text.to_owned());
        assert_eq!(of(IntOrString::Int(3), 2), 3);
        assert_eq!(of(percent("20%"), 10), 2);
        assert_eq!(of(percent("20%"), 9), 1);
        assert_eq!(of(percent("1%"), 2), 1);
        assert_eq!(of(percent("100%"), 7), 7);
        assert_eq!(HostUpdateSpec::default().may_be_unavailable(7), 1);
    }

    #[test]
    fn alerts_are_selected_by_name_or_by_how_it_begins() {
        let alerts = AlertSelector {
            server: String::new(),
            names: vec!["EtcdDown".to_owned(), "Ceph*".to_owned()],
        };
        assert!(alerts.selects("EtcdDown") && alerts.selects("CephOSDDown"));
        assert!(!alerts.selects("EtcdDownstream") && !alerts.selects("Watchdog"));
    }

    #[test]
    fn what_a_host_misses_is_told() {
        let expect = HostExpect {
            kernel_release: Some("6.1.0-50".to_owned()),
            booted_after: Some(Time("2026-11-22T18:00:00Z".parse().unwrap())),
        };
        let after = expect.booted_after.as_ref().unwrap().0.as_microsecond();
        assert_eq!(expect.satisfied_by("6.1.0-50", after + 1), Ok(()));
        let kernel = expect.satisfied_by("6.1.0-49", after + 1).unwrap_err();
        assert!(
            kernel.contains("6.1.0-49") && kernel.contains("6.1.0-50"),
            "{kernel}"
        );
        let time = expect.satisfied_by("6.1.0-50", after).unwrap_err();
        assert!(time.contains("2026-11-22T18:00:00Z"), "{time}");
    }
}
