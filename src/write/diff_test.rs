use serde_json::json;
use understudy_api::Time;

use super::*;

fn meta(managed: Value) -> ObjectMeta {
    serde_json::from_value(json!({"name": "web", "managedFields": managed})).unwrap()
}

fn ours(fields: Value) -> Value {
    json!({"manager": OPERATOR, "operation": "Apply", "subresource": "status", "fieldsType": "FieldsV1",
           "fieldsV1": {"f:status": fields}})
}

fn wanted(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn ready(status: &str, at: &str) -> Value {
    json!({"type": "Ready", "status": status, "reason": "R", "message": "", "observedGeneration": 1,
           "lastTransitionTime": at})
}

fn owns_ready() -> Value {
    json!({"f:nodeName": {}, "f:conditions": {"k:{\"type\":\"Ready\"}": {".": {}, "f:status": {}}}})
}

#[test]
fn what_is_there_and_ours_is_not_written_again() {
    let meta = meta(json!([ours(owns_ready())]));
    let live =
        json!({"nodeName": "a", "phase": "Running", "conditions": [ready("True", "2026-01-01T00:00:00Z")]});
    // The time of transition may be any.
    let same = wanted(json!({"nodeName": "a", "conditions": [ready("True", "2026-02-02T00:00:00Z")]}));
    assert!(!status_changes(&meta, &live, &same));
    let other = wanted(json!({"nodeName": "b", "conditions": [ready("True", "2026-01-01T00:00:00Z")]}));
    assert!(status_changes(&meta, &live, &other));
    let other = wanted(json!({"nodeName": "a", "conditions": [ready("False", "2026-01-01T00:00:00Z")]}));
    assert!(status_changes(&meta, &live, &other));
}

#[test]
fn a_field_that_is_ours_and_no_longer_wanted_is_let_go() {
    let mut fields = owns_ready();
    fields["f:phase"] = json!({});
    let meta = meta(json!([ours(fields)]));
    let live =
        json!({"nodeName": "a", "phase": "Pending", "conditions": [ready("True", "2026-01-01T00:00:00Z")]});
    let without = wanted(json!({"nodeName": "a", "conditions": [ready("True", "2026-01-01T00:00:00Z")]}));
    assert!(status_changes(&meta, &live, &without));
    let without = wanted(json!({"nodeName": "a", "phase": "Pending"}));
    assert!(
        status_changes(&meta, &live, &without),
        "a condition is let go as well"
    );
}

#[test]
fn a_value_that_somebody_else_owns_is_taken_even_where_it_is_equal() {
    let meta = meta(json!([]));
    let live = json!({"nodeName": "a"});
    assert!(status_changes(&meta, &live, &wanted(json!({"nodeName": "a"}))));
}

#[test]
fn the_claim_is_an_agents_write_of_the_status() {
    let entry = |manager: &str, subresource: &str| json!({"manager": manager, "operation": "Apply", "subresource": subresource});
    assert!(is_claimed(&meta(json!([entry(AGENT, "status")]))));
    assert!(!is_claimed(&meta(json!([entry(AGENT, "")]))));
    assert!(!is_claimed(&meta(json!([entry(OPERATOR, "status")]))));
}

#[test]
fn metadata_is_compared_by_what_is_there_and_what_is_ours() {
    let of = |finalizers: Value, fields: Value| -> ObjectMeta {
        serde_json::from_value(json!({"name": "web", "finalizers": finalizers, "annotations": {"n": "1"},
            "managedFields": [{"manager": OPERATOR, "operation": "Apply", "fieldsV1": {"f:metadata": fields}}]}))
        .unwrap()
    };
    let fields = json!({"f:finalizers": {"v:\"f\"": {}}, "f:annotations": {"f:n": {}}});
    let both = of(json!(["f"]), fields.clone());
    assert!(!metadata_changes(&both, Some("f"), &[("n", "1".into())]));
    assert!(metadata_changes(&both, None, &[("n", "1".into())]));
    assert!(metadata_changes(&both, Some("f"), &[]));
    assert!(metadata_changes(&both, Some("f"), &[("n", "2".into())]));
    assert!(metadata_changes(&of(json!([]), json!({})), Some("f"), &[]));
    assert!(!metadata_changes(&of(json!(["other"]), json!({})), None, &[]));
}

#[test]
fn times_of_transition_are_carried_over() {
    let live: Condition = serde_json::from_value(ready("True", "2026-01-01T00:00:00Z")).unwrap();
    let want = |status| Wanted {
        kind: "Ready",
        status: Some(status),
        reason: "Other",
        message: "",
    };
    let now = Timestamp::from_second(2_000_000_000).unwrap();
    let kept = carry(std::slice::from_ref(&live), 2, now, &[want(true)]);
    assert_eq!(kept[0].last_transition_time, live.last_transition_time);
    assert_eq!(kept[0].reason, "Other");
    let changed = carry(&[live], 2, now, &[want(false)]);
    assert_eq!(changed[0].last_transition_time, Time(now));
}

#[test]
fn trimming_keeps_what_is_compared() {
    let mut meta = meta(json!([
        ours(owns_ready()),
        {"manager": AGENT, "operation": "Apply", "subresource": "status", "fieldsV1": {"f:status": {}}},
        {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {}}},
    ]));
    trim_managed_fields(&mut meta);
    assert!(is_claimed(&meta));
    let entries = meta.managed_fields.as_ref().unwrap();
    assert_eq!(entries.len(), 2);
    let fields = entries[0].fields_v1.as_ref().unwrap();
    let kept = &fields.0["f:status"]["f:conditions"]["k:{\"type\":\"Ready\"}"];
    assert!(kept.is_null(), "of a condition its type is enough: {kept}");
    let live = json!({"nodeName": "a", "conditions": [ready("True", "2026-01-01T00:00:00Z")]});
    let same = wanted(json!({"nodeName": "a", "conditions": [ready("True", "2026-01-01T00:00:00Z")]}));
    assert!(!status_changes(&meta, &live, &same));
}
