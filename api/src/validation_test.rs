use serde_json::json;

use super::*;

fn guest() -> Value {
    json!({
        "metadata": {"name": "web"},
        "spec": {
            "nodeName": "a", "cpus": 1, "memory": "512Mi",
            "disks": [{"name": "root", "role": "Root", "source": "web.img"}],
            "networks": [{"bridge": "br0"}],
        }
    })
}

fn reboot(phase: &str) -> Value {
    json!({"metadata": {"name": "r"}, "spec": {"guestName": "web"}, "status": {"phase": phase}})
}

#[test]
fn what_may_change_in_a_guest_may_and_the_rest_may_not() {
    let old = guest();
    assert_eq!(validate_change(Kind::Guest, &old, &old), []);
    for (pointer, to, refused) in [
        ("/spec/cpus", json!(4), false),
        ("/spec/memory", json!("1Gi"), false),
        ("/spec/nodeName", json!("b"), true),
        ("/spec/disks/0/source", json!("other.img"), true),
        ("/spec/networks", json!([]), true),
    ] {
        let mut new = old.clone();
        *new.pointer_mut(pointer).unwrap() = to;
        let errors = validate_change(Kind::Guest, &old, &new);
        assert_eq!(!errors.is_empty(), refused, "{pointer}: {errors:?}");
    }
    let mut without_node = old.clone();
    without_node["spec"].as_object_mut().unwrap().remove("nodeName");
    assert_eq!(validate_change(Kind::Guest, &without_node, &old), []);
    assert_eq!(validate_change(Kind::Guest, &old, &without_node).len(), 1);
}

#[test]
fn a_reboot_cannot_be_changed_and_a_finished_one_does_not_run_again() {
    let old = reboot("Rebooting");
    let mut new = old.clone();
    new["spec"]["guestName"] = json!("other");
    let errors = validate_change(Kind::SeamlessReboot, &old, &new);
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].to_string().starts_with("spec: cannot be changed"),
        "{}",
        errors[0]
    );
    assert_eq!(validate_change(Kind::SeamlessReboot, &old, &reboot("Failed")), []);
    assert_eq!(
        validate_change(Kind::SeamlessReboot, &reboot("Failed"), &old).len(),
        1
    );
}

#[test]
fn only_the_action_of_a_reboot_may_change_and_a_rollback_says_what_it_costs() {
    let old = reboot("AwaitingCutover");
    for action in [
        json!({"type": "Proceed"}),
        json!({"type": "Abort"}),
        json!({"type": "Rollback", "changes": "Discard"}),
    ] {
        let mut new = old.clone();
        new["spec"]["action"] = action;
        assert_eq!(validate_change(Kind::SeamlessReboot, &old, &new), []);
        // Taken out again, as Git does it.
        assert_eq!(validate_change(Kind::SeamlessReboot, &new, &old), []);
        new["spec"]["reason"] = json!("another one");
        assert_eq!(validate_change(Kind::SeamlessReboot, &old, &new).len(), 1);
    }
    for (action, words) in [
        (json!({"type": "Rollback"}), "changes: Discard"),
        (
            json!({"type": "Proceed", "changes": "Discard"}),
            "changes: Discard",
        ),
        (json!({"type": "Rollback", "changes": "CarryBack"}), "Discard"),
        (json!({"type": "Continue"}), "Proceed"),
    ] {
        let mut new = old.clone();
        new["spec"]["action"] = action;
        let errors = validate_change(Kind::SeamlessReboot, &old, &new);
        assert_eq!(errors.len(), 1, "{errors:?}");
        let text = errors[0].to_string();
        assert!(text.starts_with("spec.action") && text.contains(words), "{text}");
    }
    let rolled_back = reboot("RolledBack");
    assert_eq!(
        validate_change(Kind::SeamlessReboot, &reboot("Succeeded"), &rolled_back),
        []
    );
    for phase in ["Failed", "Aborted"] {
        let errors = validate_change(Kind::SeamlessReboot, &reboot(phase), &rolled_back);
        assert_eq!(errors.len(), 1, "{phase}");
    }
}

#[test]
fn a_long_value_is_shown_shortened() {
    let mut bad = guest();
    bad["spec"]["cpus"] = json!("é".repeat(200));
    let text = validate(Kind::Guest, &bad)[0].to_string();
    assert!(text.contains('…') && text.len() < 250, "{text}");
}
