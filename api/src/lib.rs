//! Resource types of Understudy (`understudy.dev/v1alpha1`): [`Guest`], [`SeamlessReboot`], [`HostUpdate`],
//! [`NodeUpdate`] and [`Host`], their phases and conditions, the rules that a manifest must satisfy, and the
//! CRDs generated from all of it.
//!
//! Types only: no client and no runtime, so that the operator, the node agent with a cluster, the node
//! agent without one, and tests share the same words and the same rules.
#![forbid(unsafe_code)]

pub mod conditions;
pub mod crd;
pub mod duration;
pub mod guest;
pub mod host;
pub mod host_update;
pub mod manifest;
pub mod node_phase;
pub mod node_update;
pub mod phase;
pub mod quantity;
pub mod readiness;
pub mod reboot;
pub mod rollout;
pub mod rules;
mod structural;
pub mod validation;
pub mod window;

pub use guest::{Guest, GuestSpec, GuestStatus};
pub use host::{Host, HostSpec, HostStatus};
pub use host_update::{HostUpdate, HostUpdateSpec, HostUpdateStatus};
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
pub use kube::core::{Resource, ResourceExt};
pub use node_phase::NodeUpdatePhase;
pub use node_update::{NodeUpdate, NodeUpdateSpec, NodeUpdateStatus};
pub use phase::Phase;
pub use reboot::{SeamlessReboot, SeamlessRebootSpec, SeamlessRebootStatus};

/// API group of all our resources.
pub const GROUP: &str = "understudy.dev";
/// The one version there is.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of a manifest.
pub const API_VERSION: &str = "understudy.dev/v1alpha1";

/// Field managers: who has written what, by server-side apply.
pub mod managers {
    /// The operator.
    pub const OPERATOR: &str = "understudy-operator";
    /// The node agents.
    pub const AGENT: &str = "understudy-node";
}

/// `observedGeneration` of a status that nobody has written yet.
fn never_observed() -> i64 {
    -1
}
