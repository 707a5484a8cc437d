use serde_json::{Value, json};
use understudy_api::Host;
use understudy_api::managers::{AGENT, OPERATOR};

use super::*;
use crate::place::CORDONED_FOR;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap()
}

fn update(name: &str, made: i64, status: Value, metadata: Value) -> NodeUpdate {
    let mut object = json!({"metadata": {"name": name, "uid": name, "generation": 1,
            "creationTimestamp": at(made).to_string(), "finalizers": [FINALIZER]},
        "spec": {"nodeName": "a", "origin": "HostUpdate",
            "hostUpdate": {"name": "kernel", "uid": "h", "generation": 1}, "drain": {"mode": "Evict", "timeout": "1m"}},
        "status": status});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    serde_json::from_value(object).unwrap()
}

fn place(cordoned: bool, cordoned_for: Option<&str>) -> Place {
    let mut node = json!({"metadata": {"name": "a", "uid": "1"}, "spec": {"unschedulable": cordoned}});
    if let Some(holder) = cordoned_for {
        node["metadata"]["annotations"] = json!({CORDONED_FOR: holder});
    }
    let node = serde_json::from_value(node).unwrap();
    let host: Host = serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {},
        "status": {"nodeUID": "1", "heartbeat": "2026-01-01T00:00:00Z"}}))
    .unwrap();
    Place::new("a", Some(&node), Some(&host), false)
}

fn found(place: Place, others: Vec<NodeUpdate>) -> Found {
    Found {
        place,
        others: others.into_iter().map(Arc::new).collect(),
        pods: None,
        said: None,
    }
}

fn with_pods(place: Place, left: &[&str]) -> Found {
    Found {
        pods: Some(Pods {
            left: left.iter().map(|name| (*name).to_owned()).collect(),
            blocked: Vec::new(),
        }),
        ..found(place, Vec::new())
    }
}

fn condition_of(plan: &Plan, kind: &str) -> String {
    let fields = &plan.status.as_ref().expect("a status").fields;
    let all = fields["conditions"].as_array().unwrap();
    match all.iter().find(|there| there["type"] == kind) {
        Some(there) => format!(
            "{} {}",
            there["status"].as_str().unwrap(),
            there["reason"].as_str().unwrap()
        ),
        None => "absent".to_owned(),
    }
}

fn cordoned(reason: &str, since: i64) -> Value {
    json!({"type": "Cordoned", "status": "True", "reason": reason, "message": "", "lastTransitionTime": at(since).to_string()})
}

fn drained() -> Value {
    json!({"type": "Drained", "status": "True", "reason": "Drained", "message": "", "lastTransitionTime": at(0).to_string()})
}

#[test]
fn the_node_is_cordoned_then_drained_and_only_then_the_agent_may_begin() {
    let new = update("k-1", 0, json!({}), json!({}));
    let first = build(&new, &found(place(false, None), vec![new.clone()]), at(0));
    assert_eq!(first.cordon, Some(Cordon::Set));
    assert!(first.is_kept);
    assert_eq!(condition_of(&first, "Cordoned"), "True Cordoned");
    assert_eq!(condition_of(&first, "Drained"), "absent");

    let cordoned_ = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "conditions": [cordoned("Cordoned", 0)]}),
        json!({}),
    );
    let there = place(true, Some("k-1"));
    assert!(drains(&cordoned_, &found(there.clone(), vec![])));
    let waits = build(
        &cordoned_,
        &with_pods(there.clone(), &["shop/db", "shop/web"]),
        at(10),
    );
    assert_eq!(condition_of(&waits, "Drained"), "False Draining");
    assert_eq!(condition_of(&waits, "Cordoned"), "True Cordoned");
    assert!(waits.again.is_some());
    let message = waits.status.unwrap().fields["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(message.contains("2 left: shop/db, shop/web"), "{message}");

    let done = build(&cordoned_, &with_pods(there, &[]), at(10));
    assert_eq!(condition_of(&done, "Drained"), "True Drained");
    assert_eq!(done.status.unwrap().fields["phase"], "Pending");
}

#[test]
fn pods_that_do_not_go_in_time_fail_the_pass_and_the_node_is_uncordoned() {
    let late = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "conditions": [cordoned("Cordoned", 0)]}),
        json!({}),
    );
    let plan = build(&late, &with_pods(place(true, Some("k-1")), &["shop/db"]), at(60));
    let fields = plan.status.unwrap().fields;
    assert_eq!(fields["phase"], "Failed");
    assert_eq!(fields["reason"], "DrainTimedOut");
    let over = update("k-1", 0, Value::Object(fields), json!({}));
    let plan = build(&over, &found(place(true, Some("k-1")), vec![]), at(61));
    assert_eq!(plan.cordon, Some(Cordon::Release));
    assert!(plan.is_kept, "until the node is seen uncordoned");
    let plan = build(&over, &found(place(false, None), vec![]), at(62));
    assert_eq!(plan.cordon, None);
    assert!(!plan.is_kept);
}

#[test]
fn a_node_that_an_administrator_had_cordoned_stays_so() {
    let new = update("k-1", 0, json!({}), json!({}));
    let plan = build(&new, &with_pods(place(true, None), &[]), at(0));
    assert_eq!(plan.cordon, None);
    assert_eq!(condition_of(&plan, "Cordoned"), "True AlreadyCordoned");
    assert_eq!(condition_of(&plan, "Drained"), "True Drained");
    let over = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "phase": "Resumed", "conditions": [cordoned("AlreadyCordoned", 0), drained()]}),
        json!({}),
    );
    let plan = build(&over, &found(place(true, None), vec![]), at(1));
    assert_eq!(plan.cordon, None);
    assert_eq!(condition_of(&plan, "Uncordoned"), "True AlreadyCordoned");
}

#[test]
fn a_deletion_before_the_agent_had_it_aborts_and_one_after_is_the_agents() {
    let deleting = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
    let drains_ = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "conditions": [cordoned("Cordoned", 0)]}),
        deleting.clone(),
    );
    let plan = build(&drains_, &found(place(true, Some("k-1")), vec![]), at(1));
    assert_eq!(plan.status.as_ref().unwrap().fields["phase"], "Aborted");
    assert!(plan.is_kept);

    let begun = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "phase": "Saving", "conditions": [cordoned("Cordoned", 0), drained()]}),
        json!({"deletionTimestamp": "2026-01-01T00:00:00Z",
            "managedFields": [{"manager": AGENT, "operation": "Apply", "subresource": "status"}]}),
    );
    let plan = build(&begun, &found(place(true, Some("k-1")), vec![]), at(1));
    assert_eq!(plan.status.as_ref().unwrap().fields.get("phase"), None);
    assert_eq!(plan.cordon, None);
    assert!(plan.is_kept);
}

#[test]
fn one_node_update_of_a_node_at_a_time() {
    let (old, new) = (
        update("k-1", 0, json!({}), json!({})),
        update("k-2", 5, json!({}), json!({})),
    );
    let both = || vec![old.clone(), new.clone()];
    let plan = build(&new, &found(place(false, None), both()), at(9));
    assert_eq!(plan.status.as_ref().unwrap().fields["reason"], "NodeBusy");
    assert_eq!(plan.cordon, None);
    assert_eq!(
        build(&old, &found(place(false, None), both()), at(9)).cordon,
        Some(Cordon::Set)
    );
    // Over, and the node is cordoned for it still.
    let over = update("k-1", 0, json!({"phase": "Resumed"}), json!({}));
    let plan = build(
        &new,
        &found(place(true, Some("k-1")), vec![over.clone(), new.clone()]),
        at(9),
    );
    assert_eq!(plan.status.as_ref().unwrap().fields["reason"], "NodeBusy");
    let plan = build(&new, &found(place(false, None), vec![over, new.clone()]), at(9));
    assert_eq!(plan.cordon, Some(Cordon::Set));
    // A note that was left behind by one that is no more does not keep the node cordoned for good.
    let plan = build(&new, &found(place(true, Some("gone")), vec![new.clone()]), at(9));
    assert_eq!(plan.cordon, Some(Cordon::Set));
}

#[test]
fn the_end_that_the_operator_has_written_stays_its_own_word_by_word() {
    let owned = json!([{"manager": OPERATOR, "operation": "Apply", "subresource": "status", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:status": {"f:phase": {}}}}]);
    let ended = update(
        "k-1",
        0,
        json!({"nodeUID": "1", "phase": "Failed", "reason": "NodeReplaced", "message": "gone",
            "phaseTransitions": [{"phase": "Failed", "transitionTime": "2026-01-01T00:00:00Z"}],
            "conditions": [cordoned("Cordoned", 0),
                {"type": "Failed", "status": "True", "reason": "NodeReplaced", "message": "gone", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}),
        json!({"managedFields": owned}),
    );
    let plan = build(&ended, &found(place(false, None), vec![]), at(100));
    let fields = &plan.status.as_ref().unwrap().fields;
    assert_eq!(fields["phase"], "Failed");
    assert_eq!(fields["reason"], "NodeReplaced");
    assert_eq!(condition_of(&plan, "Failed"), "True NodeReplaced");
    assert_eq!(condition_of(&plan, "Uncordoned"), "True Uncordoned");
}

#[test]
fn an_update_that_the_host_began_is_its_agents_from_the_first() {
    let mut host = update("host-1", 0, json!({}), json!({}));
    host.spec.origin = Origin::Host;
    let plan = build(&host, &found(place(false, None), vec![]), at(1));
    assert_eq!(plan.cordon, None);
    assert_eq!(condition_of(&plan, "Cordoned"), "absent");
    assert_eq!(plan.status.unwrap().fields["nodeUID"], "1");
}
