//! What becomes of a record when an effect did not happen.

use understudy_api::conditions::reasons;

use super::effects::{EffectError, ErrorKind};
use super::machine::{begin_undo, take_back};
use super::record::{Moment, Operation, Step, Trouble, Verdict};

/// First wait before a step is tried again; doubles up to [`LAST_WAIT`]. Microseconds.
const FIRST_WAIT: i64 = 50_000;
const LAST_WAIT: i64 = 5_000_000;

const SECOND: i64 = 1_000_000;
/// How long a step towards the cutover is tried again without success (preflight: its timeout).
const FORWARD_PATIENCE: i64 = 120 * SECOND;
/// How long an undo waits for a guest agent, whose watchdogs thaw the guest in any case.
const THAW_PATIENCE: i64 = 10 * SECOND;
/// How long the removal of a layer is tried; the guest manager finds it later in any case.
const DISCARD_PATIENCE: i64 = 30 * SECOND;
/// How long taps are asked of the old VMM before they are opened by name.
const NETWORK_PATIENCE: i64 = 2 * SECOND;
/// How long a clone that owns the guest may refuse to be activated before it is booted anew.
const ACTIVATE_PATIENCE: i64 = 20 * SECOND;
/// How long the clone's guest agent may stay silent; the guest runs without it.
const AGENT_PATIENCE: i64 = 60 * SECOND;

pub(super) fn failed(operation: &mut Operation, error: &EffectError, now: Moment) {
    let step = operation.step;
    if step.is_rollback() {
        super::rollback::failed(operation, error, now);
    } else if step.is_held() {
        held(operation, error, now);
    } else if step == Step::Commit {
        // Whether it happened is for `owner.json` to say, after a release has made it void.
        let message = format!("the commit was not carried out: {error}");
        take_back(operation, reason_of_take_back(error), message);
    } else if step.is_forward() {
        forward(operation, error, now);
    } else {
        backward_or_committed(operation, error, now);
    }
}

/// Before the cutover.
fn forward(operation: &mut Operation, error: &EffectError, now: Moment) {
    match error.kind {
        ErrorKind::Retry => {
            try_again(operation, error, now);
            let patience = forward_patience(operation);
            if has_lasted(operation, patience, now) {
                begin_undo(operation, verdict(operation.step, error), now);
            }
        }
        ErrorKind::GuestGone => {
            operation.guest_gone = true;
            begin_undo(operation, verdict(operation.step, error), now);
        }
        ErrorKind::Refused | ErrorKind::Lapsed | ErrorKind::CloneGone => {
            begin_undo(operation, verdict(operation.step, error), now);
        }
    }
}

/// While the guest is held: nothing is tried again under the lease.
fn held(operation: &mut Operation, error: &EffectError, now: Moment) {
    // What a guest refuses for the moment (a program that does not freeze in time) it may do at the next
    // try, of which there are few; a round that is refused stays so.
    let final_refusal = error.kind == ErrorKind::Refused && operation.step == Step::FinalIntegrate;
    match error.kind {
        ErrorKind::Retry | ErrorKind::Lapsed | ErrorKind::Refused if !final_refusal => {
            let message = format!("step {:?} failed: {error}", operation.step);
            take_back(operation, reason_of_take_back(error), message);
        }
        ErrorKind::GuestGone => {
            operation.guest_gone = true;
            begin_undo(operation, verdict(operation.step, error), now);
        }
        _ => begin_undo(operation, verdict(operation.step, error), now),
    }
}

fn reason_of_take_back(error: &EffectError) -> &'static str {
    match (error.reason, error.kind) {
        ("", ErrorKind::Lapsed) => reasons::MAX_PAUSE_EXCEEDED,
        ("", _) => reasons::STEP_FAILED,
        (reason, _) => reason,
    }
}

/// On the way back, and after the commit: no error ends these, they go round it.
fn backward_or_committed(operation: &mut Operation, error: &EffectError, now: Moment) {
    let around = match (operation.step, error.kind) {
        // A VMM that is gone commits nothing any more, and holds nothing.
        (Step::Release, ErrorKind::GuestGone) => {
            operation.guest_gone = true;
            Some(Step::ReadOwner)
        }
        (Step::ThawUserland | Step::ThawFilesystems | Step::EndCapture, ErrorKind::GuestGone) => {
            operation.guest_gone = true;
            Some(Step::KillClone)
        }
        (Step::HandOverNetwork, ErrorKind::GuestGone | ErrorKind::Refused) => Some(Step::ActivateClone),
        (Step::HandOverNetwork | Step::ActivateClone | Step::ActivateAgent, ErrorKind::CloneGone) => {
            Some(Step::ColdBoot)
        }
        _ => None,
    };
    if let Some(step) = around {
        if operation.guest_gone && operation.undo.is_none() && !operation.step.is_committed() {
            operation.undo = Some(verdict(operation.step, error));
        }
        operation.trouble = None;
        operation.step = step;
        return;
    }
    try_again(operation, error, now);
    if operation.step == Step::ThawUserland && operation.undo.is_none() {
        // The guest's agent does not answer, so no other cutover can work either; its watchdog thaws.
        if has_lasted(operation, forward_patience(operation), now) {
            begin_undo(operation, verdict(operation.step, error), now);
        }
        return;
    }
    if let Some((patience, step)) = give_up(operation)
        && has_lasted(operation, patience, now)
    {
        operation.trouble = None;
        match step {
            Step::Done => {
                let mut verdict = operation
                    .undo
                    .clone()
                    .unwrap_or_else(|| Verdict::failed(reasons::STEP_FAILED, "it was undone"));
                verdict.message.push_str(&format!("; left behind: {error}"));
                operation.finish(verdict, now);
            }
            step => operation.step = step,
        }
    }
}

pub(super) fn try_again(operation: &mut Operation, error: &EffectError, now: Moment) {
    let earlier = operation.trouble.take().filter(|trouble| trouble.count > 0);
    let count = earlier
        .as_ref()
        .map_or(0, |trouble| trouble.count)
        .saturating_add(1);
    let wait = FIRST_WAIT
        .saturating_mul(1 << count.min(16).saturating_sub(1))
        .min(LAST_WAIT);
    operation.trouble = Some(Trouble {
        since: earlier.map_or(now, |trouble| trouble.since),
        until: now.plus(wait),
        count,
        reason: reason(operation.step, error).to_owned(),
        message: error.message.clone(),
    });
}

pub(super) fn has_lasted(operation: &Operation, patience: i64, now: Moment) -> bool {
    operation
        .trouble
        .as_ref()
        .is_some_and(|trouble| now.since(trouble.since) >= patience)
}

fn verdict(step: Step, error: &EffectError) -> Verdict {
    Verdict::failed(reason(step, error), error.message.clone())
}

fn reason(step: Step, error: &EffectError) -> &'static str {
    if !error.reason.is_empty() {
        return error.reason;
    }
    match (error.kind, step) {
        (ErrorKind::GuestGone, _) => reasons::GUEST_DIED,
        (ErrorKind::CloneGone, _) => reasons::CLONE_DIED,
        (_, Step::Preflight) => reasons::PREFLIGHT_FAILED,
        (ErrorKind::Refused, Step::Confirm) => reasons::GUEST_REFUSED,
        (ErrorKind::Refused, Step::Integrate | Step::FinalIntegrate) => reasons::INTEGRATION_FAILED,
        _ => reasons::STEP_FAILED,
    }
}

/// Where an undo goes when it has tried a step in vain for long enough; `None`: it is tried on.
fn give_up(operation: &Operation) -> Option<(i64, Step)> {
    Some(match operation.step {
        Step::ThawUserland if operation.undo.is_some() => (THAW_PATIENCE, Step::ThawFilesystems),
        Step::ThawFilesystems => (THAW_PATIENCE, Step::EndCapture),
        Step::EndCapture => (THAW_PATIENCE, Step::KillClone),
        Step::DiscardClone => (DISCARD_PATIENCE, Step::Done),
        Step::HandOverNetwork => (NETWORK_PATIENCE, Step::ActivateClone),
        Step::ActivateClone => (ACTIVATE_PATIENCE, Step::ColdBoot),
        Step::ActivateAgent => (AGENT_PATIENCE, Step::Retire),
        _ => return None,
    })
}

/// How long a forward step may fail with `Retry` before the operation does.
fn forward_patience(operation: &Operation) -> i64 {
    match operation.step {
        Step::Preflight => i64::MAX,
        _ => FORWARD_PATIENCE,
    }
}
