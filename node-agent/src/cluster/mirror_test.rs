use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use understudy_api::conditions::types;
use understudy_api::guest::{DeletionPolicy, GuestPhase};
use understudy_api::reboot::ActionType;
use understudy_api::{Guest, NodeUpdate, NodeUpdatePhase, Phase, SeamlessReboot, Time};

use super::*;
use crate::store::{Key, Mirrored as Change, Object, Store};

const NODE: &str = "node-uid";

fn facts(is_complete: bool, is_driven: bool) -> Facts<'static> {
    Facts {
        node_uid: NODE,
        is_complete,
        is_driven,
        is_released: false,
        now: Timestamp::UNIX_EPOCH,
    }
}

fn guest(uid: &str, node: &str) -> Guest {
    serde_json::from_value(json!({
        "apiVersion": "understudy.dev/v1alpha1", "kind": "Guest",
        "metadata": {
            "name": "web", "namespace": "shop", "uid": uid, "generation": 1, "resourceVersion": "7",
            "finalizers": ["understudy.dev/guest"], "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "memory": "512Mi", "deletionPolicy": "Delete", "nodeName": "alpha",
            "disks": [{"name": "root", "role": "Root", "source": "a.img"}],
        },
        "status": {"nodeName": "alpha", "nodeUID": node},
    }))
    .unwrap()
}

fn reboot(uid: &str, phase: Option<Phase>) -> SeamlessReboot {
    let mut reboot: SeamlessReboot = serde_json::from_value(json!({
        "apiVersion": "understudy.dev/v1alpha1", "kind": "SeamlessReboot",
        "metadata": {"name": "kernel", "namespace": "shop", "uid": uid, "generation": 1},
        "spec": {"guestName": "web"},
        "status": {"nodeName": "alpha", "nodeUID": NODE},
    }))
    .unwrap();
    reboot.status.get_or_insert_default().phase = phase;
    reboot
}

fn of_host(uid: &str, phase: NodeUpdatePhase) -> NodeUpdate {
    let mut update: NodeUpdate = serde_json::from_value(json!({
        "apiVersion": "understudy.dev/v1alpha1", "kind": "NodeUpdate",
        "metadata": {"name": "host-1", "uid": uid, "generation": 1},
        "spec": {"nodeName": "alpha", "origin": "Host"},
    }))
    .unwrap();
    update.status.get_or_insert_default().phase = Some(phase);
    update
}

fn written<O: std::fmt::Debug>(step: Step<O>) -> O {
    match step {
        Step::Write(object) => *object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_new_object_is_taken_with_its_uid_and_without_what_changes_at_every_write() {
    let remote = guest("u", NODE);
    let taken = written(step(None, Some(&remote), &facts(false, false)));
    assert_eq!(taken.uid(), "u");
    assert_eq!(taken.metadata.resource_version, None);
    assert_eq!(taken.metadata.finalizers, None);
    assert_eq!(step(Some(&taken), Some(&remote), &facts(true, false)), Step::Keep);
}

#[test]
fn an_object_of_another_node_of_our_name_is_not_ours() {
    let theirs = guest("u", "another-uid");
    assert_eq!(step(None, Some(&theirs), &facts(true, false)), Step::Keep);
    // One that was ours goes on, and is told of.
    let ours = guest("u", NODE);
    assert_eq!(
        step(Some(&ours), Some(&theirs), &facts(true, false)),
        Step::Orphan
    );
}

#[test]
fn of_a_known_object_the_spec_comes_in_and_our_status_stays() {
    let mut local = guest("u", NODE);
    local.status.as_mut().unwrap().phase = Some(GuestPhase::Running);
    let mut remote = guest("u", NODE);
    remote.spec.memory = "1Gi".into();
    remote.metadata.generation = Some(2);
    remote.metadata.labels = Some([("a".into(), "b".into())].into());
    let status = remote.status.as_mut().unwrap();
    status.phase = Some(GuestPhase::Pending);
    let accepted = |status: &str| understudy_api::Condition {
        type_: types::ACCEPTED.into(),
        status: status.into(),
        reason: "Assigned".into(),
        message: String::new(),
        observed_generation: None,
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
    };
    status.conditions = vec![accepted("True")];
    let merged = written(step(Some(&local), Some(&remote), &facts(true, false)));
    assert_eq!(merged.spec.memory, "1Gi");
    assert_eq!(merged.generation(), 2);
    assert!(merged.metadata.labels.is_some());
    assert_eq!(merged.status.as_ref().unwrap().phase, Some(GuestPhase::Running));
    assert!(merged.has(types::ACCEPTED));
    // What the operator takes back goes.
    remote.status.as_mut().unwrap().conditions = vec![accepted("False")];
    let merged = written(step(Some(&merged), Some(&remote), &facts(true, false)));
    assert!(!merged.has(types::ACCEPTED));
}

#[test]
fn an_action_comes_in_even_when_all_is_over_and_is_not_taken_back_by_taking_it_out() {
    let local = reboot("u", Some(Phase::Succeeded));
    let mut remote = local.clone();
    remote.metadata.generation = Some(2);
    remote.spec.action = Some(understudy_api::reboot::Action {
        kind: ActionType::Rollback,
        changes: Some(understudy_api::reboot::Changes::Discard),
    });
    let asked = written(step(Some(&local), Some(&remote), &facts(true, false)));
    assert_eq!(asked.spec.action, remote.spec.action);
    assert_eq!(asked.generation(), 2);
    // Git's next sync.
    remote.spec.action = None;
    remote.metadata.generation = Some(3);
    let kept = written(step(Some(&asked), Some(&remote), &facts(true, false)));
    assert_eq!(kept.spec.action, asked.spec.action);
    assert_eq!(kept.generation(), 3);
    assert_eq!(step(Some(&kept), Some(&remote), &facts(true, false)), Step::Keep);
}

#[test]
fn what_is_over_is_taken_as_it_is_and_what_was_begun_without_us_ends() {
    let done = reboot("u", Some(Phase::Succeeded));
    let taken = written(step(None, Some(&done), &facts(true, false)));
    assert_eq!(taken.status.unwrap().phase, Some(Phase::Succeeded));
    let begun = reboot("u", Some(Phase::Integrating));
    let taken = written(step(None, Some(&begun), &facts(true, false)));
    let status = taken.status.unwrap();
    assert_eq!(status.phase, Some(Phase::Failed));
    assert!(status.message.unwrap().contains("no record"));
    let waiting = reboot("u", Some(Phase::Pending));
    let taken = written(step(None, Some(&waiting), &facts(true, false)));
    assert_eq!(taken.status.unwrap().phase, Some(Phase::Pending));
}

#[test]
fn another_object_of_the_name_waits_until_the_one_before_is_gone_and_its_disks_stay() {
    let local = guest("old", NODE);
    let remote = guest("new", NODE);
    let displaced = written(step(Some(&local), Some(&remote), &facts(true, false)));
    assert_eq!(displaced.uid(), "old");
    assert!(displaced.is_deleting());
    assert_eq!(displaced.spec.deletion_policy, DeletionPolicy::Retain);
    assert_eq!(
        step(Some(&displaced), Some(&remote), &facts(true, false)),
        Step::Keep
    );
    assert_eq!(
        written(step(None, Some(&remote), &facts(true, false))).uid(),
        "new"
    );

    let over = reboot("old", Some(Phase::Failed));
    let next = reboot("new", None);
    assert_eq!(
        step(Some(&over), Some(&next), &facts(true, true)).uid(),
        Some("old".into())
    );
    assert_eq!(
        written(step(Some(&over), Some(&next), &facts(true, false))).uid(),
        "new"
    );
    let running = reboot("old", Some(Phase::Cloning));
    assert!(written(step(Some(&running), Some(&next), &facts(true, true))).is_deleting());
}

impl<O: Object> Step<O> {
    fn uid(&self) -> Option<String> {
        match self {
            Step::Write(object) => Some(object.uid()),
            _ => None,
        }
    }
}

#[test]
fn absence_ends_nothing_and_forgets_only_what_is_over() {
    let running = guest("u", NODE);
    assert_eq!(step(Some(&running), None, &facts(false, false)), Step::Keep);
    assert_eq!(step(Some(&running), None, &facts(true, false)), Step::Orphan);
    let in_flight = reboot("u", Some(Phase::Cloning));
    assert_eq!(step(Some(&in_flight), None, &facts(true, true)), Step::Orphan);
    let over = reboot("u", Some(Phase::Succeeded));
    assert_eq!(step(Some(&over), None, &facts(true, true)), Step::Keep);
    assert_eq!(step(Some(&over), None, &facts(false, false)), Step::Keep);
    assert_eq!(step(Some(&over), None, &facts(true, false)), Step::Forget);
}

#[test]
fn a_reboot_of_the_host_is_ours_whatever_uid_it_has_in_the_api_server() {
    let local = of_host("ours", NodeUpdatePhase::Resumed);
    // The operator has not made it yet.
    assert_eq!(step(Some(&local), None, &facts(true, false)), Step::Keep);
    let mut remote = of_host("theirs", NodeUpdatePhase::Pending);
    let noted = written(step(Some(&local), Some(&remote), &facts(true, false)));
    assert_eq!(noted.uid(), "ours");
    assert_eq!(
        noted.status.as_ref().unwrap().phase,
        Some(NodeUpdatePhase::Resumed)
    );
    assert_eq!(step(Some(&noted), Some(&remote), &facts(true, false)), Step::Keep);
    // Once it was there its absence says that nobody wants it any more.
    assert_eq!(step(Some(&noted), None, &facts(true, false)), Step::Forget);
    assert_eq!(step(Some(&noted), None, &facts(true, true)), Step::Keep);
    remote.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert!(written(step(Some(&noted), Some(&remote), &facts(true, false))).is_deleting());
    // Nothing is begun for one that only the API server has.
    assert_eq!(step(None, Some(&remote), &facts(true, false)), Step::Keep);
}

/// What happens in a history.
#[derive(Clone, Debug)]
enum Act {
    /// A user makes the object anew, where there is none.
    Create,
    /// A user changes the spec.
    Change(u8),
    /// A user deletes it: it has a finalizer.
    Delete,
    /// Somebody takes the finalizer away, and it is gone, whatever the agent thinks of that.
    Vanish,
    /// The watch tells the agent what is there now.
    Tell,
    /// The agent begins to read lists anew: it knows nothing for sure until it is told.
    Reconnect,
    /// One pass of the mirror.
    Mirror,
    /// One that is cut after its decision, before anything was written.
    Crash,
    /// The engine goes one step.
    Engine,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        Just(Act::Create),
        (0..4u8).prop_map(Act::Change),
        Just(Act::Delete),
        Just(Act::Vanish),
        Just(Act::Tell),
        Just(Act::Reconnect),
        Just(Act::Mirror),
        Just(Act::Crash),
        Just(Act::Engine),
    ];
    proptest::collection::vec(act, 0..60)
}

/// A world with one name in it: the API server, what the agent knows of it, its store, and an engine that drives
/// SeamlessReboots as the real ones do: to the end, or to Aborted where they are deleted.
struct World {
    store: Store,
    _dir: tempfile::TempDir,
    remote: Option<SeamlessReboot>,
    seen: Option<SeamlessReboot>,
    is_complete: bool,
    made: u32,
    /// UIDs that an engine has run, with how often it has begun.
    begun: BTreeMap<String, u32>,
    /// The one that runs.
    driven: Option<String>,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        World {
            store: Store::open(dir.path()).unwrap(),
            _dir: dir,
            remote: None,
            seen: None,
            is_complete: false,
            made: 0,
            begun: BTreeMap::new(),
            driven: None,
        }
    }

    fn key() -> Key {
        Key::new("shop", "kernel")
    }

    fn local(&self) -> Option<SeamlessReboot> {
        self.store.get(&World::key()).unwrap()
    }

    fn step(&self, local: Option<&SeamlessReboot>) -> Step<SeamlessReboot> {
        let is_driven = local.is_some_and(|local| self.driven == Some(local.uid()));
        step(local, self.seen.as_ref(), &facts(self.is_complete, is_driven))
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Create if self.remote.is_none() => {
                self.made += 1;
                self.remote = Some(reboot(&format!("uid-{}", self.made), None));
            }
            Act::Create => {}
            Act::Change(label) => {
                if let Some(remote) = &mut self.remote {
                    let labels = remote.metadata.labels.get_or_insert_default();
                    labels.insert("label".into(), label.to_string());
                }
            }
            Act::Delete => {
                if let Some(remote) = &mut self.remote {
                    remote.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
                }
            }
            Act::Vanish => self.remote = None,
            Act::Tell => {
                self.seen = self.remote.clone();
                self.is_complete = true;
            }
            Act::Reconnect => {
                self.seen = None;
                self.is_complete = false;
            }
            Act::Mirror => {
                self.store
                    .mirror::<SeamlessReboot>(&World::key(), |local| match self.step(local) {
                        Step::Keep | Step::Orphan => Change::Unchanged,
                        Step::Write(object) => Change::Object(object),
                        Step::Forget => Change::Gone,
                    })
                    .unwrap();
            }
            Act::Crash => {
                let _ = self.step(self.local().as_ref());
            }
            Act::Engine => self.engine(),
        }
        self.report();
    }

    fn engine(&mut self) {
        let Some(local) = self.local() else { return };
        let uid = local.uid();
        let phase = local.status.as_ref().and_then(|status| status.phase);
        let phase = phase.unwrap_or(Phase::Pending);
        let next = match (phase, &self.driven) {
            (phase, Some(driven)) if *driven == uid && phase.is_terminal() => {
                self.driven = None;
                return;
            }
            (phase, _) if phase.is_terminal() => return,
            (_, _) if local.is_deleting() => Phase::Aborted,
            (_, None) => {
                *self.begun.entry(uid.clone()).or_default() += 1;
                self.driven = Some(uid.clone());
                Phase::Cloning
            }
            _ => Phase::Succeeded,
        };
        self.store
            .update_status::<SeamlessReboot>(&World::key(), &uid, true, |status| status.phase = Some(next))
            .unwrap();
    }

    /// Statuses reach the API server at once; the operator lets go of what is over and deleted.
    fn report(&mut self) {
        let Some(local) = self.local() else { return };
        let Some(remote) = self.remote.as_mut().filter(|remote| remote.uid() == local.uid()) else {
            return;
        };
        let phase = local.status.as_ref().and_then(|status| status.phase);
        if phase.is_some() {
            remote.status.get_or_insert_default().phase = phase;
        }
        if remote.is_deleting() && remote.is_over() && self.driven.as_ref() != Some(&local.uid()) {
            self.remote = None;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any order of what users, the watch, the engine and crashes do ends in the same local object, nothing is run
    /// twice, and nothing that runs is lost sight of.
    #[test]
    fn every_history_ends_in_what_the_api_server_has(acts in acts()) {
        let mut world = World::new();
        for act in &acts {
            let before = world.local();
            world.act(act);
            let now = world.local();
            if let (Some(before), Some(driven)) = (&before, &world.driven)
                && before.uid() == *driven
            {
                prop_assert_eq!(now.map(|now| now.uid()), Some(before.uid()), "what runs is not replaced");
            } else if let (Some(before), None) = (&before, &now) {
                prop_assert!(before.is_over(), "{:?} was forgotten", before);
            }
        }
        // It settles: the watch tells, the mirror follows, the engine comes to its end.
        for _ in 0..10 {
            for act in [Act::Tell, Act::Mirror, Act::Engine] {
                world.act(&act);
            }
        }
        let (local, remote) = (world.local(), world.remote.clone());
        match (&local, &remote) {
            (None, None) => {}
            (Some(local), Some(remote)) => {
                prop_assert_eq!(local.uid(), remote.uid());
                prop_assert!(local.is_over());
                prop_assert_eq!(&local.metadata.labels, &remote.metadata.labels);
                prop_assert_eq!(&local.spec, &remote.spec);
            }
            other => prop_assert!(false, "{:?}", other),
        }
        prop_assert!(world.begun.values().all(|times| *times == 1), "{:?}", world.begun);
    }
}
