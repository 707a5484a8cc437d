use understudy_api::Host;
use understudy_api::host_update::{HostUpdateAction, HostUpdateActionKind, HostUpdateStatus};

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap()
}

fn update(spec: Value) -> HostUpdate {
    serde_json::from_value(
        json!({"metadata": {"name": "kernel", "uid": "h", "generation": 1, "finalizers": [FINALIZER]},
        "spec": spec}),
    )
    .unwrap()
}

fn expects() -> Value {
    json!({"expect": {"kernelRelease": "6.1.0-56"}})
}

fn place(name: &str, kernel: &str, silent: bool) -> Place {
    let node = serde_json::from_value(json!({"metadata": {"name": name, "uid": format!("uid-{name}")},
        "status": {"nodeInfo": {"kernelVersion": kernel, "bootID": "", "architecture": "", "containerRuntimeVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""}}}))
    .unwrap();
    let host: Host = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {},
        "status": {"nodeUID": format!("uid-{name}"), "heartbeat": "2026-01-01T00:00:00Z"}}))
    .unwrap();
    Place::new(name, Some(&node), Some(&host), silent)
}

/// The rollout, played: what is applied is seen in the next pass.
struct Play {
    update: HostUpdate,
    found: Found,
}

impl Play {
    fn new(spec: Value, nodes: &[&str]) -> Play {
        Play {
            update: update(spec),
            found: Found {
                places: nodes.iter().map(|name| place(name, "6.1.0-47", false)).collect(),
                passes: Vec::new(),
                blocked: BTreeMap::new(),
            },
        }
    }

    fn step(&mut self, now: Timestamp) -> Plan {
        let mut plan = build(&self.update, &self.found, now);
        let status = plan.status.clone().unwrap().fields;
        self.update.status = Some(serde_json::from_value(Value::Object(status)).unwrap());
        if !plan.picks {
            let made = plan.make.drain(..).map(Arc::new);
            self.found.passes.extend(made);
        }
        plan
    }

    fn settle(&mut self, now: Timestamp) -> HostUpdateStatus {
        for _ in 0..5 {
            self.step(now);
        }
        self.update.status.clone().unwrap()
    }

    fn passes(&self) -> Vec<&str> {
        let mut nodes: Vec<&str> = self
            .found
            .passes
            .iter()
            .map(|pass| pass.spec.node_name.as_str())
            .collect();
        nodes.sort_unstable();
        nodes
    }

    fn set(&mut self, node: &str, phase: NodeUpdatePhase, since: i64) {
        for pass in &mut self.found.passes {
            if pass.spec.node_name == node {
                let mut changed = NodeUpdate::clone(pass);
                changed.status = Some(
                    serde_json::from_value(json!({"phase": phase, "reason": "Because",
                        "phaseTransitions": [{"phase": phase, "transitionTime": at(since).to_string()}]}))
                    .unwrap(),
                );
                *pass = Arc::new(changed);
            }
        }
    }

    fn set_place(&mut self, place: Place) {
        for there in &mut self.found.places {
            if there.name == place.name {
                *there = place.clone();
            }
        }
    }
}

fn condition(status: &HostUpdateStatus, kind: &str) -> String {
    let there = status
        .conditions
        .iter()
        .find(|there| there.type_ == kind)
        .unwrap();
    format!("{} {}", there.status, there.reason)
}

#[test]
fn a_pick_is_in_the_status_before_its_node_update_is_made() {
    let mut play = Play::new(expects(), &["a", "b"]);
    let first = play.step(at(0));
    assert!(first.picks && first.make.is_empty());
    assert!(first.status.as_ref().unwrap().exact, "by compare and swap");
    let name = play.update.status.as_ref().unwrap().nodes[0].node_update.clone();
    let second = play.step(at(0));
    assert!(!second.picks);
    assert_eq!(play.passes(), ["a"]);
    assert_eq!(Some(play.found.passes[0].name_any()), name);
    let owner = &play.found.passes[0].owner_references()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("HostUpdate", "h"));
}

#[test]
fn one_after_the_other_and_nodes_that_are_as_they_shall_be_are_left_alone() {
    let mut play = Play::new(expects(), &["a", "b", "c"]);
    play.set_place(place("b", "6.1.0-56", false));
    let status = play.settle(at(0));
    assert_eq!(play.passes(), ["a"]);
    assert_eq!((status.selected, status.updated, status.underway), (3, 1, 1));
    assert_eq!(status.nodes[2].reason.as_deref(), Some("MaxUnavailable"));
    assert_eq!(condition(&status, "Reconciling"), "True InProgress");
    play.set("a", NodeUpdatePhase::Resumed, 10);
    play.set_place(place("a", "6.1.0-56", false));
    play.settle(at(10));
    assert_eq!(play.passes(), ["a", "c"]);
    play.set("c", NodeUpdatePhase::Resumed, 20);
    play.set_place(place("c", "6.1.0-56", false));
    let status = play.settle(at(20));
    assert_eq!(condition(&status, "Ready"), "True AlreadySatisfied");
    assert_eq!((status.updated, status.underway), (3, 0));
    // Nothing more is written.
    let before = play.update.status.clone();
    play.step(at(999));
    assert_eq!(play.update.status, before);
}

#[test]
fn never_more_than_max_unavailable_whatever_is_seen_late() {
    let mut play = Play::new(json!({"maxUnavailable": 2}), &["a", "b", "c", "d"]);
    for _ in 0..6 {
        play.step(at(0));
        let status = play.update.status.clone().unwrap();
        assert!(status.underway <= 2);
    }
    assert_eq!(play.passes(), ["a", "b"]);
    // Picked, and the NodeUpdates are not seen yet, as by a new leader: the picks hold, and the same are made.
    let mut early = Play::new(json!({"maxUnavailable": 2}), &["a", "b", "c", "d"]);
    assert!(early.step(at(0)).picks);
    let names = |plan: &Plan| plan.make.iter().map(ResourceExt::name_any).collect::<Vec<_>>();
    let first = build(&early.update, &early.found, at(1));
    let second = build(&early.update, &early.found, at(2));
    assert!(!first.picks && !second.picks);
    assert_eq!(first.make.len(), 2);
    assert_eq!(names(&first), names(&second));
    let mut half = Play::new(json!({"maxUnavailable": "50%"}), &["a", "b", "c", "d"]);
    half.settle(at(0));
    assert_eq!(half.passes(), ["a", "b"]);
}

#[test]
fn a_failure_stops_the_rollout_unless_more_are_allowed() {
    for (allowed, begun) in [(0, vec!["a"]), (1, vec!["a", "b"])] {
        let mut play = Play::new(json!({"maxFailures": allowed}), &["a", "b", "c"]);
        play.settle(at(0));
        play.set("a", NodeUpdatePhase::Failed, 5);
        let status = play.settle(at(5));
        assert_eq!(play.passes(), begun);
        assert_eq!(status.failed, 1);
        if allowed == 0 {
            assert_eq!(condition(&status, "Stalled"), "True NodesFailed");
            assert_eq!(status.nodes[1].reason.as_deref(), Some("NodesFailed"));
        }
    }
}

#[test]
fn a_node_that_does_not_come_back_stops_the_rollout_until_it_is_back() {
    let mut play = Play::new(
        json!({"maxUnavailable": 2, "returnTimeout": "10m"}),
        &["a", "b", "c"],
    );
    play.settle(at(0));
    play.set("b", NodeUpdatePhase::Resumed, 50);
    play.set("a", NodeUpdatePhase::Rebooting, 100);
    play.set_place(place("a", "6.1.0-47", true));
    // In time still, and looked at again when it is not.
    let plan = build(&play.update, &play.found, at(699));
    assert_eq!(plan.again.unwrap().as_secs(), 1);
    let late = build(&play.update, &play.found, at(700));
    let status: HostUpdateStatus =
        serde_json::from_value(Value::Object(late.status.unwrap().fields)).unwrap();
    assert_eq!(status.nodes[0].reason.as_deref(), Some("HostNotBack"));
    assert_eq!(condition(&status, "Stalled"), "True NodesFailed");
    assert!(!late.picks, "the third is not begun although one may be");
    assert_eq!(late.notes[0].reason, "HostNotBack");
    play.set_place(place("a", "6.1.0-47", false));
    assert!(build(&play.update, &play.found, at(800)).picks);
}

#[test]
fn a_pass_of_which_only_the_end_was_told_is_over_as_any_other() {
    let mut play = Play::new(json!({}), &["a"]);
    play.settle(at(0));
    play.set("a", NodeUpdatePhase::Saving, 1);
    play.settle(at(1));
    play.set("a", NodeUpdatePhase::Resumed, 100);
    let status = play.settle(at(100));
    assert_eq!(status.nodes[0].phase, Some(NodeUpdatePhase::Resumed));
    // Its NodeUpdate may go: it was updated.
    play.found.passes.clear();
    assert!(play.settle(at(101)).nodes[0].satisfied);
}

#[test]
fn a_node_is_unavailable_until_its_kubelet_is_back_as_well() {
    for spec in [json!({}), expects()] {
        let mut play = Play::new(spec, &["a", "b"]);
        play.settle(at(0));
        assert_eq!(play.passes(), ["a"]);
        let told = |play: &mut Play, kernel: &str, boot: &str, ready: bool| {
            let mut place = place("a", kernel, false);
            let node = place.node.as_mut().unwrap();
            (node.boot_id, node.is_unready) = (boot.to_owned(), !ready);
            play.set_place(place);
        };
        let row = |play: &mut Play, now: i64| {
            let node = play.settle(at(now)).nodes[0].clone();
            (node.satisfied, node.reason.unwrap())
        };
        let waits = (false, "NodeNotReady".to_owned());
        let is_over = (true, "AlreadySatisfied".to_owned());
        // The agent tells of the end first: the kubelet's word is that of before.
        told(&mut play, "6.1.0-47", "old", true);
        play.set("a", NodeUpdatePhase::Resumed, 10);
        let pass = NodeUpdate::clone(&play.found.passes[0]);
        let mut resumed = pass;
        resumed.status.as_mut().unwrap().result = serde_json::from_value(json!({
            "before": {"bootID": "old", "kernelRelease": "6.1.0-47"},
            "after": {"bootID": "new", "kernelRelease": "6.1.0-56"}}))
        .unwrap();
        play.found.passes[0] = Arc::new(resumed);
        assert_eq!(row(&mut play, 11), waits);
        assert_eq!(play.passes(), ["a"], "maxUnavailable is 1");
        told(&mut play, "6.1.0-56", "new", false);
        assert_eq!(row(&mut play, 12), waits);
        assert_eq!(
            play.step(at(12)).again,
            Some(Duration::from_millis(898_050)),
            "returnTimeout"
        );
        assert_eq!(row(&mut play, 911), (false, "HostNotBack".to_owned()));
        told(&mut play, "6.1.0-56", "new", true);
        assert_eq!(row(&mut play, 912), is_over);
        assert_eq!(play.passes(), ["a", "b"]);
        // What becomes of the Node afterwards is not the rollout's.
        told(&mut play, "6.1.0-56", "new", false);
        assert_eq!(row(&mut play, 913), is_over);
    }
}

#[test]
fn paused_begins_nothing_and_abort_takes_back_what_is_not_rebooting() {
    let mut play = Play::new(json!({"maxUnavailable": 2}), &["a", "b", "c"]);
    play.update.spec.paused = true;
    let status = play.settle(at(0));
    assert!(play.passes().is_empty());
    assert_eq!(condition(&status, "Ready"), "False Paused");
    play.update.spec.paused = false;
    play.settle(at(1));
    assert_eq!(play.passes(), ["a", "b"]);
    play.set("a", NodeUpdatePhase::Saving, 2);
    play.set("b", NodeUpdatePhase::Rebooting, 2);
    play.update.spec.action = Some(HostUpdateAction {
        kind: HostUpdateActionKind::Abort,
    });
    let plan = build(&play.update, &play.found, at(3));
    let deleted: Vec<_> = plan
        .delete
        .iter()
        .map(|pass| pass.spec.node_name.as_str())
        .collect();
    assert_eq!(deleted, ["a"]);
    assert!(!plan.picks);
    assert!(plan.status.unwrap().fields["aborted"].is_object(), "it is noted");
}

#[test]
fn a_deleted_host_update_stays_until_none_of_its_nodes_is_cordoned() {
    let mut play = Play::new(json!({}), &["a"]);
    play.settle(at(0));
    let held = |play: &mut Play, finalizers: Value| {
        for pass in &mut play.found.passes {
            let mut changed = NodeUpdate::clone(pass);
            changed.metadata.finalizers = serde_json::from_value(finalizers.clone()).unwrap();
            *pass = Arc::new(changed);
        }
    };
    held(&mut play, json!([node_update::FINALIZER]));
    play.update.metadata.deletion_timestamp = Some(understudy_api::Time(at(1)));
    let plan = build(&play.update, &play.found, at(1));
    assert!(plan.is_kept);
    assert_eq!(plan.delete.len(), 1);
    play.set("a", NodeUpdatePhase::Aborted, 2);
    assert!(
        build(&play.update, &play.found, at(2)).is_kept,
        "its node is cordoned still"
    );
    held(&mut play, json!([]));
    assert!(!build(&play.update, &play.found, at(3)).is_kept);
}

#[test]
fn a_node_update_that_was_deleted_by_hand_is_not_made_again_for_the_same_generation() {
    let mut play = Play::new(json!({}), &["a"]);
    play.settle(at(0));
    play.set("a", NodeUpdatePhase::Saving, 1);
    play.settle(at(1));
    play.found.passes.clear();
    let status = play.settle(at(2));
    assert_eq!(status.nodes[0].reason.as_deref(), Some("NodeUpdateGone"));
    assert!(play.passes().is_empty());
    play.update.metadata.generation = Some(2);
    play.settle(at(3));
    assert_eq!(play.passes(), ["a"]);
}

#[test]
fn an_agent_that_is_away_is_not_picked_and_says_so() {
    let mut play = Play::new(json!({}), &["a", "b"]);
    play.set_place(place("a", "6.1.0-47", true));
    let status = play.settle(at(0));
    assert_eq!(play.passes(), ["b"]);
    assert_eq!(status.nodes[0].reason.as_deref(), Some("AgentSilent"));
}

#[test]
fn a_closed_window_and_a_blocked_node_say_so_and_are_looked_at_in_time() {
    // The 1st of January 2026, midnight UTC.
    let mut play = Play::new(
        json!({"window": {"start": "22:00", "end": "04:00"}, "maxUnavailable": 2}),
        &["a", "b"],
    );
    play.found.blocked.insert(
        "a".to_owned(),
        "blocker backups: Pod ops/one runs on it".to_owned(),
    );
    let noon = at(12 * 3600);
    let plan = build(&play.update, &play.found, noon);
    assert!(!plan.picks);
    assert_eq!(plan.again.unwrap().as_secs(), 10 * 3600);
    let status = play.settle(noon);
    assert_eq!(status.nodes[0].reason.as_deref(), Some("WindowClosed"));
    let status = play.settle(at(22 * 3600));
    assert_eq!(play.passes(), ["b"]);
    assert_eq!(status.nodes[0].reason.as_deref(), Some("Blocked"));
    assert!(build(&play.update, &play.found, at(22 * 3600)).again.unwrap() <= LOOK);
    play.found.blocked.clear();
    play.settle(at(23 * 3600));
    assert_eq!(play.passes(), ["a", "b"]);
}
