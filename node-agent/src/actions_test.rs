use understudy_api::reboot::{Action, Changes};

use super::*;
use crate::operations;
use crate::store::Store;
use crate::testing::Bed;

fn reboot(store: &Store) -> SeamlessReboot {
    store.get(&Key::new("default", "kernel")).unwrap().unwrap()
}

fn ask(store: &Store, kind: ActionType) {
    let mut asked = reboot(store);
    asked.spec.action = Some(Action {
        kind,
        changes: (kind == ActionType::Rollback).then_some(Changes::Discard),
    });
    store.apply(&asked, Timestamp::now()).unwrap();
}

/// Its status once it has taken in what was asked.
fn taken_in(bed: &Bed, kind: ActionType) -> SeamlessRebootStatus {
    bed.wait(&format!("{} to be taken in", kind.as_str()), |bed| {
        operations::pass(&bed.node);
        let reboot = reboot(&bed.store);
        let generation = reboot.generation();
        let status = reboot.status?;
        let is_known = status.action.as_ref()?.kind == kind && status.observed_generation == generation;
        is_known.then_some(status)
    })
}

fn waiting(bed: &Bed) {
    bed.disk("web.img");
    bed.apply(&Bed::guest_manifest("web", "web.img"));
    bed.apply(&Bed::reboot_manifest("kernel", "web"));
    // The guest does not run, so it waits in its preflight.
    bed.wait("the preflight", |bed| {
        operations::pass(&bed.node);
        reboot(&bed.store).status?.phase
    });
}

#[test]
fn an_abort_by_the_manifest_ends_a_reboot_and_what_comes_later_is_refused_by_name() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    waiting(&bed);
    ask(&bed.store, ActionType::Abort);
    bed.wait("the abort", |bed| {
        operations::pass(&bed.node);
        let phase = reboot(&bed.store).status?.phase?;
        phase.is_terminal().then_some(())
    });
    let status = taken_in(&bed, ActionType::Abort);
    assert_eq!(status.phase, Some(Phase::Aborted));
    assert_eq!(status.action.unwrap().refused, None);

    ask(&bed.store, ActionType::Rollback);
    let status = taken_in(&bed, ActionType::Rollback);
    assert_eq!(status.phase, Some(Phase::Aborted));
    let why = status.action.unwrap().refused.unwrap();
    assert!(why.contains("is over: Aborted"), "{why}");
    // Whoever waits for the status of this generation has it.
    assert!(
        status
            .conditions
            .iter()
            .all(|condition| condition.observed_generation == Some(reboot(&bed.store).generation()))
    );
}

#[test]
fn an_action_that_is_taken_out_of_the_manifest_again_counts_all_the_same() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    waiting(&bed);
    let without = reboot(&bed.store);
    ask(&bed.store, ActionType::Abort);
    // Before anybody has looked at it, too.
    bed.store.apply(&without, Timestamp::now()).unwrap();
    bed.wait("the abort", |bed| {
        operations::pass(&bed.node);
        let phase = reboot(&bed.store).status?.phase?;
        (phase == Phase::Aborted).then_some(())
    });
    assert_eq!(
        taken_in(&bed, ActionType::Abort).action.unwrap().kind,
        ActionType::Abort
    );
}

#[test]
fn a_rollback_of_a_reboot_that_left_nothing_dormant_is_refused_with_the_reason() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    waiting(&bed);
    ask(&bed.store, ActionType::Abort);
    taken_in(&bed, ActionType::Abort);
    let done = reboot(&bed.store);
    bed.wait("the driver to end", |bed| {
        (!bed.node.is_driven(&done.uid())).then_some(())
    });
    // As one that has succeeded an hour ago.
    bed.store
        .update_status::<SeamlessReboot>(&done.key(), &done.uid(), true, |status| {
            status.phase = Some(Phase::Succeeded);
        })
        .unwrap();
    ask(&bed.store, ActionType::Rollback);
    let status = taken_in(&bed, ActionType::Rollback);
    assert_eq!(status.phase, Some(Phase::Succeeded));
    let why = status.action.unwrap().refused.unwrap();
    assert!(
        why.contains("no dormant incarnation") && why.contains("retainDormantFor"),
        "{why}"
    );
}
