use super::super::machine::{Decision, apply, interrupt, next};
use super::super::outcome::Outcome;
use super::super::sim::new_operation;
use super::*;
use crate::handover::effects::Round;

const SECOND: i64 = 1_000_000;

fn at(second: i64) -> Moment {
    Moment {
        // 2026-11-27, a Friday, 12:00 UTC.
        unix_us: (1_795_780_800 + second) * SECOND,
        boot_us: second * SECOND,
    }
}

fn asked(action: ActionType) -> Asked {
    Asked {
        abort: None,
        action: Some(action),
    }
}

/// An operation whose next round is the last before the cutover.
fn integrating(mode: CutoverMode, window: Option<&str>) -> Operation {
    let mut operation = new_operation();
    operation.plan.mode = mode;
    operation.plan.awaiting_cutover = 3600 * SECOND;
    operation.plan.window = window.map(|start| understudy_api::window::Window {
        time_zone: "UTC".to_owned(),
        days: Vec::new(),
        start: start.to_owned(),
        end: "23:00".to_owned(),
    });
    for phase in [
        Phase::Confirmed,
        Phase::Cloning,
        Phase::Rebooting,
        Phase::Integrating,
    ] {
        operation.enter(phase, at(0));
    }
    operation.step = Step::Integrate;
    operation
}

/// The operation after a round that took a millisecond.
fn round(operation: Operation, second: i64) -> Operation {
    let round = Outcome::Round(Round::default());
    let started = at(second);
    apply(operation, Ok(round), started, started.plus(1000))
}

#[test]
fn a_manual_cutover_waits_until_it_is_approved_and_once_approved_stays_so() {
    let waiting = round(integrating(CutoverMode::Manual, None), 1);
    assert_eq!(
        (waiting.phase(), waiting.step),
        (Phase::AwaitingCutover, Step::AwaitCutover)
    );
    let Decision::Wait { until } = next(&waiting, at(2)) else {
        panic!("it does not wait");
    };
    assert!(until.since(at(2)) > 0);
    assert_eq!(
        interrupt(waiting.clone(), Asked::default(), at(2)).step,
        Step::AwaitCutover
    );
    assert!(is_news(&waiting, &asked(ActionType::Proceed)));
    let approved = interrupt(waiting, asked(ActionType::Proceed), at(3));
    assert_eq!(approved.step, Step::Integrate, "it is brought up to date first");
    assert_eq!(
        approved.action.as_ref().map(|action| action.kind),
        Some(ActionType::Proceed)
    );
    // The field is removed: nothing changes.
    let approved = interrupt(approved, Asked::default(), at(4));
    assert!(approved.approved && approved.action.is_some());
    let cutting = round(approved, 4);
    assert_eq!(
        (cutting.phase(), cutting.step),
        (Phase::CuttingOver, Step::HoldIngress)
    );
    let mut taken_back = cutting;
    taken_back.enter(Phase::Integrating, at(5));
    taken_back.step = Step::Integrate;
    assert_eq!(round(taken_back, 6).step, Step::HoldIngress);
}

#[test]
fn one_that_was_approved_in_advance_or_is_automatic_does_not_wait() {
    let early = interrupt(
        integrating(CutoverMode::Manual, None),
        asked(ActionType::Proceed),
        at(0),
    );
    assert_eq!(round(early, 1).step, Step::HoldIngress);
    assert_eq!(
        round(integrating(CutoverMode::Automatic, None), 1).step,
        Step::HoldIngress
    );
}

#[test]
fn a_clone_that_waits_is_brought_up_to_date_now_and_then() {
    let waiting = round(integrating(CutoverMode::Manual, None), 1);
    let Decision::Wait { until } = next(&waiting, at(2)) else {
        panic!("it does not wait");
    };
    let again = interrupt(waiting, Asked::default(), until);
    assert_eq!(
        (again.phase(), again.step),
        (Phase::AwaitingCutover, Step::Integrate)
    );
    let waiting = round(again, 100);
    assert_eq!(waiting.step, Step::AwaitCutover);
    let Decision::Wait { until } = next(&waiting, at(101)) else {
        panic!("it does not wait");
    };
    assert!(until.since(at(101)) > REFRESH / 2, "it waits anew");
}

#[test]
fn a_window_is_waited_for_to_the_minute_and_an_approval_does_not_open_it() {
    let mut waiting = round(integrating(CutoverMode::Automatic, Some("12:30")), 1);
    assert_eq!(waiting.phase(), Phase::AwaitingCutover);
    assert_eq!(explain(&waiting, at(2)).0, reasons::WINDOW_CLOSED);
    waiting.refreshed_at = Some(at(1780));
    let Decision::Wait { until } = next(&waiting, at(1790)) else {
        panic!("it does not wait");
    };
    assert_eq!(until.since(at(1790)), 10 * SECOND);
    let approved = interrupt(waiting, asked(ActionType::Proceed), at(3));
    assert_eq!(approved.step, Step::AwaitCutover);
    let opened = interrupt(approved, Asked::default(), at(1800));
    assert!(opened.cleared_at.is_some());
    assert_eq!(round(opened, 1801).step, Step::HoldIngress);
}

#[test]
fn an_abort_or_an_early_rollback_ends_the_wait_and_too_long_a_wait_fails() {
    let waiting = round(integrating(CutoverMode::Manual, None), 1);
    for action in [ActionType::Abort, ActionType::Rollback] {
        let aborted = interrupt(waiting.clone(), asked(action), at(2));
        assert_eq!(aborted.step, Step::Release);
        assert_eq!(aborted.undo.as_ref().unwrap().phase, Phase::Aborted);
        assert!(!is_news(&aborted, &asked(ActionType::Proceed)), "it is decided");
    }
    let late = interrupt(waiting, Asked::default(), at(3602));
    let verdict = late.undo.unwrap();
    assert_eq!(
        (verdict.phase, verdict.reason.as_str()),
        (Phase::Failed, reasons::TIMED_OUT)
    );
    assert!(
        verdict.message.contains("Proceed") && verdict.message.contains("timeouts.awaitingCutover"),
        "{}",
        verdict.message
    );
}

#[test]
fn a_rehearsal_ends_before_anything_is_held() {
    let rehearsed = round(integrating(CutoverMode::Rehearse, None), 1);
    assert_eq!(rehearsed.step, Step::Release);
    let verdict = rehearsed.undo.as_ref().unwrap();
    assert_eq!(
        (verdict.phase, verdict.reason.as_str()),
        (Phase::Succeeded, reasons::REHEARSED)
    );
    // It is over: an abort comes too late.
    let after = interrupt(rehearsed.clone(), asked(ActionType::Abort), at(2));
    assert_eq!(after.undo, rehearsed.undo);
    assert_eq!(after.action, None);
}

#[test]
fn an_abort_that_the_commit_came_before_is_refused_and_a_rollback_is_asked_anew() {
    for (kind, latched) in [(ActionType::Abort, true), (ActionType::Rollback, false)] {
        let cutting = round(integrating(CutoverMode::Automatic, None), 1);
        let mut asked = interrupt(cutting, asked(kind), at(2));
        assert_eq!(asked.action.as_ref().map(|action| action.kind), Some(kind));
        too_late(&mut asked);
        let refused = asked.action.and_then(|action| action.refused);
        assert_eq!(refused.is_some(), latched, "{kind:?}");
    }
}
