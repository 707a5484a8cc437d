//! Pods that keep a pass over their node from beginning, and alerts that keep any.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use understudy_api::HostUpdate;
use understudy_api::host_update::{Blocker, PodSelector};

use super::alerts;
use crate::controller::Context;
use crate::error::Error;
use crate::place::Place;

/// Which of `places` are not to be disturbed now, and why.
pub async fn look(
    update: &HostUpdate,
    places: &[Place],
    context: &Context,
) -> Result<BTreeMap<String, String>, Error> {
    let mut blocked = BTreeMap::new();
    for blocker in &update.spec.blockers {
        if let Some(selector) = &blocker.pods {
            let pods = pods(&blocker.name, selector, context).await?;
            note(&mut blocked, blocker, &pods);
        }
        if let Some(selector) = &blocker.alerts
            && let Some(why) = alerts::block(selector).await
        {
            for place in places {
                blocked
                    .entry(place.name.clone())
                    .or_insert_with(|| format!("blocker {}: {why}", blocker.name));
            }
        }
    }
    Ok(blocked)
}

async fn pods(blocker: &str, selector: &PodSelector, context: &Context) -> Result<Vec<Pod>, Error> {
    let client = context.writer.client().clone();
    let api: Api<Pod> = match &selector.namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    };
    let selected = ListParams::default().labels(&labels(selector));
    let pods = api.list(&selected).await;
    let pods =
        pods.map_err(|error| Error::from_kube(&format!("listing the Pods of blocker {blocker}"), error))?;
    Ok(pods.items)
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
        assert_eq!(labels(blocker.pods.as_ref().unwrap()), "app=backup,tier=1");
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
