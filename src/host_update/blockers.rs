//! Pods that keep a pass over their node from beginning.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use understudy_api::HostUpdate;
use understudy_api::host_update::{Blocker, PodSelector};

use crate::controller::Context;
use crate::error::Error;

/// Whether it is to be looked for such Pods: something may begin.
pub fn matter(update: &HostUpdate) -> bool {
    let is_still = update.spec.paused || update.metadata.deletion_timestamp.is_some();
    !update.spec.blockers.is_empty() && !is_still
}

/// Nodes on which a blocker's Pod runs, and which.
pub async fn look(update: &HostUpdate, context: &Context) -> Result<BTreeMap<String, String>, Error> {
    let client = context.writer.client();
    let mut blocked = BTreeMap::new();
    for blocker in &update.spec.blockers {
        let action = format!("listing the Pods of blocker {}", blocker.name);
        let api: Api<Pod> = match &blocker.pods.namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        };
        let selected = ListParams::default().labels(&labels(&blocker.pods));
        let pods = api.list(&selected).await;
        let pods = pods.map_err(|error| Error::from_kube(&action, error))?;
        note(&mut blocked, blocker, &pods.items);
    }
    Ok(blocked)
}

fn labels(pods: &PodSelector) -> String {
    let pairs: Vec<String> = pods
        .match_labels
        .iter()
        .map(|(label, value)| format!("{label}={value}"))
        .collect();
    pairs.join(",")
}

fn note(blocked: &mut BTreeMap<String, String>, blocker: &Blocker, pods: &[Pod]) {
    for pod in pods {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            continue;
        }
        if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
            let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
            blocked
                .entry(node)
                .or_insert_with(|| format!("blocker {}: Pod {name} runs on it", blocker.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_blocks_its_node_while_it_runs() {
        let blocker: Blocker = serde_json::from_value(
            json!({"name": "backups", "pods": {"matchLabels": {"app": "backup", "tier": "1"}}}),
        )
        .unwrap();
        assert_eq!(labels(&blocker.pods), "app=backup,tier=1");
        let pod = |name: &str, node: &str, phase: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": "ops"},
                "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase}}))
            .unwrap()
        };
        let mut blocked = BTreeMap::new();
        let pods = [
            pod("one", "a", "Running"),
            pod("two", "b", "Succeeded"),
            pod("three", "a", "Running"),
        ];
        note(&mut blocked, &blocker, &pods);
        assert_eq!(blocked.len(), 1);
        assert_eq!(blocked["a"], "blocker backups: Pod ops/one runs on it");
    }
}
