use serde_json::json;

use super::*;

fn meta(entries: Value) -> ObjectMeta {
    serde_json::from_value(
        json!({"name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "9",
        "managedFields": entries}),
    )
    .unwrap()
}

fn entry(manager: &str, status: Value) -> Value {
    json!({"manager": manager, "operation": "Apply", "subresource": "status", "apiVersion": "v", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:status": status}})
}

#[test]
fn the_assignment_and_the_operators_conditions_are_not_ours() {
    let status = json!({
        "phase": "Pending", "nodeName": "alpha", "nodeUID": "n",
        "conditions": [{"type": "Ready"}, {"type": "Accepted"}, {"type": "Drained"}, {"type": "AgentConnected"}],
    });
    let part = agents_part(Some(status));
    assert_eq!(
        part,
        json!({"phase": "Pending", "conditions": [{"type": "AgentConnected"}, {"type": "Ready"}]})
    );
    let none = agents_part(Some(json!({"conditions": [{"type": "Accepted"}]})));
    assert_eq!(none, json!({}));
    assert_eq!(none, agents_part(None));
}

#[test]
fn the_first_write_claims_until_the_operator_has_let_go_and_then_nobody_forces() {
    let assignment = json!({"f:nodeName": {}, "f:nodeUID": {}, "f:conditions": {
        ".": {}, "k:{\"type\":\"Accepted\"}": {".": {}}, "k:{\"type\":\"AgentAvailable\"}": {".": {}}}});
    let with_phase = json!({"f:nodeName": {}, "f:phase": {}});
    let with_ready = json!({"f:conditions": {"k:{\"type\":\"Ready\"}": {}}});
    let ours = entry(AGENT, json!({"f:phase": {}}));
    let operators = |fields: &Value| entry("understudy-operator", fields.clone());
    for (entries, is_made, is_whole) in [
        (json!([]), false, true),
        (json!([operators(&with_phase)]), false, false),
        (json!([operators(&with_phase), ours]), true, false),
        (json!([operators(&with_ready), ours]), true, false),
        (json!([operators(&assignment), ours]), true, true),
        (
            json!([ours, entry("kubectl-edit", with_phase.clone())]),
            true,
            true,
        ),
        // It owns something yet, and the phase was taken from it.
        (json!([entry(AGENT, json!({"f:addresses": {}}))]), false, true),
    ] {
        let claim = claim(&meta(entries.clone()), "phase");
        assert_eq!(claim, Claim { is_made, is_whole }, "{entries}");
        assert_eq!(claim.forces(), !(is_made && is_whole));
    }
}

const OURS: Claim = Claim {
    is_made: true,
    is_whole: true,
};
const NOT_YET: Claim = Claim {
    is_made: false,
    is_whole: false,
};

#[test]
fn a_phase_is_written_at_once_and_progress_now_and_then_and_the_same_never() {
    let now = Instant::now();
    let later = |seconds| now + Duration::from_secs(seconds);
    let mut attempts = Attempts::default();
    let cloning = |files: u32| json!({"phase": "Cloning", "progress": {"files": files}});
    let due = |wanted: &Value, there: &Value, attempts: &Attempts, now| {
        super::due(wanted, there, OURS, attempts, PROGRESS, now)
    };
    assert_eq!(due(&cloning(1), &cloning(0), &attempts, now), Due::Now);
    attempts.take(&Answer::Written, now);
    assert_eq!(due(&cloning(1), &cloning(1), &attempts, now), Due::Never);
    assert_eq!(
        due(&cloning(2), &cloning(1), &attempts, later(1)),
        Due::At(later(5))
    );
    assert_eq!(due(&cloning(2), &cloning(1), &attempts, later(5)), Due::Now);
    let next = json!({"phase": "Rebooting"});
    assert_eq!(due(&next, &cloning(1), &attempts, later(1)), Due::Now);
    let ready = |status: &str| json!({"phase": "Running", "conditions": [{"type": "Ready", "status": status, "message": status}]});
    assert_eq!(
        due(&ready("True"), &ready("False"), &attempts, later(1)),
        Due::Now
    );
    // What is there already is written to claim it; not again and again where that should not help.
    let claim =
        |attempts: &Attempts, now| super::due(&cloning(1), &cloning(1), NOT_YET, attempts, PROGRESS, now);
    assert_eq!(claim(&Attempts::default(), now), Due::Now);
    assert_eq!(claim(&attempts, later(1)), Due::At(later(5)));
    let shared = Claim {
        is_made: true,
        is_whole: false,
    };
    let same = super::due(&cloning(1), &cloning(1), shared, &attempts, PROGRESS, later(9));
    assert_eq!(same, Due::Never, "it is the operator's turn to let go");
}

#[test]
fn what_is_refused_is_told_once_and_tried_again_ever_more_seldom() {
    let now = Instant::now();
    let mut attempts = Attempts::default();
    let refused = Answer::Refused("status.phase: Invalid value".into());
    let pause = |attempts: &Attempts| match due(&json!(1), &json!(2), OURS, attempts, PROGRESS, now) {
        Due::At(then) => then - now,
        other => panic!("{other:?}"),
    };
    assert!(attempts.take(&refused, now).is_some());
    let first = pause(&attempts);
    assert_eq!(attempts.take(&refused, now), None);
    assert!(pause(&attempts) > first);
    for _ in 0..40 {
        assert_eq!(attempts.take(&refused, now), None);
    }
    assert_eq!(pause(&attempts), Duration::from_secs(300));
    attempts.take(&Answer::Written, now);
    assert!(
        attempts.take(&refused, now).is_some(),
        "a new trouble is told anew"
    );
}

#[test]
fn a_conflict_is_looked_at_again_soon_and_told_when_it_stays() {
    let now = Instant::now();
    let mut attempts = Attempts::default();
    let conflict = Answer::Conflict("the object has been modified".into());
    assert_eq!(attempts.take(&conflict, now), None);
    assert!(matches!(
        due(&json!(1), &json!(2), OURS, &attempts, PROGRESS, now),
        Due::At(then) if then - now < Duration::from_secs(1)
    ));
    assert!(attempts.take(&conflict, now).is_some());
    assert_eq!(attempts.take(&conflict, now), None);
}

#[test]
fn a_write_names_the_uid_and_where_it_decides_the_version() {
    let meta = meta(json!([]));
    let target = Target {
        api_version: "v",
        kind: "Guest",
        meta: &meta,
    };
    let claim = write(target, json!({"phase": "Pending"}), true, false);
    assert!(claim.params.force);
    assert_eq!(claim.params.field_manager.as_deref(), Some(AGENT));
    assert_eq!(
        claim.body["metadata"],
        json!({"name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "9"})
    );
    let progress = write(target, json!({}), false, false);
    assert!(!progress.params.force);
    assert_eq!(progress.body["metadata"]["resourceVersion"], Value::Null);
    assert_eq!(
        write(target, json!({}), false, true).body["metadata"]["resourceVersion"],
        "9"
    );
}

#[test]
fn an_event_that_was_on_its_way_does_not_undo_an_answer() {
    let at = |uid: &str, version: &str| ObjectMeta {
        uid: Some(uid.into()),
        resource_version: Some(version.into()),
        ..ObjectMeta::default()
    };
    assert!(is_older(&at("u", "9"), &at("u", "10")));
    assert!(!is_older(&at("u", "10"), &at("u", "10")));
    assert!(!is_older(&at("new", "9"), &at("u", "10")));
}
