use std::collections::BTreeSet;

use super::*;
use crate::testing::Bed;

const FAILING: &str = "#!/bin/sh\necho 'error: /boot holds no kernel' >&2\nexit 1\n";

fn run(bed: &Bed, name: &str) {
    spawn(bed.node.clone(), Key::new("default", name)).unwrap();
}

#[test]
fn a_guest_whose_vmm_does_not_start_says_why_in_the_vmms_words() {
    let bed = Bed::new(FAILING);
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    run(&bed, "web");
    let message = bed.ready_message("web", reasons::START_FAILED);
    assert!(message.contains("/boot holds no kernel"), "{message}");
}

#[test]
fn a_guest_without_its_disk_names_the_file_and_starts_trying_when_it_is_there() {
    let bed = Bed::new(FAILING);
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    run(&bed, "web");
    let message = bed.ready_message("web", reasons::INVALID_SPEC);
    assert!(
        message.contains("spec.disks[0].source") && message.contains("default/web.img"),
        "{message}"
    );
    bed.disk("web.img");
    bed.ready_message("web", reasons::START_FAILED);
}

#[test]
fn of_two_guests_on_one_disk_the_second_is_refused_with_the_name_of_the_first() {
    let bed = Bed::new(FAILING);
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("first", "web.img"));
    bed.apply(&Bed::guest_manifest("second", "web.img"));
    run(&bed, "second");
    run(&bed, "first");
    let message = bed.ready_message("second", reasons::DISK_IN_USE);
    assert!(
        message.contains("default/first") && message.contains("web.img"),
        "{message}"
    );
    bed.ready_message("first", reasons::START_FAILED);
}

#[test]
fn a_guest_that_is_not_assigned_to_the_node_any_more_is_parked_until_it_is_again() {
    let (bed, cluster) = Bed::of_cluster(FAILING);
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    cluster.set_orphans(BTreeSet::from(["Guest default/web".to_owned()]));
    run(&bed, "web");
    let message = bed.ready_message("web", reasons::NOT_ASSIGNED);
    assert!(
        message.contains("disks are kept") && message.contains("delete guest web -n default"),
        "{message}"
    );
    // Told by the one who lists, not found out by the next look in some seconds.
    cluster.set_orphans(BTreeSet::new());
    bed.ready_message("web", reasons::START_FAILED);
}

#[test]
fn a_deleted_guest_leaves_its_disk_unless_told_otherwise() {
    let bed = Bed::new(FAILING);
    for (name, policy, stays) in [("kept", "Retain", true), ("gone", "Delete", false)] {
        let disk = bed.disk(&format!("{name}.img"));
        let manifest = Bed::guest_manifest(name, &format!("{name}.img"));
        bed.apply(&format!("{manifest}  deletionPolicy: {policy}\n"));
        run(&bed, name);
        bed.ready_message(name, reasons::START_FAILED);
        bed.store.delete::<Guest>(&Key::new("default", name)).unwrap();
        bed.wait("the guest to be gone", |bed| {
            let guest = bed.store.get::<Guest>(&Key::new("default", name)).unwrap();
            guest.is_none().then_some(())
        });
        assert_eq!(disk.exists(), stays, "{name}");
        assert_eq!(state_dir(&disk).exists(), stays, "{name}");
    }
    assert!(bed.node.instances.guests().is_empty());
}

#[test]
fn a_guest_with_an_unused_session_is_not_booted_whoever_made_it_until_the_session_is_discarded() {
    let bed = Bed::new(FAILING);
    let (guest, instance) = bed.running_guest();
    // No update knows of it: its record was lost, say.
    let record = bed.saved_session(&guest, &instance);
    run(&bed, "web");
    let message = bed.ready_message("web", "SessionSaved");
    assert!(
        message.contains("discard-session default/web --yes") && message.contains("kernel-1"),
        "{message}"
    );
    assert!(!instance.log.exists(), "no VMM was started");
    let sessions = &bed.node.sessions.records;
    sessions
        .ask_to_discard(&guest.uid(), record.identity.checkpoint)
        .unwrap();
    bed.ready_message("web", reasons::START_FAILED);
    assert!(sessions.of(&guest.uid()).unwrap().is_empty());
}
