//! The published rules of kstatus for kinds that it does not know, in their order.

use serde_json::Value;

use crate::Verdict;

/// Reads an object as kstatus does.
pub fn read(object: &Value) -> Verdict {
    // "Resource scheduled for deletion": kstatus calls it Terminating.
    if object["metadata"]["deletionTimestamp"]
        .as_str()
        .is_some_and(|time| !time.is_empty())
    {
        return Verdict::InProgress;
    }
    if let (Some(generation), Some(observed)) = (
        object["metadata"]["generation"].as_i64(),
        object["status"]["observedGeneration"].as_i64(),
    ) && generation != observed
    {
        return Verdict::InProgress;
    }
    let conditions = object["status"]["conditions"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    // The first in the list that is true decides.
    for condition in conditions {
        match (condition["type"].as_str(), condition["status"].as_str()) {
            (Some("Reconciling"), Some("True")) => return Verdict::InProgress,
            (Some("Stalled"), Some("True")) => return Verdict::Failed,
            _ => {}
        }
    }
    // No rule for the kind: a condition Ready is looked at last; without one the resource is current.
    match conditions.iter().find(|condition| condition["type"] == "Ready") {
        Some(ready) if ready["status"] != "True" => Verdict::InProgress,
        _ => Verdict::Current,
    }
}
