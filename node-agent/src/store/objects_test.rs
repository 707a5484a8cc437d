use understudy_api::guest::GuestPhase;
use understudy_api::manifest::{Manifest, parse};

use super::*;

fn guest(memory: &str, source: &str) -> Guest {
    let text = format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata:\n  name: web\nspec:\n  memory: {memory}\n  \
         disks:\n  - name: root\n    role: Root\n    source: {source}\n"
    );
    match parse(&text).unwrap().remove(0).unwrap() {
        Manifest::Guest(guest) => *guest,
        _ => unreachable!(),
    }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

#[test]
fn an_object_keeps_its_uid_and_status_when_it_is_applied_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = Key::new("default", "web");
    assert_eq!(
        store.apply(&guest("512Mi", "a.img"), at(1)).unwrap(),
        Applied::Created
    );
    let first: Guest = store.get(&key).unwrap().unwrap();
    assert!(Uuid::parse_str(&first.uid()).is_ok());
    store
        .update_status::<Guest>(&key, &first.uid(), true, |status| {
            status.phase = Some(GuestPhase::Running);
        })
        .unwrap();
    assert_eq!(
        store.apply(&guest("512Mi", "a.img"), at(2)).unwrap(),
        Applied::Unchanged
    );
    assert_eq!(
        store.apply(&guest("1Gi", "a.img"), at(3)).unwrap(),
        Applied::Configured
    );

    // As a restarted agent finds it.
    let again: Guest = Store::open(dir.path()).unwrap().get(&key).unwrap().unwrap();
    assert_eq!(again.uid(), first.uid());
    assert_eq!(again.generation(), 2);
    assert_eq!(again.spec.memory, "1Gi");
    assert_eq!(again.status.unwrap().phase, Some(GuestPhase::Running));
}

#[test]
fn what_may_not_change_is_refused_by_name_and_nothing_else_happens() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.apply(&guest("512Mi", "a.img"), at(1)).unwrap();
    let error = store
        .apply(&guest("512Mi", "b.img"), at(2))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("default/web") && error.contains("spec.disks"),
        "{error}"
    );
    let there: Guest = store.get(&Key::new("default", "web")).unwrap().unwrap();
    assert_eq!(there.spec.disks[0].source, "a.img");
}

#[test]
fn a_deleted_object_comes_back_only_with_a_manifest_that_was_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = Key::new("default", "web");
    store.apply(&guest("512Mi", "a.img"), at(1)).unwrap();
    store.delete::<Guest>(&key).unwrap();
    let there: Guest = store.get(&key).unwrap().unwrap();
    assert!(there.is_deleting());
    assert!(matches!(
        store.apply(&guest("512Mi", "a.img"), at(2)),
        Err(StoreError::Deleting { .. })
    ));
    store.remove::<Guest>(&key, &there.uid()).unwrap();
    assert_eq!(
        store.apply(&guest("512Mi", "a.img"), at(2)).unwrap(),
        Applied::Deleted
    );
    let later = Timestamp::now() + jiff::SignedDuration::from_secs(5);
    assert_eq!(
        store.apply(&guest("512Mi", "a.img"), later).unwrap(),
        Applied::Created
    );
    assert!(matches!(
        store.delete::<Guest>(&Key::new("default", "other")),
        Err(StoreError::NotFound { .. })
    ));
}

#[test]
fn a_damaged_file_hides_no_other_object() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.apply(&guest("512Mi", "a.img"), at(1)).unwrap();
    fs::write(dir.path().join("objects/guests/default/bad.json"), "{").unwrap();
    assert_eq!(store.list::<Guest>().len(), 1);
}

#[test]
fn an_object_of_the_cluster_has_no_namespace_and_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let text = "apiVersion: understudy.dev/v1alpha1\nkind: HostUpdate\nmetadata: {name: kernel}\nspec: {}\n";
    let Manifest::HostUpdate(update) = parse(text).unwrap().remove(0).unwrap() else {
        panic!("not a HostUpdate");
    };
    assert_eq!(store.apply(&*update, at(1)).unwrap(), Applied::Created);
    let listed = store.list::<HostUpdate>();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].metadata.namespace, None);
    assert_eq!(listed[0].key().to_string(), "kernel");
    assert_eq!(
        store.get::<HostUpdate>(&listed[0].key()).unwrap().as_ref(),
        listed.first()
    );
}
