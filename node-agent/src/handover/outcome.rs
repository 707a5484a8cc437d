//! What a record becomes by what an effect brought. What it becomes when an effect did not happen is in
//! [`super::trouble`].

use understudy_api::Phase;
use understudy_api::conditions::reasons;
use understudy_vmm_control::owner::Owner;

use super::effects::{
    Activation, Answer, CloneBoot, Dormancy, EffectError, ErrorKind, Preflight, Round, Sealed, SplitOutcome,
};
use super::machine::{begin_undo, take_back};
use super::record::{Moment, Operation, Step, Trouble, Verdict};
use super::{approval, readiness, rollback};

/// Most rounds of integration before a cutover is tried whatever they cost.
pub const MAX_ROUNDS: u32 = 20;
/// A round that takes longer (in microseconds) is worth another one, as long as they become shorter.
const WORTH_SHRINKING: i64 = 100_000;
/// Most cutovers; the last one that is taken back fails the reboot.
pub const MAX_CUTOVERS: i64 = 5;
/// Most repetitions of the last round within a cutover.
pub const MAX_REPEATS: u32 = 3;
/// Most conflicts that are reported by path.
pub const MAX_CONFLICTS: usize = 100;

/// What an effect brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The effect has no result.
    Done,
    /// Of [`Step::Preflight`].
    Preflight(Preflight),
    /// Of [`Step::Split`].
    Split(SplitOutcome),
    /// Of [`Step::AwaitBoot`].
    CloneBoot(Option<CloneBoot>),
    /// Of [`Step::Integrate`] and [`Step::FinalIntegrate`].
    Round(Round),
    /// Of [`Step::Probe`].
    Answer(Answer),
    /// Of [`Step::Seal`].
    Sealed(Sealed),
    /// Of [`Step::Verify`].
    Dirty(u64),
    /// Of [`Step::ReadOwner`].
    Owner(Owner),
    /// Of [`Step::ActivateAgent`].
    Activation(Activation),
    /// Of [`Step::FindDormant`].
    Dormancy(Dormancy),
    /// Of [`Step::HoldClone`]: block writes completed by then.
    Held(u64),
    /// Of [`Step::Reinstate`]: when the first frame went out.
    Reinstated(Option<Moment>),
}

pub(super) fn succeeded(operation: &mut Operation, outcome: Outcome, started: Moment, now: Moment) {
    match (operation.step, outcome) {
        (Step::Preflight, Outcome::Preflight(found)) => preflighted(operation, found, now),
        (Step::Confirm, _) => {
            operation.enter(Phase::Confirmed, now);
            operation.step = Step::PrepareSplit;
        }
        (Step::PrepareSplit, _) => {
            operation.enter(Phase::Cloning, now);
            operation.step = Step::PrepareClone;
        }
        (Step::PrepareClone, _) => operation.step = Step::Split,
        (Step::Split, Outcome::Split(SplitOutcome::Done { frozen_us })) => {
            operation.result.split_freeze_microseconds = Some(clamp(frozen_us));
            operation.enter(Phase::Rebooting, now);
            operation.boot_started = Some(now);
            operation.step = Step::BootClone;
        }
        (Step::Split, Outcome::Split(SplitOutcome::Unsure { message })) => {
            let message =
                format!("{message}, so the clone's disk cannot be trusted; apply a new SeamlessReboot");
            begin_undo(operation, Verdict::failed(reasons::STEP_FAILED, message), now);
        }
        (Step::BootClone, _) => operation.step = Step::AwaitBoot,
        (Step::AwaitBoot, Outcome::CloneBoot(Some(boot))) => booted(operation, &boot, now),
        // Not yet: asked again.
        (Step::AwaitBoot, _) => {}
        (Step::Integrate, Outcome::Round(round)) => {
            integrated(operation, round, now.since(started));
            if fits(operation) {
                approval::integrated(operation, now);
            }
        }
        (Step::Probe, Outcome::Answer(answer)) => readiness::answered(operation, answer, started, now),
        (Step::HoldIngress, _) => {
            operation.held_at = Some(started);
            operation.step = Step::FreezeUserland;
        }
        (Step::FreezeUserland, _) => operation.step = Step::FinalIntegrate,
        (Step::FinalIntegrate, Outcome::Round(round)) => {
            integrated(operation, round, now.since(started));
            operation.step = Step::Seal;
        }
        (Step::Seal, Outcome::Sealed(sealed)) => {
            operation.block_writes = sealed.block_writes;
            operation.sealed_at = operation.sealed_at.or(Some(sealed.at));
            operation.step = Step::Verify;
        }
        (Step::Verify, Outcome::Dirty(0)) => operation.step = Step::Pause,
        (Step::Verify, Outcome::Dirty(_)) if operation.repeats < MAX_REPEATS => {
            operation.repeats += 1;
            operation.step = Step::FinalIntegrate;
        }
        (Step::Verify, Outcome::Dirty(dirty)) => {
            let message = format!("{dirty} entries changed although programs were frozen");
            take_back(operation, reasons::STEP_FAILED, message);
        }
        (Step::Pause, _) => operation.step = Step::Commit,
        (Step::Commit, _) => go_forward(operation, now),
        (Step::HandOverNetwork, _) => {
            operation.network_given = true;
            operation.step = Step::ActivateClone;
        }
        (Step::ActivateClone, _) => operation.step = Step::ActivateAgent,
        (Step::ActivateAgent, Outcome::Activation(activation)) => activated(operation, activation, now),
        (Step::ColdBoot, _) if operation.rollback.is_some() => operation.step = Step::KillClone,
        (Step::ColdBoot, _) => operation.step = Step::Retire,
        (Step::Retire, _) => retired(operation, now),
        (Step::Release, _) => operation.step = Step::ReadOwner,
        (Step::ReadOwner, Outcome::Owner(owner)) if operation.rollback.is_some() => {
            rollback::asked_owner(operation, &owner, now);
        }
        (Step::ReadOwner, Outcome::Owner(owner)) => {
            if operation.is_owned_by_clone(&owner) {
                // An abort or an error that came too late: the clone is the guest.
                operation.undo = None;
                approval::too_late(operation);
                go_forward(operation, now);
            } else if operation.guest_gone {
                operation.step = Step::KillClone;
            } else {
                operation.step = Step::ThawUserland;
            }
        }
        (Step::ThawUserland, _) => thawed(operation, now),
        (Step::ThawFilesystems, _) => operation.step = Step::EndCapture,
        (Step::EndCapture, _) => operation.step = Step::KillClone,
        (Step::KillClone, _) => operation.step = Step::DiscardClone,
        (Step::DiscardClone, _) => undone(operation, now),
        (Step::FindDormant, Outcome::Dormancy(dormancy)) => rollback::found(operation, &dormancy),
        (Step::HoldClone, Outcome::Held(block_writes)) => rollback::held(operation, block_writes, started),
        (Step::CommitBack, _) => rollback::committed(operation),
        (Step::ActivateGuest, _) => operation.step = Step::Reinstate,
        (Step::Reinstate, Outcome::Reinstated(first_frame)) => {
            rollback::reinstated(operation, first_frame, now);
        }
        (Step::ReleaseClone, _) => operation.step = Step::ReadOwner,
        (step, outcome) => {
            let message = format!("step {step:?} brought {outcome:?}, which is a defect of the node agent");
            super::trouble::failed(operation, &EffectError::new(ErrorKind::Refused, message), now);
        }
    }
}

fn preflighted(operation: &mut Operation, found: Preflight, now: Moment) {
    operation.result.before =
        Some(operation.incarnation(found.incarnation, &found.boot_id, &found.kernel_release));
    let satisfied = operation
        .plan
        .satisfied_by(&found.kernel_release, found.booted_at);
    if operation.plan.expects() && satisfied.is_ok() {
        let message = "what spec.expect names holds already; nothing was done";
        operation.finish(Verdict::succeeded(reasons::ALREADY_SATISFIED, message), now);
        return;
    }
    operation.before = Some(found);
    operation.step = Step::Confirm;
}

fn booted(operation: &mut Operation, boot: &CloneBoot, now: Moment) {
    let number = operation.clone_incarnation();
    operation.result.after = Some(operation.incarnation(number, &boot.boot_id, &boot.kernel_release));
    operation.result.clone_boot_milliseconds =
        operation.boot_started.map(|started| now.since(started) / 1000);
    if let Err(missed) = operation.plan.satisfied_by(&boot.kernel_release, boot.booted_at) {
        let message = format!("the clone does not satisfy spec.expect: {missed}");
        begin_undo(
            operation,
            Verdict::failed(reasons::EXPECTATION_NOT_MET, message),
            now,
        );
        return;
    }
    // A clone that ended in the emergency shell has left `starting`, too.
    if !["running", "degraded"].contains(&boot.system_state.as_str()) {
        let message = format!(
            "the clone's systemd is {:?}, not running; its console log tells why",
            boot.system_state
        );
        begin_undo(operation, Verdict::failed(reasons::UNITS_FAILED, message), now);
        return;
    }
    let before = operation.before.as_ref();
    let known = |unit: &&String| before.is_some_and(|before| before.failed_units.contains(unit));
    let failed: Vec<&str> = boot
        .failed_units
        .iter()
        .filter(|unit| !known(unit))
        .map(String::as_str)
        .collect();
    if !failed.is_empty() {
        let message = format!(
            "on the clone these units failed, which run on the guest: {}",
            failed.join(", ")
        );
        begin_undo(operation, Verdict::failed(reasons::UNITS_FAILED, message), now);
        return;
    }
    operation.enter(Phase::Integrating, now);
    operation.step = Step::Integrate;
}

fn integrated(operation: &mut Operation, round: Round, took: i64) {
    operation.applied = operation.applied.max(round.round);
    operation.round_times = [Some(took), operation.round_times[0]];
    operation.remaining = round.dirty;
    operation.rounds_of_attempt += 1;
    let result = &mut operation.result;
    result.rounds += 1;
    result.files = result.files.saturating_add(clamp(round.entries));
    result.bytes = result.bytes.saturating_add(clamp(round.bytes));
    result.conflict_count = result.conflict_count.saturating_add(clamp(round.conflict_count));
    let room = MAX_CONFLICTS.saturating_sub(result.conflicts.len());
    result.conflicts.extend(round.conflicts.into_iter().take(room));
    if round.remains.is_some() {
        result.remains = round.remains;
    }
}

/// Whether the next round is likely to fit into the cutover, and more rounds will not make it shorter.
fn fits(operation: &Operation) -> bool {
    let [newest, before] = operation.round_times;
    let short = newest.is_some_and(|took| took <= operation.plan.max_pause / 4);
    let shrinks = match (newest, before) {
        (Some(newest), Some(before)) => newest < before / 4 * 3,
        _ => true,
    };
    // Clients wait for the last round, so that one which is short enough may still be too long.
    let worthwhile = shrinks && newest.is_some_and(|took| took > WORTH_SHRINKING);
    let at_its_shortest = !worthwhile && (short || operation.rounds_of_attempt >= 3);
    at_its_shortest || operation.rounds_of_attempt >= MAX_ROUNDS
}

fn go_forward(operation: &mut Operation, now: Moment) {
    operation.committed_at = operation.committed_at.or(Some(now));
    operation.step = Step::HandOverNetwork;
}

fn activated(operation: &mut Operation, activation: Activation, now: Moment) {
    let served = activation.first_frame.unwrap_or(now);
    let millis = |from: Option<Moment>| from.map(|from| served.since(from) / 1000);
    operation.result.interruption_milliseconds = millis(operation.sealed_at);
    operation.result.pause_milliseconds = millis(operation.held_at);
    operation.note_units(activation.started, activation.failed);
    operation.step = Step::Retire;
}

fn retired(operation: &mut Operation, now: Moment) {
    let kernel = operation
        .result
        .after
        .as_ref()
        .map(|after| after.kernel_release.clone());
    let mut message = format!("the guest runs kernel {}", kernel.unwrap_or_default());
    if let Some(taken_back) = operation
        .taken_back
        .as_ref()
        .filter(|_| operation.result.taken_back > 0)
    {
        message.push_str(&format!(
            "; {} cutovers were taken back before, the last because {}",
            operation.result.taken_back, taken_back.message
        ));
    }
    operation.finish(Verdict::succeeded(reasons::REBOOTED, message), now);
}

/// The guest serves again after a cutover that was taken back, or on the way to an undo.
fn thawed(operation: &mut Operation, now: Moment) {
    if operation.undo.is_some() {
        operation.step = Step::ThawFilesystems;
        return;
    }
    operation.result.taken_back += 1;
    let (reason, why) = operation.taken_back.as_ref().map_or_else(
        || (reasons::STEP_FAILED.to_owned(), String::new()),
        |taken_back| (taken_back.reason.clone(), taken_back.message.clone()),
    );
    if operation.result.taken_back >= MAX_CUTOVERS {
        let message = format!("{MAX_CUTOVERS} cutovers were taken back, the last because {why}");
        operation.undo = Some(Verdict::failed(&reason, message));
        operation.step = Step::ThawFilesystems;
        return;
    }
    operation.enter(Phase::Integrating, now);
    operation.rounds_of_attempt = 0;
    operation.step = Step::Integrate;
    // The guest gets time to itself, the more the oftener it was held.
    let rest = operation
        .plan
        .max_pause
        .saturating_mul(2 * operation.result.taken_back);
    operation.trouble = Some(Trouble {
        since: now,
        until: now.plus(rest),
        count: 0,
        reason: reasons::IN_PROGRESS.to_owned(),
        message: format!("a cutover was taken back because {why}"),
    });
}

fn undone(operation: &mut Operation, now: Moment) {
    let verdict = operation
        .undo
        .clone()
        .unwrap_or_else(|| Verdict::failed(reasons::STEP_FAILED, "it was undone"));
    operation.finish(verdict, now);
}

fn clamp(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
