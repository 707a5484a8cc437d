use super::*;
use crate::store::Store;
use crate::testing::Bed;

fn reboot(store: &Store, name: &str) -> Option<SeamlessReboot> {
    store.get(&Key::new("default", name)).unwrap()
}

fn wait_for(bed: &Bed, name: &str, reason: &str) -> SeamlessReboot {
    bed.wait(&format!("{name}: {reason}"), |bed| {
        pass(&bed.node);
        reboot(&bed.store, name).filter(|reboot| {
            reboot.status.as_ref().and_then(|status| status.reason.as_deref()) == Some(reason)
        })
    })
}

#[test]
fn a_reboot_of_an_unknown_guest_fails_with_its_name_and_leaves_no_record() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    bed.apply(&Bed::reboot_manifest("kernel", "nosuch"));
    let status = wait_for(&bed, "kernel", reasons::GUEST_NOT_FOUND).status.unwrap();
    assert_eq!(status.phase, Some(Phase::Failed));
    let message = status.message.unwrap();
    assert!(
        message.contains("default/nosuch") && message.contains("spec.guestName"),
        "{message}"
    );
    bed.wait("the record to go", |bed| {
        bed.node.journal.load().unwrap().is_empty().then_some(())
    });
}

#[test]
fn a_second_reboot_of_a_guest_waits_for_the_first_by_name_and_then_has_its_turn() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    bed.apply(&Bed::reboot_manifest("first", "web"));
    // The guest does not run, so the first one waits in its preflight.
    wait_for(&bed, "first", reasons::PREFLIGHT_FAILED);
    bed.apply(&Bed::reboot_manifest("second", "web"));
    let status = wait_for(&bed, "second", reasons::GUEST_BUSY).status.unwrap();
    assert!(status.message.unwrap().contains("SeamlessReboot first"));

    // Deleting the first one aborts it.
    bed.store
        .delete::<SeamlessReboot>(&Key::new("default", "first"))
        .unwrap();
    bed.wait("the first to be gone", |bed| {
        pass(&bed.node);
        reboot(&bed.store, "first").is_none().then_some(())
    });
    wait_for(&bed, "second", reasons::PREFLIGHT_FAILED);
}

#[test]
fn an_operation_in_the_journal_is_taken_up_by_the_next_agent() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    bed.apply(&Bed::reboot_manifest("kernel", "nosuch"));
    let object = reboot(&bed.store, "kernel").unwrap();
    let operation = Operation::new(
        object.uid(),
        "default/kernel".into(),
        "default/nosuch".into(),
        Plan::from_spec(&object.spec).unwrap(),
        (Uuid::new_v4(), Uuid::new_v4()),
        host::moment(),
    );
    bed.node.journal.clone().write(&operation).unwrap();
    recover(&bed.node);
    bed.wait("the end of the operation", |bed| {
        reboot(&bed.store, "kernel")
            .and_then(|reboot| reboot.status?.phase)
            .filter(|phase| phase.is_terminal())
    });
    bed.wait("the record to go", |bed| {
        bed.node.journal.load().unwrap().is_empty().then_some(())
    });
}
