//! The way back: the clone has taken over, and the incarnation before it, which is dormant, shall be the guest
//! again. What the clone has changed since is discarded. Pure; the steps are in [`Step`].
//!
//! It mirrors the cutover: the owner's own VMM replaces `owner.json`, so that a crash finds the clone before the
//! commit and the guest after it. It needs no freeze and no round: nothing is carried over.

use understudy_api::conditions::reasons;
use understudy_api::reboot::ActionType;
use understudy_vmm_control::owner::Owner;

use super::effects::{Dormancy, EffectError, ErrorKind};
use super::record::{Latched, Moment, Operation, Rollback, Step, Trouble, Verdict};
use super::trouble;

/// Most tries to hold the clone and to commit.
pub const MAX_TRIES: u32 = 5;
const SECOND: i64 = 1_000_000;
/// How long the way back is looked for.
const FIND_PATIENCE: i64 = 60 * SECOND;
/// How long a dormant incarnation that owns the guest may refuse to go on before it is booted anew.
const ACTIVATE_PATIENCE: i64 = 20 * SECOND;
/// How long the guest agent may stay silent; the guest runs without it.
const AGENT_PATIENCE: i64 = 10 * SECOND;
/// The clone serves for so long between two tries.
const REST: i64 = SECOND;

/// Begins the way back of an operation that has succeeded.
pub fn begin(mut operation: Operation, now: Moment) -> Operation {
    let before = operation
        .verdict
        .take()
        .unwrap_or_else(|| Verdict::succeeded(reasons::REBOOTED, String::new()));
    operation.action = Some(Latched {
        kind: ActionType::Rollback,
        at: now,
        refused: None,
    });
    operation.rollback = Some(Rollback {
        before,
        epoch: 0,
        held_at: None,
        block_writes: 0,
        tries: 0,
    });
    (operation.undo, operation.trouble) = (None, None);
    // The lease of a hold is the whole of `maxPause` again.
    (operation.held_at, operation.taken_back) = (None, None);
    operation.step = Step::FindDormant;
    operation
}

/// Ends it where there is no way back: the reboot has succeeded, as before.
pub(super) fn refuse(operation: &mut Operation, why: String, now: Moment) {
    if let Some(action) = &mut operation.action {
        action.refused = Some(why);
    }
    if let Some(rollback) = operation.rollback.take() {
        operation.finish(rollback.before, now);
    }
}

pub(super) fn found(operation: &mut Operation, dormancy: &Dormancy) {
    if let Some(rollback) = &mut operation.rollback {
        rollback.epoch = dormancy.epoch + 1;
        operation.step = Step::HoldClone;
    }
}

pub(super) fn held(operation: &mut Operation, block_writes: u64, started: Moment) {
    if let Some(rollback) = &mut operation.rollback {
        rollback.held_at = Some(started);
        rollback.block_writes = block_writes;
        operation.step = Step::CommitBack;
    }
}

/// The way forward from the commit back: the guest owns itself again.
fn go_back(operation: &mut Operation) {
    let kernel = operation
        .result
        .before
        .as_ref()
        .map(|before| before.kernel_release.clone());
    operation.undo = Some(Verdict::rolled_back(format!(
        "the guest runs kernel {} again, as it was before; what the clone had changed was discarded",
        kernel.unwrap_or_default()
    )));
    operation.trouble = None;
    operation.step = Step::ActivateGuest;
}

pub(super) fn committed(operation: &mut Operation) {
    go_back(operation);
}

pub(super) fn reinstated(operation: &mut Operation, first_frame: Option<Moment>, now: Moment) {
    let held_at = operation.rollback.as_ref().and_then(|rollback| rollback.held_at);
    let served = first_frame.unwrap_or(now);
    operation.result.rollback_interruption_milliseconds = held_at.map(|held| served.since(held) / 1000);
    operation.step = Step::ThawUserland;
}

/// Only `owner.json` knows whether the commit back happened.
pub(super) fn asked_owner(operation: &mut Operation, owner: &Owner, now: Moment) {
    if operation.is_rolled_back(owner) {
        go_back(operation);
        return;
    }
    let tries = operation.rollback.as_ref().map_or(0, |rollback| rollback.tries);
    let why = operation
        .taken_back
        .as_ref()
        .map(|taken_back| taken_back.message.clone())
        .unwrap_or_default();
    if tries >= MAX_TRIES {
        refuse(operation, format!("it was tried {tries} times: {why}"), now);
        return;
    }
    // Looked for anew: the deadline of the dormant may have passed, and the clone may have been started anew.
    operation.step = Step::FindDormant;
    operation.trouble = Some(Trouble {
        since: now,
        until: now.plus(REST),
        count: 0,
        reason: reasons::IN_PROGRESS.to_owned(),
        message: format!("the rollback was taken back because {why}"),
    });
}

/// Takes a try back: the clone serves on, unless `owner.json` says otherwise.
pub(super) fn take_back(operation: &mut Operation, message: String) {
    if let Some(rollback) = &mut operation.rollback {
        rollback.tries += 1;
    }
    super::machine::take_back(operation, reasons::STEP_FAILED, message);
    operation.step = Step::ReleaseClone;
}

/// What becomes of a rollback whose step did not happen.
pub(super) fn failed(operation: &mut Operation, error: &EffectError, now: Moment) {
    match (operation.step, error.kind) {
        (Step::FindDormant, ErrorKind::Retry) => {
            trouble::try_again(operation, error, now);
            if trouble::has_lasted(operation, FIND_PATIENCE, now) {
                refuse(operation, error.message.clone(), now);
            }
        }
        (Step::FindDormant, _) => refuse(operation, error.message.clone(), now),
        (Step::HoldClone | Step::CommitBack, _) => {
            let message = format!("step {:?} failed: {error}", operation.step);
            take_back(operation, message);
        }
        // A VMM that is gone commits nothing any more, and holds nothing.
        (Step::ReleaseClone, ErrorKind::CloneGone) => {
            operation.trouble = None;
            operation.step = Step::ReadOwner;
        }
        // Its layer is the guest's disk: it is booted from there once the clone is gone.
        (Step::ActivateGuest | Step::Reinstate, ErrorKind::GuestGone) => {
            operation.trouble = None;
            operation.guest_gone = true;
            operation.step = Step::KillClone;
        }
        (Step::ActivateGuest, _) => give_up(operation, error, ACTIVATE_PATIENCE, Step::ColdBoot, now),
        (Step::Reinstate, _) => give_up(operation, error, AGENT_PATIENCE, Step::ThawUserland, now),
        _ => trouble::try_again(operation, error, now),
    }
}

fn give_up(operation: &mut Operation, error: &EffectError, patience: i64, next: Step, now: Moment) {
    trouble::try_again(operation, error, now);
    if trouble::has_lasted(operation, patience, now) {
        operation.trouble = None;
        operation.step = next;
    }
}
