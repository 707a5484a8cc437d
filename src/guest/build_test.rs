use serde_json::Value;
use understudy_api::Host;
use understudy_api::managers::{AGENT, OPERATOR};

use super::*;

fn now() -> Timestamp {
    Timestamp::from_second(2_000_000_000).unwrap()
}

fn guest(patch: Value) -> Guest {
    let mut object = json!({"apiVersion": "understudy.dev/v1alpha1", "kind": "Guest",
        "metadata": {"name": "web", "namespace": "shop", "uid": "g", "generation": 1},
        "spec": {"nodeName": "a", "memory": "512Mi", "disks": [{"name": "root", "role": "Root", "source": "web.img"}]}});
    merge(&mut object, patch);
    serde_json::from_value(object).unwrap()
}

fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch,
    }
}

fn assigned_status() -> Value {
    json!({"nodeName": "a", "nodeUID": "1", "conditions": []})
}

fn claimed() -> Value {
    json!([{"manager": AGENT, "operation": "Apply", "subresource": "status"}])
}

fn place(node_uid: Option<&str>, agent: bool, silent: bool) -> Place {
    let node =
        node_uid.map(|uid| serde_json::from_value(json!({"metadata": {"name": "a", "uid": uid}})).unwrap());
    let host: Option<Host> = agent.then(|| {
        serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {},
            "status": {"nodeUID": node_uid, "heartbeat": "2026-01-01T00:00:00Z"}}))
        .unwrap()
    });
    Place::new("a", node.as_ref(), host.as_ref(), silent)
}

fn plan(guest: &Guest, place: Place) -> Plan {
    build(guest, &Found { place: Some(place) }, now())
}

fn condition(plan: &Plan, kind: &str) -> (String, String) {
    let fields = &plan.status.as_ref().expect("a status").fields;
    let all = fields["conditions"].as_array().unwrap();
    let found = all.iter().find(|there| there["type"] == kind);
    let found = found.unwrap_or_else(|| panic!("no {kind}"));
    let text = |field: &str| found[field].as_str().unwrap().to_owned();
    (text("status"), text("reason"))
}

fn is(plan: &Plan, kind: &str, status: &str, reason: &str) {
    assert_eq!(
        condition(plan, kind),
        (status.to_owned(), reason.to_owned()),
        "{kind}"
    );
}

#[test]
fn a_guest_is_assigned_to_its_node_once_the_agent_there_speaks() {
    let web = guest(json!({}));
    let waits = plan(&web, place(None, false, false));
    is(&waits, "Accepted", "False", "NodeNotFound");
    is(&waits, "Ready", "False", "NodeNotFound");
    is(&waits, "Reconciling", "True", "NodeNotFound");
    is(&waits, "Stalled", "False", "NodeNotFound");
    assert!(!waits.is_kept, "what nobody holds may be deleted at once");
    assert_eq!(waits.status.as_ref().unwrap().fields.get("nodeName"), None);

    let waits = plan(&web, place(Some("1"), false, false));
    is(&waits, "AgentAvailable", "False", "NoAgent");
    let waits = plan(&web, place(Some("1"), true, true));
    is(&waits, "AgentAvailable", "False", "AgentSilent");

    let assigned = plan(&web, place(Some("1"), true, false));
    assert!(assigned.is_kept);
    is(&assigned, "Accepted", "True", "Assigned");
    is(&assigned, "AgentAvailable", "True", "AgentLives");
    is(&assigned, "Reconciling", "True", "Assigned");
    let status = assigned.status.unwrap();
    assert_eq!(status.fields["nodeName"], "a");
    assert_eq!(status.fields["nodeUID"], "1");
    assert_eq!(status.fields["phase"], "Pending");
    assert!(!status.force);
}

#[test]
fn a_guest_that_names_no_node_is_stalled() {
    let mut web = guest(json!({}));
    web.spec.node_name = None;
    let plan = build(&web, &Found { place: None }, now());
    is(&plan, "Accepted", "False", "NodeRequired");
    is(&plan, "Stalled", "True", "NodeRequired");
    is(&plan, "Reconciling", "False", "NodeRequired");
}

#[test]
fn after_the_claim_only_the_assignment_is_written() {
    let web = guest(json!({"metadata": {"managedFields": claimed()}, "status": assigned_status()}));
    let plan = plan(&web, place(Some("1"), true, true));
    is(&plan, "AgentAvailable", "False", "AgentSilent");
    is(&plan, "Accepted", "True", "Assigned");
    let status = plan.status.unwrap();
    assert_eq!(
        status.fields.keys().collect::<Vec<_>>(),
        ["conditions", "nodeName", "nodeUID"]
    );
    assert_eq!(status.fields["conditions"].as_array().unwrap().len(), 2);
    assert!(!status.force);
}

#[test]
fn a_guest_whose_node_is_gone_or_another_one_is_taken_over_and_not_moved() {
    let web = guest(json!({"metadata": {"managedFields": claimed()}, "status": assigned_status()}));
    for (place, reason) in [
        (place(Some("2"), true, false), "NodeReplaced"),
        (place(None, true, false), "NodeNotFound"),
    ] {
        let plan = plan(&web, place);
        is(&plan, "Accepted", "False", reason);
        is(&plan, "Stalled", "True", reason);
        is(&plan, "Ready", "False", reason);
        let status = plan.status.unwrap();
        assert!(status.force);
        assert_eq!(status.fields["nodeUID"], "1", "it is not assigned anew by guess");
    }
}

#[test]
fn a_deleted_guest_goes_when_its_agent_has_let_go_or_never_will() {
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [FINALIZER], "managedFields": claimed()});
    let held = guest(json!({"metadata": deleted, "status": assigned_status()}));
    assert!(plan(&held, place(Some("1"), true, false)).is_kept);
    assert!(
        plan(&held, place(Some("1"), true, true)).is_kept,
        "a silent agent may hold it still"
    );
    assert!(!plan(&held, place(Some("2"), true, false)).is_kept);
    assert!(!plan(&held, place(None, true, false)).is_kept);
    let mut status = assigned_status();
    status["conditions"] = json!([{"type": "Released", "status": "True", "reason": "Released", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let released = guest(json!({"metadata": deleted, "status": status}));
    let gone = plan(&released, place(Some("1"), true, false));
    assert_eq!(gone, Plan::default());
    // Never assigned.
    let unassigned = guest(json!({"metadata": deleted}));
    assert!(!plan(&unassigned, place(Some("1"), true, false)).is_kept);
}

#[test]
fn a_guests_request_makes_one_reboot_and_one_that_is_deleted_is_not_made_again() {
    let mut status = assigned_status();
    status["rebootRequest"] =
        json!({"id": "0a1b2c3d-4e5f", "reason": "a kernel", "requestedAt": "2026-01-01T00:00:00Z"});
    let asks = guest(json!({"metadata": {"managedFields": claimed()}, "status": status}));
    let there = || place(Some("1"), true, false);
    let plan_ = plan(&asks, there());
    let reboot = plan_.reboot.unwrap();
    assert_eq!(reboot.name_any(), "web-asked-0a1b2c3d");
    assert_eq!(reboot.namespace().as_deref(), Some("shop"));
    assert_eq!(reboot.spec.guest_name, "web");
    assert_eq!(plan_.answered.as_deref(), Some("0a1b2c3d-4e5f"));

    let answered = guest(json!({"metadata": {"annotations": {ANSWERED: "0a1b2c3d-4e5f"}}, "status": status}));
    let plan_ = plan(&answered, there());
    assert_eq!(plan_.reboot, None);
    assert_eq!(plan_.answered.as_deref(), Some("0a1b2c3d-4e5f"), "the note stays");

    status["rebootRequest"]["denied"] = json!("onGuestRequest: Deny");
    assert_eq!(plan(&guest(json!({"status": status})), there()).reboot, None);
}

#[test]
fn what_was_applied_is_not_applied_again() {
    let web = guest(json!({}));
    let first = plan(&web, place(Some("1"), true, false)).status.unwrap();
    // As the API server would have it then.
    let conditions = first.fields["conditions"].as_array().unwrap();
    let owned: Map<String, Value> = conditions
        .iter()
        .map(|condition| (format!("k:{}", json!({"type": condition["type"]})), json!({})))
        .collect();
    let mut fields: Map<String, Value> = first
        .fields
        .keys()
        .map(|key| (format!("f:{key}"), json!({})))
        .collect();
    fields.insert("f:conditions".into(), Value::Object(owned));
    let managed = json!([{"manager": OPERATOR, "operation": "Apply", "subresource": "status",
        "fieldsType": "FieldsV1", "fieldsV1": {"f:status": fields}}]);
    let stored = guest(json!({"metadata": {"managedFields": managed}, "status": first.fields}));
    let again = build(
        &stored,
        &Found {
            place: Some(place(Some("1"), true, false)),
        },
        Timestamp::now(),
    );
    let status = again.status.unwrap();
    let live = serde_json::to_value(&stored).unwrap();
    assert!(!crate::write::diff::status_changes(
        &stored.metadata,
        &live["status"],
        &status.fields
    ));
}
