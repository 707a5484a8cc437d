//! What is known of a node: the Node, its Host, and whether its agent speaks. Pure functions of both.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use understudy_api::Host;
use understudy_api::conditions::{Wanted, reasons, types};

/// An agent that has not spoken for longer is silent. It speaks every 10 s.
pub const SILENT_AFTER: Duration = Duration::from_secs(40);
/// Says which NodeUpdate had the node cordoned; on a node that an administrator had cordoned it is absent.
pub const CORDONED_FOR: &str = "understudy.dev/cordoned-for";

const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its UID: another one is another node.
    pub uid: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether an administrator says that it is down for good.
    pub is_out_of_service: bool,
    /// Whether its condition `Ready` says anything but `True`. A Node of which nobody says so is taken for ready.
    pub is_unready: bool,
    /// Whether no new Pods are scheduled to it.
    pub is_cordoned: bool,
    /// The NodeUpdate for which the operator has cordoned it.
    pub cordoned_for: Option<String>,
    /// Kernel release, as its kubelet says.
    pub kernel_release: String,
    /// Boot ID, as its kubelet says.
    pub boot_id: String,
}

impl From<&Node> for NodeView {
    fn from(node: &Node) -> NodeView {
        let spec = node.spec.as_ref();
        let status = node.status.as_ref();
        let mut conditions = status
            .and_then(|status| status.conditions.as_ref())
            .into_iter()
            .flatten();
        let info = status.and_then(|status| status.node_info.as_ref());
        NodeView {
            name: node.name_any(),
            uid: node.uid().unwrap_or_default(),
            labels: node.labels().clone(),
            is_out_of_service: spec
                .and_then(|spec| spec.taints.as_ref())
                .is_some_and(|taints| taints.iter().any(|taint| taint.key == OUT_OF_SERVICE)),
            is_unready: conditions.any(|there| there.type_ == "Ready" && there.status != "True"),
            is_cordoned: spec.and_then(|spec| spec.unschedulable).unwrap_or(false),
            cordoned_for: node.annotations().get(CORDONED_FOR).cloned(),
            kernel_release: info.map(|info| info.kernel_version.clone()).unwrap_or_default(),
            boot_id: info.map(|info| info.boot_id.clone()).unwrap_or_default(),
        }
    }
}

/// The agent of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// It speaks.
    Lives,
    /// It has not spoken for [`SILENT_AFTER`].
    Silent,
    /// It has never spoken from this node.
    Absent,
}

/// Node and agent behind a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The name.
    pub name: String,
    /// The node, where there is one.
    pub node: Option<NodeView>,
    /// The agent of exactly this node.
    pub agent: Agent,
    /// When its kernel was started, in microseconds since 1970, as the agent says.
    pub booted_at: Option<i64>,
    /// Its boot ID, as the agent says.
    pub boot_id: Option<String>,
    /// Its machine ID, as the agent says.
    pub machine_id: Option<String>,
}

impl Place {
    /// From what is known. `is_silent`: whether the Host's heartbeat is too old.
    pub fn new(name: &str, node: Option<&Node>, host: Option<&Host>, is_silent: bool) -> Place {
        let node = node.map(NodeView::from);
        let status = host.and_then(|host| host.status.as_ref());
        // The Host of an earlier node of that name is not this one's.
        let status = status.filter(|status| {
            let uid = node.as_ref().map(|node| &node.uid);
            uid.is_some() && status.node_uid.as_ref() == uid
        });
        let agent = match status {
            None => Agent::Absent,
            Some(status) if is_silent || status.heartbeat.is_none() => Agent::Silent,
            Some(_) => Agent::Lives,
        };
        Place {
            name: name.to_owned(),
            agent,
            boot_id: status.and_then(|status| status.boot_id.clone()),
            machine_id: status.and_then(|status| status.machine_id.clone()),
            booted_at: status
                .filter(|status| {
                    // What the agent said in an earlier boot is not true of this one.
                    let boot = node
                        .as_ref()
                        .map(|node| node.boot_id.as_str())
                        .unwrap_or_default();
                    boot.is_empty() || status.boot_id.as_deref() == Some(boot)
                })
                .and_then(|status| Some(status.booted_at.as_ref()?.0.as_microsecond())),
            node,
        }
    }

    /// What has become of the node to which something was assigned.
    pub fn standing(&self, uid: &str) -> Standing {
        match &self.node {
            None => Standing::Gone,
            Some(node) if node.uid != uid => Standing::Replaced,
            Some(node) if node.is_out_of_service => Standing::OutOfService,
            Some(_) => Standing::Here,
        }
    }

    /// The node's UID, where something new may be assigned to it; else why not.
    pub fn vacancy(&self) -> Result<&str, Refusal> {
        let name = &self.name;
        let Some(node) = &self.node else {
            return Err(Refusal::new(
                reasons::NODE_NOT_FOUND,
                format!("there is no Node {name}"),
            ));
        };
        if node.is_out_of_service {
            let message = format!("Node {name} is tainted {OUT_OF_SERVICE}");
            return Err(Refusal::new(reasons::NODE_OUT_OF_SERVICE, message));
        }
        match self.agent {
            Agent::Lives => Ok(&node.uid),
            Agent::Silent => Err(Refusal::new(reasons::AGENT_SILENT, self.agent_message())),
            Agent::Absent => Err(Refusal::new(reasons::NO_AGENT, self.agent_message())),
        }
    }

    fn agent_message(&self) -> String {
        let name = &self.name;
        match self.agent {
            Agent::Lives => format!("the agent of node {name} speaks"),
            Agent::Silent => format!(
                "the agent of node {name} has not spoken for {} s; see `kubectl get host {name}` and the service understudy-node on the node",
                SILENT_AFTER.as_secs()
            ),
            Agent::Absent => {
                format!("no agent has spoken from node {name}; is it selected by the agents' DaemonSet?")
            }
        }
    }

    /// The condition `AgentAvailable`, with room for its message.
    pub fn agent_available(&self) -> Owned {
        let (status, reason) = match (&self.node, self.agent) {
            (Some(node), _) if node.is_out_of_service => (false, reasons::NODE_OUT_OF_SERVICE),
            (_, Agent::Lives) => (true, reasons::AGENT_LIVES),
            (_, Agent::Silent) => (false, reasons::AGENT_SILENT),
            (_, Agent::Absent) => (false, reasons::NO_AGENT),
        };
        let message = match reason {
            reasons::NODE_OUT_OF_SERVICE => format!("Node {} is tainted {OUT_OF_SERVICE}", self.name),
            _ => self.agent_message(),
        };
        Owned::new(types::AGENT_AVAILABLE, status, reason, message)
    }
}

/// What has become of the node to which something was assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is there.
    Here,
    /// It is there, and down for good as its administrator says.
    OutOfService,
    /// It was deleted.
    Gone,
    /// Another node has its name.
    Replaced,
}

impl Standing {
    /// Whether nobody will ever report from it again.
    pub fn is_lost(self) -> bool {
        matches!(self, Standing::Gone | Standing::Replaced)
    }

    /// Whether an object may go without its agent's word.
    pub fn releases(self) -> bool {
        self != Standing::Here
    }

    /// Why something is lost, for a node of this name.
    pub fn loss(self, node: &str) -> Refusal {
        match self {
            Standing::Replaced => Refusal::new(
                reasons::NODE_REPLACED,
                format!(
                    "Node {node} is another one than it was assigned to; what was on that one is not started here. Delete it and apply it anew where its disks are on this node"
                ),
            ),
            _ => Refusal::new(
                reasons::NODE_NOT_FOUND,
                format!("Node {node}, to which it was assigned, was deleted"),
            ),
        }
    }
}

/// Why something waits or cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(reason: &'static str, message: String) -> Refusal {
        Refusal { reason, message }
    }
}

/// A condition as it shall be, with its own message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    kind: &'static str,
    status: bool,
    reason: String,
    message: String,
}

impl Owned {
    /// A condition.
    pub fn new(kind: &'static str, status: bool, reason: &str, message: String) -> Owned {
        Owned {
            kind,
            status,
            reason: reason.to_owned(),
            message,
        }
    }

    /// As the api takes it.
    pub fn wanted(&self) -> Wanted<'_> {
        Wanted {
            kind: self.kind,
            status: Some(self.status),
            reason: &self.reason,
            message: &self.message,
        }
    }
}

#[cfg(test)]
#[path = "place_test.rs"]
mod tests;
