use std::time::{Duration, Instant};

use serde_json::json;
use understudy_api::conditions::types;
use understudy_api::{Host, NodeUpdateSpec};

use super::*;
use crate::cluster::kinds::Mirrored as _;
use crate::testing::access;

fn open(dir: &Path) -> Cluster {
    Cluster::open(Store::open(dir).unwrap(), dir, &access()).unwrap()
}

fn put_guest(cluster: &Cluster) -> Guest {
    let guest: Guest = serde_json::from_value(json!({
        "apiVersion": "understudy.dev/v1alpha1", "kind": "Guest",
        "metadata": {"name": "web", "namespace": "default", "uid": "u", "deletionTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"memory": "64Mi", "disks": [{"name": "root", "role": "Root", "source": "a.img"}]},
    }))
    .unwrap();
    let mirrored = Mirrored::Object(Box::new(guest.clone()));
    cluster.store.mirror::<Guest>(&guest.key(), |_| mirrored).unwrap();
    guest
}

fn update(name: &str, origin: Origin) -> NodeUpdate {
    NodeUpdate::new(
        name,
        NodeUpdateSpec {
            node_name: "alpha".into(),
            origin,
            host_update: None,
            reason: None,
            drain: None,
            update: None,
            expect: None,
            reboot: Default::default(),
            sessions: Default::default(),
        },
    )
}

#[test]
fn a_guest_that_is_gone_is_remembered_as_released_by_the_next_agent_too() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = open(dir.path());
    let guest = put_guest(&cluster);
    cluster.guest_gone(&guest.key(), "another").unwrap();
    assert!(cluster.guest(&guest.key()).unwrap().is_some());
    cluster.guest_gone(&guest.key(), "u").unwrap();
    assert!(cluster.guest(&guest.key()).unwrap().is_none());
    let again = open(dir.path());
    assert!(again.released().has("u"));
    assert!(again.released().all()[0].has(types::RELEASED));
    // An agent that died before the object was gone does both again.
    put_guest(&again);
    again.guest_gone(&guest.key(), "u").unwrap();
    assert!(again.guest(&guest.key()).unwrap().is_none());
    again.released().forget("u").unwrap();
    assert!(!open(dir.path()).released().has("u"));
}

#[test]
fn only_a_reboot_that_the_host_has_begun_makes_a_node_update_here() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = open(dir.path());
    let of_update = update("kernel-1", Origin::HostUpdate);
    assert_eq!(cluster.make_node_update(&of_update).unwrap(), None);
    let made = cluster
        .make_node_update(&update("host-1", Origin::Host))
        .unwrap()
        .unwrap();
    assert!(!made.uid().is_empty());
    assert_eq!(cluster.node_updates().len(), 1);
    cluster.node_update_gone("host-1", &made.uid()).unwrap();
    assert_eq!(cluster.node_updates().len(), 0);
}

#[test]
fn what_is_not_assigned_is_told_in_the_host_and_kept_for_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = open(dir.path());
    let told = |cluster: &Cluster| {
        cluster.report_host("alpha", &mut |_| {}).unwrap();
        let host: Host = cluster.store.get(&Key::new("", "alpha")).unwrap().unwrap();
        let status = host.status.unwrap();
        assert_eq!(status.node_uid.as_deref(), Some("node-uid"));
        let mut conditions = status.conditions.into_iter();
        let condition = conditions.find(|there| there.type_ == types::ORPHANS).unwrap();
        (condition.status, condition.message)
    };
    assert_eq!(told(&cluster), ("False".into(), String::new()));
    let many = (0..12)
        .map(|number| format!("Guest default/g{number:02}"))
        .collect();
    cluster.set_orphans(many);
    let (status, message) = told(&cluster);
    assert_eq!(status, "True");
    assert!(
        message.contains("g09") && message.contains("2 more") && !message.contains("g10"),
        "{message}"
    );
    assert_eq!(orphans(dir.path()).unwrap().len(), 12);
    cluster.set_orphans(BTreeSet::new());
    assert!(orphans(dir.path()).unwrap().is_empty());
}

#[test]
fn a_change_wakes_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = open(dir.path());
    let seen = cluster.wait(u64::MAX, Duration::ZERO);
    cluster.set_node_uid("another");
    let began = Instant::now();
    assert_ne!(cluster.wait(seen, Duration::from_secs(60)), seen);
    assert!(began.elapsed() < Duration::from_secs(30));
    assert_eq!(cluster.node_uid(), "another");
}
