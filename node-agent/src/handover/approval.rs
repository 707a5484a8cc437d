//! What is asked of an operation on its way, and whether its clone may take over yet. Pure.

use jiff::Timestamp;
use understudy_api::Phase;
use understudy_api::conditions::reasons;
use understudy_api::reboot::{ActionType, CutoverMode};
use understudy_api::window::Passage;

use super::effects::Asked;
use super::machine::begin_undo;
use super::readiness;
use super::record::{Latched, Moment, Operation, Step, Verdict};

/// A clone that waits is brought up to date so often, in microseconds: the less is left for the end.
pub const REFRESH: i64 = 60_000_000;

/// Whether the clone may take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clearance {
    /// It may.
    Given,
    /// Nobody has approved it.
    Unapproved,
    /// The window is closed.
    Closed {
        /// When it opens.
        until: Timestamp,
        /// The same for people.
        shown: String,
    },
}

/// Whether the clone of an operation may take over now: both must allow it, the user and the window.
pub fn clearance(operation: &Operation, now: Moment) -> Clearance {
    if operation.plan.mode == CutoverMode::Manual && !operation.approved {
        return Clearance::Unapproved;
    }
    let Some(window) = &operation.plan.window else {
        return Clearance::Given;
    };
    let at = Timestamp::from_microsecond(now.unix_us).unwrap_or(Timestamp::UNIX_EPOCH);
    match window.at(at) {
        // One that cannot be read is refused before it begins: see `Plan::from_spec`.
        Ok(Passage::Open) | Err(_) => Clearance::Given,
        Ok(Passage::Closed { until, shown }) => Clearance::Closed { until, shown },
    }
}

/// Whether an action can still be taken in: before the commit point, and on the way back to before it.
fn is_open(operation: &Operation) -> bool {
    let taking_back = matches!(
        operation.step,
        Step::Release | Step::ReadOwner | Step::ThawUserland
    );
    operation.rollback.is_none() && operation.undo.is_none() && (operation.step.is_forward() || taking_back)
}

/// Whether something is asked that the operation does not know yet, and would act on.
pub fn is_news(operation: &Operation, asked: &Asked) -> bool {
    let known = operation.action.as_ref().map(|action| action.kind);
    is_open(operation) && (asked.abort.is_some() || asked.action.is_some() && asked.action != known)
}

/// Takes in what is asked. What was taken in counts, whatever the object says afterwards. Returns why the
/// operation shall be aborted, if it shall.
pub fn latch(operation: &mut Operation, asked: Asked, now: Moment) -> Option<String> {
    if is_open(operation)
        && let Some(kind) = asked.action
        && operation.action.as_ref().map(|action| action.kind) != Some(kind)
    {
        operation.approved |= kind == ActionType::Proceed;
        operation.action = Some(Latched {
            kind,
            at: now,
            refused: None,
        });
    }
    asked.abort.or_else(|| match operation.action.as_ref()?.kind {
        ActionType::Proceed => None,
        ActionType::Abort => Some("spec.action asks for it".to_owned()),
        ActionType::Rollback => Some("spec.action asks for a rollback, and nothing has moved yet".to_owned()),
    })
}

/// What was to end the reboot came too late: the clone had taken over. An abort is refused; a rollback is not what
/// has happened, so that it is news again once the reboot has succeeded, and goes back.
pub(super) fn too_late(operation: &mut Operation) {
    match operation.action.as_mut() {
        Some(action) if action.kind == ActionType::Abort => {
            action.refused = Some("the clone had just taken over; a Rollback goes back".to_owned());
        }
        Some(action) if action.kind == ActionType::Rollback => operation.action = None,
        _ => {}
    }
}

/// A round has brought the clone up to date as far as rounds can: what comes next.
pub(super) fn integrated(operation: &mut Operation, now: Moment) {
    if readiness::is_wanted(operation) {
        readiness::begin(operation, now);
        return;
    }
    if operation.plan.mode == CutoverMode::Rehearse {
        begin_undo(operation, rehearsed(operation), now);
        return;
    }
    if operation.cleared_at.is_some() || clearance(operation, now) == Clearance::Given {
        operation.enter(Phase::CuttingOver, now);
        (operation.held_at, operation.sealed_at) = (None, None);
        (operation.repeats, operation.cleared_at) = (0, None);
        operation.step = Step::HoldIngress;
        return;
    }
    operation.enter(Phase::AwaitingCutover, now);
    operation.refreshed_at = Some(now);
    operation.step = Step::AwaitCutover;
}

/// Looks whether a clone that waits may go on, or has waited for too long.
pub(super) fn look(operation: &mut Operation, now: Moment) {
    if clearance(operation, now) == Clearance::Given {
        operation.cleared_at = Some(now);
        // It may have waited for a day.
        operation.ready = false;
        again(operation);
    } else if now.since(operation.phase_since()) >= operation.plan.awaiting_cutover {
        let message = format!(
            "the cutover was waited for longer than timeouts.awaitingCutover: {}",
            explain(operation, now).1
        );
        begin_undo(operation, Verdict::failed(reasons::TIMED_OUT, message), now);
    } else if now.since(refreshed(operation)) >= REFRESH {
        again(operation);
    }
}

/// Rounds begin anew: how long those took that were made before the wait says nothing about the next.
pub(super) fn again(operation: &mut Operation) {
    operation.rounds_of_attempt = 0;
    operation.round_times = [None, None];
    operation.step = Step::Integrate;
}

fn refreshed(operation: &Operation) -> Moment {
    operation.refreshed_at.unwrap_or_else(|| operation.phase_since())
}

/// When a clone that waits is looked at next, unless something is asked before.
pub(super) fn next_look(operation: &Operation, now: Moment) -> Moment {
    let deadline = operation.phase_since().plus(operation.plan.awaiting_cutover);
    let mut until = refreshed(operation).plus(REFRESH);
    if deadline.since(now) < until.since(now) {
        until = deadline;
    }
    if let Clearance::Closed { until: opens, .. } = clearance(operation, now) {
        let left = opens.as_microsecond().saturating_sub(now.unix_us).max(0);
        if left < until.since(now) {
            until = now.plus(left);
        }
    }
    until
}

/// Why a clone waits: reason and message.
pub(super) fn explain(operation: &Operation, now: Moment) -> (&'static str, String) {
    match clearance(operation, now) {
        Clearance::Given => (
            reasons::IN_PROGRESS,
            "the cutover is cleared; the clone is brought up to date".to_owned(),
        ),
        Clearance::Unapproved => (
            reasons::APPROVAL_REQUIRED,
            "the clone is ready and waits for action: Proceed; the guest serves".to_owned(),
        ),
        Clearance::Closed { shown, .. } => (
            reasons::WINDOW_CLOSED,
            format!("the clone is ready; cutover.window opens on {shown}; the guest serves"),
        ),
    }
}

fn rehearsed(operation: &Operation) -> Verdict {
    let kernel = operation
        .result
        .after
        .as_ref()
        .map(|after| after.kernel_release.as_str());
    Verdict::succeeded(
        reasons::REHEARSED,
        format!(
            "a clone came up with kernel {}, {} files were integrated in {} rounds, and it was discarded; the guest was left alone",
            kernel.unwrap_or_default(),
            operation.result.files,
            operation.result.rounds
        ),
    )
}

#[cfg(test)]
#[path = "approval_test.rs"]
mod tests;
