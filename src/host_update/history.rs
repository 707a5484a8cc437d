//! Which finished NodeUpdates of a HostUpdate are kept. Pure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use kube::ResourceExt;
use understudy_api::node_update::NodeUpdateStatus;
use understudy_api::rollout::pass_name;
use understudy_api::{HostUpdate, NodeUpdate};

use super::build::{Found, phase_of};

/// Finished NodeUpdates beyond `historyLimit` of each node, the oldest. All nodes that are gone or not selected any
/// more count as one, so that a cluster whose nodes come and go does not gather them.
pub fn beyond(update: &HostUpdate, found: &Found) -> Vec<Arc<NodeUpdate>> {
    let limit = usize::try_from(update.spec.history_limit).unwrap_or(1).max(1);
    let present: HashSet<String> = found
        .places
        .iter()
        .filter_map(|place| Some(pass_name(update, &place.node.as_ref()?.uid)))
        .collect();
    let selected: HashSet<&str> = found.places.iter().map(|place| place.name.as_str()).collect();
    let mut of_node: BTreeMap<Option<&str>, Vec<&Arc<NodeUpdate>>> = BTreeMap::new();
    for pass in found.passes.iter().filter(|pass| phase_of(pass).is_terminal()) {
        let node = Some(pass.spec.node_name.as_str()).filter(|node| selected.contains(node));
        of_node.entry(node).or_default().push(pass);
    }
    let mut beyond = Vec::new();
    for mut passes in of_node.into_values() {
        passes.sort_by_key(|pass| {
            let generation = pass.spec.host_update.as_ref().map(|of| of.generation);
            Reverse((generation, pass.creation_timestamp(), pass.name_any()))
        });
        let old = passes.into_iter().skip(limit);
        // The present generation's says what has become of the node; and with one whose credential is needed still
        // its sessions would be lost.
        let needs_credential = |pass: &NodeUpdate| {
            pass.is_kept_by_operator() && pass.status.as_ref().is_some_and(NodeUpdateStatus::needs_keys)
        };
        let old = old.filter(|pass| !present.contains(&pass.name_any()) && !needs_credential(pass));
        beyond.extend(
            old.filter(|pass| pass.metadata.deletion_timestamp.is_none())
                .cloned(),
        );
    }
    beyond
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::place::Place;

    fn pass(name: &str, node: &str, generation: i64, phase: &str) -> Arc<NodeUpdate> {
        let of = json!({"name": "u", "uid": "h", "generation": generation});
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"nodeName": node, "origin": "HostUpdate", "hostUpdate": of}, "status": {"phase": phase}}))
            .unwrap(),
        )
    }

    #[test]
    fn the_latest_are_kept_and_what_is_under_way_or_of_the_present_generation() {
        let update: HostUpdate = serde_json::from_value(
            json!({"metadata": {"name": "u", "uid": "h", "generation": 9}, "spec": {"historyLimit": 2}}),
        )
        .unwrap();
        let node = serde_json::from_value(json!({"metadata": {"name": "a", "uid": "uid-a"}})).unwrap();
        let present = pass_name(&update, "uid-a");
        let found = Found {
            places: vec![Place::new("a", Some(&node), None, false)],
            passes: vec![
                pass("old", "a", 2, "Resumed"),
                pass("older", "a", 1, "Failed"),
                pass(&present, "a", 0, "Failed"),
                pass("busy", "a", 0, "Saving"),
                pass("last", "a", 3, "Aborted"),
                pass("gone-1", "b", 1, "Failed"),
                pass("gone-2", "c", 2, "Failed"),
                pass("gone-3", "d", 3, "Failed"),
            ],
            blocked: BTreeMap::new(),
        };
        let names: Vec<String> = beyond(&update, &found)
            .iter()
            .map(|pass| pass.name_any())
            .collect();
        assert_eq!(names, ["gone-1", "older"]);
    }
}
