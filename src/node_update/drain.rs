//! Eviction of a node's ordinary Pods.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{EvictParams, ListParams};
use kube::{Api, ResourceExt};

use crate::controller::{Context, PodName};
use crate::error::Error;

/// What is left on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pods {
    /// Pods that are still there, `namespace/name`, in order.
    pub left: Vec<String>,
    /// Those of them whose eviction a disruption budget, or something else, does not allow now; and why.
    pub blocked: Vec<(String, String)>,
}

/// Asks for the eviction of every ordinary Pod of a node once, and says what is left.
pub async fn pass(node: &str, context: &Context) -> Result<Pods, Error> {
    let client = context.writer.client();
    let action = format!("listing the Pods of node {node}");
    let of_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = Api::<Pod>::all(client.clone()).list(&of_node).await;
    let pods = pods.map_err(|error| Error::from_kube(&action, error))?;
    let mut found = Pods::default();
    let ordinary = pods.items.iter().filter(|pod| is_ordinary(pod));
    for pod in ordinary.filter(|pod| !is_own(pod, &context.pod)) {
        let namespace = pod.namespace().unwrap_or_default();
        let name = format!("{namespace}/{}", pod.name_any());
        if pod.metadata.deletion_timestamp.is_none() {
            let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let pod_name = pod.name_any();
            let parameters = EvictParams::default();
            let eviction = api.evict(&pod_name, &parameters);
            let evicted = context
                .writer
                .fenced(&format!("evicting Pod {name}"), eviction)
                .await;
            match evicted {
                Ok(_) => tracing::info!(node, pod = name, "evicted"),
                Err(error) if error.is_not_found() => continue,
                Err(error) => match error.answer() {
                    // 429: a disruption budget does not allow it now. Others may be gone nevertheless.
                    Some(words) => found.blocked.push((name.clone(), words.to_owned())),
                    None => return Err(error),
                },
            }
        }
        found.left.push(name);
    }
    found.left.sort();
    found.blocked.sort();
    Ok(found)
}

/// Whether this process runs in the Pod. It goes down with its host, as a Pod of a DaemonSet does: the kubelet starts it again,
/// and another replica leads meanwhile. Where no other node takes an operator that has evicted itself, nobody would
/// ever uncordon the node.
fn is_own(pod: &Pod, own: &PodName) -> bool {
    pod.metadata.namespace.as_ref() == Some(&own.namespace) && pod.metadata.name.as_ref() == Some(&own.name)
}

/// Whether a Pod is to be evicted: not one of a DaemonSet, not a static one, not one that has ended.
fn is_ordinary(pod: &Pod) -> bool {
    let is_static = pod.annotations().contains_key("kubernetes.io/config.mirror");
    let of_daemon_set = pod
        .owner_references()
        .iter()
        .any(|owner| owner.controller == Some(true) && owner.kind == "DaemonSet");
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
    !is_static && !of_daemon_set && !has_ended
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(metadata: Value, phase: &str) -> Pod {
        serde_json::from_value(json!({"metadata": metadata, "status": {"phase": phase}})).unwrap()
    }

    fn owned_by(kind: &str) -> Value {
        json!({"name": "p", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": kind, "name": "o", "uid": "u", "controller": true}]})
    }

    #[test]
    fn pods_of_daemon_sets_static_and_ended_ones_stay() {
        assert!(is_ordinary(&pod(json!({"name": "p"}), "Running")));
        assert!(is_ordinary(&pod(owned_by("ReplicaSet"), "Pending")));
        assert!(!is_ordinary(&pod(owned_by("DaemonSet"), "Running")));
        let mirror = json!({"name": "p", "annotations": {"kubernetes.io/config.mirror": "x"}});
        assert!(!is_ordinary(&pod(mirror, "Running")));
        assert!(!is_ordinary(&pod(owned_by("Job"), "Succeeded")));
    }
}
