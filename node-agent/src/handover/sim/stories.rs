//! Single runs that a reader can follow.

use understudy_api::Phase;
use understudy_api::conditions::reasons;

use super::scenario::{Scenario, play};
use super::world::*;

#[test]
fn the_order_of_the_patents_claims_is_kept() {
    let ended = play(&Scenario::quiet(1));
    assert_eq!(ended.verdict.phase, Phase::Succeeded, "{:?}", ended.verdict);
    let order = [
        // Claim 1: confirmed to the guest, and capture begins in response, before the clone exists.
        Event::CaptureBegan,
        Event::ConfirmRecorded,
        // The hypervisor clones on the first instruction; the clone performs the reboot.
        Event::CloneStarted,
        Event::Split,
        Event::CloneBooted,
        // The clone tells that its reboot is complete; only then changes are integrated.
        Event::BootNotice,
        Event::Integrated,
        // On the second instruction the guest becomes dormant and the clone active.
        Event::Committed,
        Event::CloneActivated,
        // The dormant guest is kept for a time that the instruction names.
        Event::Retired,
    ];
    let at: Vec<usize> = order.iter().map(|event| ended.at(*event).unwrap()).collect();
    assert!(at.is_sorted(), "{:?}", ended.trace);
    let phases: Vec<Phase> = ended.operation.transitions.iter().map(|t| t.phase).collect();
    assert_eq!(
        phases,
        [
            Phase::Pending,
            Phase::Confirmed,
            Phase::Cloning,
            Phase::Rebooting,
            Phase::Integrating,
            Phase::CuttingOver,
            Phase::Succeeded
        ]
    );
}

#[test]
fn the_result_tells_what_was_measured() {
    let ended = play(&Scenario::quiet(2));
    let result = &ended.operation.result;
    let (before, after) = (result.before.as_ref().unwrap(), result.after.as_ref().unwrap());
    assert_eq!((before.incarnation, after.incarnation), (3, 4));
    assert_ne!(before.boot_id, after.boot_id);
    let (interruption, pause) = (
        result.interruption_milliseconds.unwrap(),
        result.pause_milliseconds.unwrap(),
    );
    assert!(
        interruption <= pause && pause <= 300,
        "{interruption} ms within {pause} ms"
    );
    assert!(result.clone_boot_milliseconds.unwrap() >= 300);
    assert!(result.rounds >= 2 && result.files > 0);
    assert_eq!(result.split_freeze_microseconds, Some(900));
    assert_eq!(result.started_units[0].unit, "cron.service");
    assert_eq!(result.failed_units[0].unit, "mail.service");
}

#[test]
fn what_is_expected_already_is_left_alone() {
    let mut scenario = Scenario::quiet(3);
    scenario.expects = false;
    let mut operation = super::scenario::new_operation(&scenario, 0);
    operation.plan.expect_kernel = Some(super::agent::OLD_KERNEL.to_owned());
    let mut world = World::new(3);
    let now = super::agent::moment(world.now);
    let result = super::super::Effects::preflight(&mut world, &operation)
        .map(super::super::outcome::Outcome::Preflight);
    let operation = super::super::machine::apply(operation, result, now, now);
    let verdict = operation.verdict.unwrap();
    assert_eq!(verdict.phase, Phase::Succeeded);
    assert_eq!(verdict.reason, reasons::ALREADY_SATISFIED);
    assert_eq!(world.shared.trace.borrow().len(), 0);
}

#[test]
fn a_pause_that_is_too_short_is_taken_back_and_told() {
    let mut scenario = Scenario::quiet(4);
    scenario.max_pause = 3 * MS;
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, Phase::Failed);
    assert_eq!(ended.verdict.reason, reasons::MAX_PAUSE_EXCEEDED);
    assert_eq!(
        ended.operation.result.taken_back,
        super::super::outcome::MAX_CUTOVERS
    );
    assert!(
        ended
            .trace
            .iter()
            .filter(|event| **event == Event::Released)
            .count()
            >= 5
    );
}

#[test]
fn a_deletion_before_the_commit_aborts_and_after_it_changes_nothing() {
    let mut scenario = Scenario::quiet(6);
    scenario.faults = vec![(200 * MS, Fault::Abort)];
    assert_eq!(play(&scenario).verdict.phase, Phase::Aborted);
    // Asked for at any time around the cutover: it is one or the other, never something between.
    let (mut aborted, mut succeeded) = (0, 0);
    for step in 0..1200 {
        scenario.faults = vec![(step * 3 * MS, Fault::Abort)];
        match play(&scenario).verdict.phase {
            Phase::Aborted => aborted += 1,
            _ => succeeded += 1,
        }
    }
    assert!(
        aborted > 0 && succeeded > 0,
        "{aborted} aborted, {succeeded} succeeded"
    );
}

#[test]
fn a_rollback_brings_the_guest_back_where_it_was_and_tells_what_was_measured() {
    let mut scenario = Scenario::quiet(8);
    scenario.rollback = Some(2 * SECOND);
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, Phase::RolledBack, "{:?}", ended.verdict);
    assert_eq!(ended.verdict.reason, reasons::ROLLED_BACK);
    let order = [
        Event::Committed,
        Event::Retired,
        Event::CommittedBack,
        Event::GuestActivated,
        Event::Reinstated,
    ];
    let at: Vec<usize> = order.iter().map(|event| ended.at(*event).unwrap()).collect();
    assert!(at.is_sorted(), "{:?}", ended.trace);
    let last: Vec<Phase> = ended.operation.transitions.iter().map(|t| t.phase).collect();
    assert_eq!(last[last.len() - 2..], [Phase::Succeeded, Phase::RolledBack]);
    let interruption = ended.operation.result.rollback_interruption_milliseconds.unwrap();
    assert!(interruption < 100, "{interruption} ms");
}

#[test]
fn a_rollback_to_nothing_is_refused_and_the_reboot_has_succeeded_as_before() {
    let mut scenario = Scenario::quiet(9);
    scenario.rollback = Some(20 * SECOND);
    scenario.faults = vec![(19 * SECOND, Fault::GuestDies)];
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, Phase::Succeeded);
    assert_eq!(ended.verdict.reason, reasons::REBOOTED);
    let refused = ended.operation.action.unwrap().refused.unwrap();
    assert!(refused.contains("nothing is dormant"), "{refused}");
}

#[test]
fn a_host_that_dies_after_the_commit_boots_the_clones_disk() {
    let mut committed = 0;
    for seed in 0..400 {
        let mut scenario = Scenario::quiet(seed);
        scenario.faults = vec![(i64::try_from(seed).unwrap() * 10 * MS, Fault::HostDies)];
        let ended = play(&scenario);
        committed += u32::from(ended.at(Event::Committed).is_some());
    }
    assert!(committed > 0);
}
