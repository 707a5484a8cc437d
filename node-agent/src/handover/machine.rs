//! The state machine: pure functions from one record to the next. What happens is in [`super::driver`], what a
//! record becomes by what happened in [`super::outcome`] and [`super::trouble`].

use understudy_api::Phase;
use understudy_api::conditions::reasons;

use super::effects::{Asked, Effected};
use super::outcome::{Outcome, succeeded};
use super::record::{Moment, Operation, Step, TakenBack, Verdict};
use super::{approval, rollback};

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Perform the effect of the record's step.
    Perform {
        /// Whether the record must be on disk before. Where it need not, the record that is there leads
        /// to the same recovery, and the guest is being held or waited for.
        durable: bool,
    },
    /// Wait until then, unless something changes.
    Wait {
        /// When to ask again.
        until: Moment,
    },
    /// Nothing is left to do: [`Operation::verdict`] tells how it ended.
    Finished,
}

/// What to do with a record.
pub fn next(operation: &Operation, now: Moment) -> Decision {
    if operation.is_finished() {
        return Decision::Finished;
    }
    if let Some(trouble) = &operation.trouble
        && trouble.until.since(now) > 0
    {
        return Decision::Wait { until: trouble.until };
    }
    if operation.step == Step::AwaitCutover {
        let until = approval::next_look(operation, now);
        return Decision::Wait { until };
    }
    Decision::Perform {
        durable: is_recorded(operation.step),
    }
}

/// Whether a step's record must be durable before its effect.
///
/// While the guest is held, the record on disk says `HoldIngress`, which recovery takes back; and after the
/// commit it says `Commit`, where recovery asks `owner.json`. Taking back is not recorded either, so that
/// the guest waits for no disk; what cannot be done twice with the same outcome (killing the clone) is. A
/// rollback says `HoldClone` until the guest serves again.
fn is_recorded(step: Step) -> bool {
    !(step.is_held() && step != Step::HoldIngress
        || matches!(
            step,
            Step::HandOverNetwork
                | Step::ActivateClone
                | Step::ActivateAgent
                | Step::Release
                | Step::ReadOwner
                | Step::ThawUserland
                | Step::CommitBack
                | Step::ActivateGuest
                | Step::Reinstate
                | Step::ReleaseClone
        ))
}

/// What becomes of an operation whose record cannot be written before a step; `None`: it is finished without.
pub fn without_record(operation: &Operation, now: Moment) -> Option<Operation> {
    const MESSAGE: &str = "the journal could not be written; see the node agent's log";
    let mut operation = operation.clone();
    if operation.step.is_forward() {
        begin_undo(
            &mut operation,
            Verdict::failed(reasons::STEP_FAILED, MESSAGE),
            now,
        );
    } else if operation.step == Step::HoldClone {
        rollback::refuse(&mut operation, MESSAGE.to_owned(), now);
    } else {
        return None;
    }
    Some(operation)
}

/// What a restarted agent makes of a record that it finds.
pub fn resume(mut operation: Operation, now: Moment) -> Operation {
    if let Some(trouble) = &mut operation.trouble {
        trouble.until = now;
    }
    if operation.step.is_held() || operation.step == Step::Commit {
        take_back(
            &mut operation,
            reasons::STEP_FAILED,
            "the node agent was restarted during the cutover".to_owned(),
        );
    }
    if matches!(operation.step, Step::HoldClone | Step::CommitBack) {
        let message = "the node agent was restarted during the rollback".to_owned();
        rollback::take_back(&mut operation, message);
    }
    operation
}

/// Looks at the clock and at what was asked for, before each step.
pub fn interrupt(mut operation: Operation, asked: Asked, now: Moment) -> Operation {
    if operation.rollback.is_some() {
        // It is short, and asked for by the last word that a user has.
        return operation;
    }
    let abort = approval::latch(&mut operation, asked, now);
    let taking_back = matches!(
        operation.step,
        Step::Release | Step::ReadOwner | Step::ThawUserland
    );
    if let Some(why) = abort
        && operation.undo.is_none()
        && (operation.step.is_forward() || taking_back)
    {
        let verdict = Verdict::aborted(why);
        if taking_back {
            operation.undo = Some(verdict);
        } else {
            begin_undo(&mut operation, verdict, now);
        }
        return operation;
    }
    if !operation.step.is_forward() {
        return operation;
    }
    if operation.phase() == Phase::CuttingOver {
        if operation
            .held_at
            .is_some_and(|held| now.since(held) >= operation.plan.max_pause)
        {
            let message = format!("maxPause was exceeded in step {:?}", operation.step);
            take_back(&mut operation, reasons::MAX_PAUSE_EXCEEDED, message);
        }
        return operation;
    }
    if operation.step == Step::AwaitCutover {
        approval::look(&mut operation, now);
        return operation;
    }
    let plan = &operation.plan;
    let mut since = operation.phase_since();
    let (field, limit) = match (operation.phase(), operation.cleared_at) {
        (Phase::Pending, _) => ("pending", plan.pending),
        (Phase::Confirmed | Phase::Cloning, _) => ("cloning", plan.cloning),
        (Phase::Rebooting, _) => ("rebooting", plan.rebooting),
        (Phase::AwaitingCutover, None) => ("awaitingCutover", plan.awaiting_cutover),
        (Phase::AwaitingCutover, Some(cleared)) => {
            since = cleared;
            ("integrating", plan.integrating)
        }
        _ => ("integrating", plan.integrating),
    };
    if now.since(since) >= limit {
        let what = operation
            .trouble
            .as_ref()
            .map(|trouble| format!(": {}", trouble.message));
        let reason = match (operation.phase(), &operation.trouble) {
            (Phase::Pending, Some(trouble)) => trouble.reason.clone(),
            (Phase::Rebooting, _) => reasons::CLONE_SILENT.to_owned(),
            _ => reasons::TIMED_OUT.to_owned(),
        };
        let message = format!(
            "phase {} took longer than timeouts.{field}{}",
            operation.phase(),
            what.unwrap_or_default()
        );
        begin_undo(&mut operation, Verdict::failed(&reason, message), now);
    }
    operation
}

/// What a record becomes by an effect's result. `started` is when the effect began.
pub fn apply(mut operation: Operation, result: Effected<Outcome>, started: Moment, now: Moment) -> Operation {
    match result {
        Ok(outcome) => {
            operation.trouble = None;
            succeeded(&mut operation, outcome, started, now);
        }
        Err(error) => super::trouble::failed(&mut operation, &error, now),
    }
    operation
}

/// Starts to take the cutover back: the guest serves on, whatever the clone becomes.
pub(super) fn take_back(operation: &mut Operation, reason: &str, message: String) {
    operation.taken_back = Some(TakenBack {
        reason: reason.to_owned(),
        message,
    });
    operation.trouble = None;
    operation.step = Step::Release;
}

/// Starts to undo the operation. What was never begun needs no undoing.
pub(super) fn begin_undo(operation: &mut Operation, verdict: Verdict, now: Moment) {
    operation.trouble = None;
    if operation.step == Step::Preflight {
        operation.finish(verdict, now);
        return;
    }
    operation.undo = Some(verdict);
    operation.step = Step::Release;
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
