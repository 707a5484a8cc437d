//! What an operation looks like in the status of its SeamlessReboot.

use jiff::Timestamp;
use understudy_api::conditions::{self, reasons};
use understudy_api::reboot::{ActionStatus, PhaseTransition, Progress, SeamlessRebootStatus};
use understudy_api::{Phase, Time};

use super::approval;
use super::record::{Moment, Operation, Step};

/// Writes an operation into a status. Conditions keep their transition times.
pub fn update(status: &mut SeamlessRebootStatus, operation: &Operation, generation: i64, now: Moment) {
    let phase = operation.phase();
    let (reason, message) = explain(operation, now);
    status.observed_generation = generation;
    status.phase = Some(phase);
    status.phase_transitions = operation
        .transitions
        .iter()
        .map(|transition| PhaseTransition {
            phase: transition.phase,
            transition_time: Time(time(transition.at)),
        })
        .collect();
    status.action = operation.action.as_ref().map(|action| ActionStatus {
        kind: action.kind,
        time: Time(time(action.at)),
        refused: action.refused.clone(),
    });
    status.progress = (!phase.is_terminal()).then(|| progress(operation));
    status.result = operation
        .result
        .before
        .is_some()
        .then(|| operation.result.clone());
    conditions::set_for_phase(
        &mut status.conditions,
        generation,
        time(now),
        phase,
        &reason,
        &message,
    );
    status.reason = Some(reason);
    status.message = Some(message);
}

/// Reason and message.
fn explain(operation: &Operation, now: Moment) -> (String, String) {
    // While it is being rolled back it says what it said before: it has succeeded until it has not.
    let before = operation.rollback.as_ref().map(|rollback| &rollback.before);
    if let Some(verdict) = operation.verdict.as_ref().or(before) {
        return (verdict.reason.clone(), verdict.message.clone());
    }
    if let Some(undo) = operation
        .undo
        .as_ref()
        .filter(|undo| undo.phase == Phase::Succeeded)
    {
        return (
            undo.reason.clone(),
            "the rehearsal is over; removing the clone".to_owned(),
        );
    }
    if let Some(undo) = &operation.undo {
        return (undo.reason.clone(), format!("being undone: {}", undo.message));
    }
    if let Some(trouble) = operation.trouble.as_ref().filter(|trouble| trouble.count > 0) {
        let times = trouble.count;
        return (
            trouble.reason.clone(),
            format!("{} (tried {times} times, trying again)", trouble.message),
        );
    }
    if operation.phase() == Phase::AwaitingCutover {
        let (reason, message) = approval::explain(operation, now);
        return (reason.to_owned(), message);
    }
    let reason = match operation.phase() {
        Phase::Pending => reasons::PENDING,
        _ => reasons::IN_PROGRESS,
    };
    (reason.to_owned(), what(operation).to_owned())
}

/// Progress within the phase.
fn progress(operation: &Operation) -> Progress {
    let rounds = operation.result.rounds;
    let integrating = rounds > 0;
    Progress {
        message: what(operation).to_owned(),
        percent: percent(operation),
        round: integrating.then_some(rounds),
        files: integrating.then_some(operation.result.files),
        bytes: integrating.then_some(operation.result.bytes),
        remaining: integrating.then(|| i64::try_from(operation.remaining).unwrap_or(i64::MAX)),
    }
}

/// How much of the phase is done, where steps or times tell it.
fn percent(operation: &Operation) -> Option<i32> {
    let steps = |done, all| Some(done * 100 / all);
    match operation.step {
        Step::PrepareClone => steps(0, 2),
        Step::Split => steps(1, 2),
        Step::HoldIngress => steps(0, 10),
        Step::FreezeUserland => steps(1, 10),
        Step::FinalIntegrate => steps(2, 10),
        Step::Seal => steps(3, 10),
        Step::Verify => steps(4, 10),
        Step::Pause => steps(5, 10),
        Step::Commit => steps(6, 10),
        Step::HandOverNetwork => steps(7, 10),
        Step::ActivateClone => steps(8, 10),
        Step::ActivateAgent | Step::Retire => steps(9, 10),
        _ => None,
    }
}

/// What is being done, for people.
fn what(operation: &Operation) -> &'static str {
    match operation.step {
        Step::Preflight => "checking what the reboot needs",
        Step::Confirm => "telling the guest; capture of changes begins",
        Step::PrepareSplit => "making the layers of guest and clone",
        Step::PrepareClone => "starting the clone's VMM",
        Step::Split => "splitting the disk",
        Step::BootClone | Step::AwaitBoot => "the clone boots; the guest serves",
        Step::Integrate => "integrating the guest's changes into the clone; the guest serves",
        Step::Probe => "asking the clone whether it is ready; the guest serves",
        Step::AwaitCutover => "waiting for the cutover to be approved; the guest serves",
        Step::HoldIngress => "holding the guest's network",
        Step::FreezeUserland => "freezing the guest's programs",
        Step::FinalIntegrate => "integrating the rest",
        Step::Seal | Step::Verify => "verifying that nothing changed since",
        Step::Pause | Step::Commit => "committing",
        Step::HandOverNetwork | Step::ActivateClone => "the clone takes over the network",
        Step::ActivateAgent => "starting what was held",
        Step::ColdBoot => "booting the guest anew on the clone's disk",
        Step::Retire => "putting the old incarnation to rest",
        Step::Release | Step::ReadOwner | Step::ThawUserland => "taking the cutover back; the guest serves",
        Step::ThawFilesystems | Step::EndCapture | Step::KillClone | Step::DiscardClone => {
            "removing the clone; the guest serves"
        }
        Step::FindDormant => "looking for the dormant incarnation",
        Step::HoldClone | Step::CommitBack => "rolling back: holding the clone, committing",
        Step::ActivateGuest | Step::Reinstate => "rolling back: the guest goes on as before",
        Step::ReleaseClone => "taking the rollback back; the clone serves",
        Step::Done => "finished",
    }
}

fn time(moment: Moment) -> Timestamp {
    Timestamp::from_microsecond(moment.unix_us).unwrap_or(Timestamp::UNIX_EPOCH)
}
