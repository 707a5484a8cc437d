use understudy_api::Phase;
use understudy_api::readiness::TcpSocket;
use understudy_api::reboot::CutoverMode;

use super::super::effects::{EffectError, Effected, ErrorKind, Round};
use super::super::machine::{Decision, apply, next};
use super::super::outcome::Outcome;
use super::super::sim::new_operation;
use super::*;

fn at(second: i64) -> Moment {
    Moment {
        unix_us: second * SECOND,
        boot_us: second * SECOND,
    }
}

fn probe(name: &str) -> Probe {
    Probe {
        name: name.to_owned(),
        http_get: None,
        tcp_socket: Some(TcpSocket { port: 80 }),
        exec: None,
        initial_delay_seconds: 0,
        period_seconds: 10,
        timeout_seconds: 1,
        success_threshold: 1,
        failure_threshold: 3,
    }
}

/// The operation after a round that took a millisecond.
fn round(operation: Operation, second: i64) -> Operation {
    let started = at(second);
    let round = Outcome::Round(Round::default());
    apply(operation, Ok(round), started, started.plus(1000))
}

/// One whose last round is over, with these probes.
fn integrated(mode: CutoverMode, probes: Vec<Probe>) -> Operation {
    let mut operation = new_operation();
    (operation.plan.mode, operation.plan.readiness) = (mode, probes);
    for phase in [
        Phase::Confirmed,
        Phase::Cloning,
        Phase::Rebooting,
        Phase::Integrating,
    ] {
        operation.enter(phase, at(0));
    }
    operation.step = Step::Integrate;
    round(operation, 1)
}

fn answer(operation: Operation, result: Effected<bool>, second: i64) -> Operation {
    assert_eq!(operation.step, Step::Probe);
    let result = result.map(|ready| {
        Outcome::Answer(Answer {
            ready,
            message: "so it is".to_owned(),
        })
    });
    apply(operation, result, at(second), at(second).plus(1000))
}

fn waits_until(operation: &Operation, second: i64) -> Option<Moment> {
    match next(operation, at(second)) {
        Decision::Wait { until } => Some(until),
        _ => None,
    }
}

#[test]
fn a_clone_takes_over_after_all_its_probes_have_succeeded_and_one_more_round() {
    let asked = integrated(CutoverMode::Automatic, vec![probe("page"), probe("ledger")]);
    assert_eq!((asked.phase(), asked.step), (Phase::Integrating, Step::Probe));
    let asked = answer(asked, Ok(true), 2);
    assert_eq!(current(&asked).unwrap().name, "ledger");
    assert_eq!(waits_until(&asked, 2), None);
    let ready = answer(asked, Ok(true), 3);
    assert_eq!(ready.step, Step::Integrate);
    let cutting = round(ready, 4);
    assert_eq!(cutting.step, Step::HoldIngress);
    let told: Vec<_> = cutting.result.readiness.iter().map(|told| told.ready).collect();
    assert_eq!(told, [Some(true), Some(true)]);
}

#[test]
fn a_probe_that_fails_too_often_in_a_row_fails_the_reboot_and_the_others_are_told_too() {
    let mut patient = probe("page");
    patient.success_threshold = 2;
    let mut asked = integrated(CutoverMode::Automatic, vec![patient, probe("ledger")]);
    for (second, ready) in [(10, false), (20, false), (30, true), (40, false), (50, false)] {
        asked = answer(asked, Ok(ready), second);
        assert_eq!(waits_until(&asked, second), Some(at(second + 10)), "its period");
    }
    assert_eq!(asked.result.readiness[0].ready, None, "it is not decided");
    asked = answer(asked, Ok(false), 60);
    let ended = answer(asked, Ok(true), 61);
    assert_eq!(ended.step, Step::Release);
    let verdict = ended.undo.unwrap();
    assert_eq!(
        (verdict.phase, verdict.reason.as_str()),
        (Phase::Failed, reasons::NOT_READY)
    );
    assert!(
        verdict.message.contains("page (so it is)") && !verdict.message.contains("ledger"),
        "{}",
        verdict.message
    );
    let told: Vec<_> = ended
        .result
        .readiness
        .iter()
        .map(|told| (told.name.as_str(), told.ready, told.tries))
        .collect();
    assert_eq!(told, [("page", Some(false), 6), ("ledger", Some(true), 1)]);
}

#[test]
fn the_first_try_waits_for_its_delay_and_a_guest_agent_that_does_not_answer_is_asked_again() {
    let mut late = probe("page");
    late.initial_delay_seconds = 30;
    let asked = integrated(CutoverMode::Automatic, vec![late]);
    assert!(waits_until(&asked, 2).unwrap().since(at(30)) > 0);
    let silent = EffectError::new(ErrorKind::Retry, "it does not answer");
    let asked = answer(asked, Err(silent), 40);
    assert!(asked.result.readiness.is_empty(), "that was no try");
    assert_eq!(answer(asked, Ok(true), 41).step, Step::Integrate);
    let dead = EffectError::new(ErrorKind::CloneGone, "it is gone");
    let asked = integrated(CutoverMode::Automatic, vec![probe("page")]);
    let ended = answer(asked, Err(dead), 2);
    assert_eq!(ended.undo.unwrap().reason, reasons::CLONE_DIED);
}

#[test]
fn a_rehearsal_is_asked_before_it_ends_and_fails_where_a_reboot_would() {
    for (ready, phase) in [(true, Phase::Succeeded), (false, Phase::Failed)] {
        let mut hasty = probe("page");
        hasty.failure_threshold = 1;
        let mut asked = integrated(CutoverMode::Rehearse, vec![hasty]);
        asked = answer(asked, Ok(ready), 2);
        if ready {
            asked = round(asked, 3);
        }
        assert_eq!(asked.step, Step::Release);
        assert_eq!(asked.undo.unwrap().phase, phase);
    }
}

#[test]
fn a_clone_that_has_waited_is_asked_again_before_it_takes_over() {
    let asked = integrated(CutoverMode::Manual, vec![probe("page")]);
    let waiting = round(answer(asked, Ok(true), 2), 3);
    assert_eq!(waiting.step, Step::AwaitCutover);
    let mut approved = waiting;
    approved.approved = true;
    super::super::approval::look(&mut approved, at(100));
    let asked = round(approved, 101);
    assert_eq!((asked.phase(), asked.step), (Phase::AwaitingCutover, Step::Probe));
    let ready = answer(asked, Ok(true), 102);
    assert_eq!(round(ready, 103).step, Step::HoldIngress);
}
