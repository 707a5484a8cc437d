use serde_json::{Value, json};
use understudy_api::Host;

use super::*;

fn update(status: Value, metadata: Value) -> NodeUpdate {
    let mut object = json!({"metadata": {"name": "kernel-1", "uid": "u"},
        "spec": {"nodeName": "a", "origin": "HostUpdate", "hostUpdate": {"name": "kernel", "uid": "h", "generation": 1},
            "sessions": {"credentialProvider": "operator"}},
        "status": status});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    serde_json::from_value(object).unwrap()
}

/// Node `a` with this UID; its agent speaks from this machine and boot.
fn place(node_uid: &str, machine: &str, boot: &str) -> Place {
    let node = serde_json::from_value(json!({"metadata": {"name": "a", "uid": node_uid}})).unwrap();
    let host: Host = serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {},
        "status": {"nodeUID": node_uid, "machineID": machine, "bootID": boot, "heartbeat": "2026-01-01T00:00:00Z"}}))
    .unwrap();
    Place::new("a", Some(&node), Some(&host), false)
}

fn request(boot: &str, key: &str) -> CredentialRequest {
    CredentialRequest {
        boot_id: boot.into(),
        public_key: key.into(),
    }
}

/// After the reboot: sessions were saved in boot `saving`.
fn saved() -> NodeUpdate {
    update(
        json!({"nodeUID": "1", "phase": "LoggingOn", "credential": {"publicKey": "k"},
            "result": {"before": {"bootID": "saving", "kernelRelease": "6"},
                "guests": [{"namespace": "d", "name": "web", "state": "Saved", "checkpoint": "c"}]}}),
        json!({}),
    )
}

fn kept(releases: &[(&str, &str)]) -> Kept {
    Kept {
        node_uid: "1".into(),
        machine_id: "m".into(),
        releases: releases.iter().map(|(boot, key)| request(boot, key)).collect(),
    }
}

fn refuses(verdict: &Verdict, words: &str) -> bool {
    matches!(verdict, Verdict::Refuse(message) if message.contains(words))
}

#[test]
fn it_is_released_once_to_each_boot_after_the_saving_one_on_the_node_and_machine_that_it_was_made_for() {
    let (there, boot) = (place("1", "m", "next"), request("next", "e"));
    let judge =
        |place: &Place, kept: &Kept, request: &CredentialRequest| judge(&saved(), place, kept, request);
    assert_eq!(judge(&there, &kept(&[]), &boot), Verdict::Release);
    assert_eq!(judge(&there, &kept(&[("next", "e")]), &boot), Verdict::Again);
    let other = judge(&there, &kept(&[("next", "another")]), &boot);
    assert!(refuses(&other, "released already, to another key"), "{other:?}");
    // The host went down again before its sessions had gone on.
    assert_eq!(
        judge(&there, &kept(&[("earlier", "another")]), &boot),
        Verdict::Release
    );
    let again = kept(&[("next", "e"), ("later", "f")]);
    assert!(refuses(
        &judge(&there, &again, &request("next", "g")),
        "another key"
    ));

    let saving = judge(&place("1", "m", "saving"), &kept(&[]), &request("saving", "e"));
    assert!(refuses(&saving, "after the host's reboot only"), "{saving:?}");
    let node = judge(&place("2", "m", "next"), &kept(&[]), &boot);
    assert!(refuses(&node, "another Node"), "{node:?}");
    let machine = judge(&place("1", "n", "next"), &kept(&[]), &boot);
    assert!(refuses(&machine, "another machine"), "{machine:?}");
    // Until the Host tells of the boot nothing is known of it.
    assert_eq!(
        judge(&place("1", "m", "saving"), &kept(&[]), &boot),
        Verdict::Wait
    );

    let boots: Vec<String> = (0..MOST_BOOTS).map(|boot| format!("boot-{boot}")).collect();
    let many: Vec<(&str, &str)> = boots.iter().map(|boot| (boot.as_str(), "e")).collect();
    assert!(refuses(&judge(&there, &kept(&many), &boot), "16 boots"));
}

#[test]
fn before_anything_was_saved_it_is_released_to_nobody() {
    let update = update(json!({"nodeUID": "1", "phase": "Pending"}), json!({}));
    let verdict = judge(
        &update,
        &place("1", "m", "next"),
        &kept(&[]),
        &request("next", "e"),
    );
    assert!(refuses(&verdict, "after the host's reboot only"), "{verdict:?}");
}

#[test]
fn it_is_made_before_the_agent_begins_and_a_request_is_answered_once() {
    let there = place("1", "m", "next");
    let new = update(json!({}), json!({}));
    assert_eq!(task(&new, &there, true), Task::Make);
    assert_eq!(task(&new, &there, false), Task::Nothing);
    let mut other = new.clone();
    other.spec.sessions.credential_provider = None;
    assert_eq!(task(&other, &there, true), Task::Nothing);

    let mut asked = saved();
    assert_eq!(task(&asked, &there, false), Task::Nothing);
    let status = asked.status.as_mut().unwrap();
    status.credential_request = Some(request("next", "e"));
    let credential = status.credential.clone().unwrap();
    assert_eq!(task(&asked, &there, false), Task::Answer(request("next", "e")));
    let release = |boot: &str, key: &str| understudy_api::node_update::CredentialRelease {
        boot_id: boot.into(),
        public_key: key.into(),
        sealed_credential: "s".into(),
        count: 1,
    };
    let with = |said: Said| {
        let mut update = asked.clone();
        update.status.as_mut().unwrap().credential = said.credential;
        update
    };
    let answered = with(released(&credential, release("next", "e")));
    assert_eq!(task(&answered, &there, false), Task::Nothing);
    let of_before = with(released(&credential, release("earlier", "d")));
    assert_eq!(
        task(&of_before, &there, false),
        Task::Answer(request("next", "e"))
    );
    let told = with(refused(&credential, &request("next", "e"), "no".into(), true));
    assert_eq!(task(&told, &there, false), Task::Nothing);
}

#[test]
fn it_is_destroyed_when_no_session_needs_it_and_not_before() {
    let there = place("1", "m", "next");
    let with = |phase: &str, state: &str, metadata: Value| {
        let mut status = json!(saved().status.unwrap());
        status["phase"] = json!(phase);
        status["result"]["guests"][0]["state"] = json!(state);
        update(status, metadata)
    };
    for (phase, state, wanted) in [
        ("LoggingOn", "Saved", Task::Nothing),
        ("Resuming", "Resumed", Task::Nothing),
        ("Resumed", "Resumed", Task::Destroy),
        ("Failed", "Kept", Task::Nothing),
        ("Failed", "Lost", Task::Destroy),
        ("Failed", "RunsOn", Task::Destroy),
        ("Aborted", "RunsOn", Task::Destroy),
        // Lost with its node, as far as anybody knows: it may come back.
        ("Failed", "Saved", Task::Nothing),
        ("Failed", "Waiting", Task::Nothing),
    ] {
        let update = with(phase, state, json!({}));
        assert_eq!(task(&update, &there, false), wanted, "{phase}, {state}");
        assert_eq!(is_needed(&update, &there), wanted == Task::Nothing);
    }
    let failed_early = update(json!({"phase": "Failed", "reason": "DrainTimedOut"}), json!({}));
    assert_eq!(task(&failed_early, &there, false), Task::Destroy);

    // Deleting the NodeUpdate takes no session's key away, but where its node is gone.
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
    let update = with("Failed", "Kept", deleted);
    assert_eq!(task(&update, &there, false), Task::Nothing);
    assert_eq!(
        task(&update, &Place::new("a", None, None, true), false),
        Task::Destroy
    );

    // An agent that had begun when its node was replaced may have gone on.
    let mut begun = with("Failed", "RunsOn", json!({}));
    begun.status.as_mut().unwrap().phase_transitions = serde_json::from_value(json!([
        {"phase": "Notified", "transitionTime": "2026-01-01T00:00:00Z"},
        {"phase": "Failed", "transitionTime": "2026-01-01T00:00:00Z"},
    ]))
    .unwrap();
    assert_eq!(task(&begun, &place("2", "m", "next"), false), Task::Nothing);
    assert_eq!(task(&begun, &there, false), Task::Destroy);

    // Once.
    let mut over = with("Resumed", "Resumed", json!({}));
    let said = destroyed(&over);
    assert_eq!(said.credential, over.status.as_ref().unwrap().credential);
    let condition = said.condition.wanted();
    understudy_api::conditions::set(
        &mut over.status.as_mut().unwrap().conditions,
        1,
        jiff::Timestamp::UNIX_EPOCH,
        &[condition],
    );
    assert_eq!(task(&over, &there, false), Task::Nothing);
    // Who asks for it then is told that it is gone.
    let late = request("later", "e");
    over.status.as_mut().unwrap().credential_request = Some(late.clone());
    assert_eq!(task(&over, &there, false), Task::Answer(late.clone()));
    let status = over.status.as_mut().unwrap();
    let before = status.credential.clone().unwrap();
    status.credential = refused(&before, &late, "gone".into(), false).credential;
    assert_eq!(task(&over, &there, false), Task::Nothing);
}
