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

#[test]
fn a_reboot_that_has_changed_nothing_is_suspended_for_the_host_and_goes_on_afterwards() {
    use crate::host_effects::HostWorld;
    use crate::host_update::quiesce::Rules;
    use crate::host_update::{self, Effects, Update};

    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    bed.apply(&Bed::reboot_manifest("kernel", "web"));
    // The guest does not run, so it waits in its preflight.
    wait_for(&bed, "kernel", reasons::PREFLIGHT_FAILED);

    let spec = understudy_api::NodeUpdateSpec {
        node_name: "alpha".into(),
        origin: understudy_api::node_update::Origin::Host,
        host_update: None,
        reason: None,
        drain: None,
        update: None,
        expect: None,
        reboot: Default::default(),
        sessions: Default::default(),
    };
    let plan = host_update::Plan::from_spec(&spec).unwrap();
    let mut update = Update::new("uid".into(), "host-1".into(), plan, host::moment());
    update.step = host_update::Step::Quiesce;
    let mut world = HostWorld::new(bed.node.clone(), host::moment(), &update);
    let rules = Rules {
        is_urgent: true,
        waited: 0,
    };
    bed.wait("the operation to stop", |_| {
        let in_flight = world.quiesce_operations(&update, &rules).unwrap();
        in_flight.is_empty().then_some(())
    });
    assert!(bed.node.work.holds_all_guests());
    // Another one waits for the host.
    bed.disk("db.img");
    bed.apply(&Bed::guest_manifest("db", "db.img"));
    bed.apply(&Bed::reboot_manifest("other", "db"));
    wait_for(&bed, "other", reasons::HOST_UPDATING);
    assert!(bed.node.all_in_flight().is_empty());

    update.step = host_update::Step::Release;
    bed.node.work.put(&update);
    world.release_operations(&update).unwrap();
    update.step = host_update::Step::Done;
    bed.node.work.put(&update);
    let guest = Key::new("default", "web");
    bed.wait("the operation to go on", |bed| {
        pass(&bed.node);
        bed.node.in_flight(&guest)
    });
    wait_for(&bed, "other", reasons::PREFLIGHT_FAILED);
}
