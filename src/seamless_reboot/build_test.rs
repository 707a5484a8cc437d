use serde_json::Value;
use understudy_api::Host;
use understudy_api::managers::AGENT;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap()
}

fn reboot(status: Value, metadata: Value) -> SeamlessReboot {
    let mut object = json!({"metadata": {"name": "web-1", "namespace": "shop", "uid": "r", "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"guestName": "web", "ttlSecondsAfterFinished": 60}, "status": status});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    serde_json::from_value(object).unwrap()
}

fn guest(uid: Option<&str>) -> Arc<Guest> {
    let mut status = json!({});
    if let Some(uid) = uid {
        status = json!({"nodeName": "a", "nodeUID": uid});
    }
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop"},
            "spec": {"memory": "512Mi", "disks": []}, "status": status}))
        .unwrap(),
    )
}

fn place(node_uid: Option<&str>, silent: bool) -> Place {
    let node =
        node_uid.map(|uid| serde_json::from_value(json!({"metadata": {"name": "a", "uid": uid}})).unwrap());
    let host: Host = serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {},
        "status": {"nodeUID": node_uid, "heartbeat": "2026-01-01T00:00:00Z"}}))
    .unwrap();
    Place::new("a", node.as_ref(), Some(&host), silent)
}

fn found(guest: Option<Arc<Guest>>, place: Option<Place>) -> Found {
    Found { guest, place }
}

fn fields(plan: &Plan) -> &Map<String, Value> {
    &plan.status.as_ref().expect("a status").fields
}

fn condition(plan: &Plan, kind: &str) -> String {
    let all = fields(plan)["conditions"].as_array().unwrap();
    let found = all.iter().find(|there| there["type"] == kind).unwrap();
    format!(
        "{} {}",
        found["status"].as_str().unwrap(),
        found["reason"].as_str().unwrap()
    )
}

#[test]
fn a_reboot_waits_for_its_guest_and_fails_when_it_has_waited_long_enough() {
    let new = reboot(json!({}), json!({}));
    let plan = build(&new, &found(None, None), at(10));
    assert_eq!(fields(&plan)["phase"], "Pending");
    assert_eq!(fields(&plan)["reason"], "GuestNotFound");
    assert_eq!(condition(&plan, "Accepted"), "False GuestNotFound");
    assert_eq!(condition(&plan, "Reconciling"), "True GuestNotFound");
    assert!(!plan.is_kept);
    // Five minutes by default.
    let again = plan.again.unwrap().as_secs();
    assert_eq!(again, 290);
    let plan = build(&new, &found(None, None), at(300));
    assert_eq!(fields(&plan)["phase"], "Failed");
    assert_eq!(fields(&plan)["reason"], "GuestNotFound");
    assert_eq!(condition(&plan, "Failed"), "True GuestNotFound");
    assert_eq!(condition(&plan, "Stalled"), "True GuestNotFound");
}

#[test]
fn a_reboot_is_assigned_to_the_node_of_its_guest() {
    let new = reboot(json!({}), json!({}));
    let waits = build(&new, &found(Some(guest(None)), None), at(1));
    assert_eq!(fields(&waits)["reason"], "GuestNotAssigned");
    let waits = build(
        &new,
        &found(Some(guest(Some("1"))), Some(place(Some("1"), true))),
        at(1),
    );
    assert_eq!(fields(&waits)["reason"], "AgentSilent");
    let waits = build(
        &new,
        &found(Some(guest(Some("1"))), Some(place(Some("2"), false))),
        at(1),
    );
    assert_eq!(fields(&waits)["reason"], "NodeReplaced");
    let plan = build(
        &new,
        &found(Some(guest(Some("1"))), Some(place(Some("1"), false))),
        at(1),
    );
    assert!(plan.is_kept);
    assert_eq!(fields(&plan)["nodeName"], "a");
    assert_eq!(fields(&plan)["nodeUID"], "1");
    assert_eq!(fields(&plan)["phase"], "Pending");
    assert_eq!(condition(&plan, "Accepted"), "True Assigned");
    assert_eq!(plan.note.unwrap().reason, "Assigned");
}

#[test]
fn what_an_agent_has_claimed_is_the_agents_until_its_node_is_gone() {
    let claimed =
        json!({"managedFields": [{"manager": AGENT, "operation": "Apply", "subresource": "status"}]});
    let status = json!({"nodeName": "a", "nodeUID": "1", "phase": "Rebooting",
        "phaseTransitions": [{"phase": "Rebooting", "transitionTime": "2026-01-01T00:00:00Z"}]});
    let runs = reboot(status.clone(), claimed.clone());
    let plan = build(
        &runs,
        &found(Some(guest(Some("1"))), Some(place(Some("1"), true))),
        at(9999),
    );
    assert_eq!(
        fields(&plan).keys().collect::<Vec<_>>(),
        ["conditions", "nodeName", "nodeUID"]
    );
    assert_eq!(condition(&plan, "AgentAvailable"), "False AgentSilent");
    assert!(plan.is_kept && !plan.status.unwrap().force);

    let plan = build(&runs, &found(None, Some(place(Some("2"), false))), at(9999));
    assert_eq!(fields(&plan)["phase"], "Failed");
    assert_eq!(fields(&plan)["reason"], "NodeReplaced");
    assert_eq!(fields(&plan)["nodeUID"], "1");
    assert_eq!(fields(&plan)["phaseTransitions"].as_array().unwrap().len(), 2);
    assert!(plan.status.as_ref().unwrap().force);
}

#[test]
fn a_deleted_reboot_is_taken_back_by_its_agent_or_goes_where_nobody_has_it() {
    let deleted = |status: Value| {
        reboot(
            status,
            json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [FINALIZER]}),
        )
    };
    assert_eq!(
        build(&deleted(json!({})), &found(None, None), at(1)),
        Plan::default()
    );
    let held = deleted(json!({"nodeName": "a", "nodeUID": "1", "phase": "Cloning"}));
    assert!(build(&held, &found(None, Some(place(Some("1"), true))), at(1)).is_kept);
    assert!(!build(&held, &found(None, Some(place(None, true))), at(1)).is_kept);
    let over = deleted(json!({"nodeName": "a", "nodeUID": "1", "phase": "Aborted"}));
    assert!(!build(&over, &found(None, Some(place(Some("1"), false))), at(1)).is_kept);
}

#[test]
fn a_finished_reboot_is_left_alone_and_deleted_when_its_time_has_come() {
    let status = json!({"nodeName": "a", "nodeUID": "1", "phase": "Succeeded",
        "phaseTransitions": [{"phase": "Succeeded", "transitionTime": "2026-01-01T00:00:00Z"}]});
    let done = reboot(status, json!({}));
    let plan = build(&done, &found(None, None), at(59));
    assert_eq!(plan.status, None);
    assert!(!plan.is_expired && !plan.is_kept);
    assert_eq!(plan.again.unwrap().as_secs(), 1);
    let plan = build(&done, &found(None, None), at(60));
    assert!(plan.is_expired);
    let mut kept = done.clone();
    kept.spec.ttl_seconds_after_finished = None;
    assert_eq!(build(&kept, &found(None, None), at(99_999)), Plan::default());
}
