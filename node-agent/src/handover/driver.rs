//! The loop: record, act, learn, report. It has no thread of its own and keeps nothing that the record lacks.

use super::effects::{Effected, Effects, Report};
use super::journal::Journal;
use super::machine::{self, Decision, apply, interrupt, next};
use super::outcome::Outcome;
use super::record::{Moment, Operation, Step};

/// How often a clone that waits for its cutover, and its guest, are looked at. Microseconds.
const LOOK: i64 = 5_000_000;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// The operation is finished.
    Finished(Operation),
    /// The agent is being stopped; the operation goes on from the journal.
    Stopped(Operation),
}

/// Runs an operation to its end on the calling thread: a new one, or one found in the journal
/// (`recovered`).
pub fn run(
    operation: Operation,
    recovered: bool,
    effects: &mut impl Effects,
    journal: &mut impl Journal,
    report: &mut impl Report,
) -> Run {
    let now = effects.now();
    let mut operation = if recovered {
        machine::resume(operation, now)
    } else {
        operation
    };
    let mut on_disk = None;
    loop {
        let now = effects.now();
        let asked = effects.asked(&operation);
        operation = interrupt(operation, asked, now);
        match next(&operation, now) {
            Decision::Finished => {
                record(&operation, &mut on_disk, journal, report);
                report.progress(&operation);
                return Run::Finished(operation);
            }
            Decision::Wait { until } => {
                // This wait may be long, and its limit counts from the first agent's look.
                if operation.step == Step::AwaitCutover {
                    record(&operation, &mut on_disk, journal, report);
                }
                report.progress(&operation);
                if effects.must_stop() {
                    return Run::Stopped(operation);
                }
                if operation.step != Step::AwaitCutover {
                    effects.wait(&operation, until);
                    continue;
                }
                // Who dies meanwhile dies without an effect that tells of it.
                let look = now.plus(LOOK);
                effects.wait(&operation, if look.since(until) < 0 { look } else { until });
                if let Err(error) = effects.watch(&operation) {
                    operation = apply(operation, Err(error), now, effects.now());
                }
            }
            Decision::Perform { durable } => {
                if may_stop(operation.step) && effects.must_stop() {
                    return Run::Stopped(operation);
                }
                if durable
                    && !record(&operation, &mut on_disk, journal, report)
                    && let Some(ends) = machine::without_record(&operation, now)
                {
                    operation = ends;
                    continue;
                }
                report.progress(&operation);
                let started = effects.now();
                let result = perform(&operation, started, effects);
                operation = apply(operation, result, started, effects.now());
            }
        }
    }
}

/// While the guest is held, and until the clone serves, the agent finishes first.
fn may_stop(step: Step) -> bool {
    let guest_waits = match step {
        Step::HoldIngress | Step::HoldClone => false,
        Step::Commit | Step::Release | Step::ReadOwner | Step::ThawUserland => true,
        Step::CommitBack | Step::ActivateGuest | Step::ReleaseClone => true,
        _ => step.is_held() || step.is_committed(),
    };
    !guest_waits
}

/// Makes the record durable where it is not so already.
fn record(
    operation: &Operation,
    on_disk: &mut Option<Operation>,
    journal: &mut impl Journal,
    report: &mut impl Report,
) -> bool {
    if on_disk.as_ref() == Some(operation) {
        return true;
    }
    match journal.write(operation) {
        Ok(()) => {
            *on_disk = Some(operation.clone());
            true
        }
        Err(error) => {
            report.journal_trouble(operation, &error.to_string());
            false
        }
    }
}

/// Performs the effect of the record's step.
fn perform(operation: &Operation, now: Moment, effects: &mut impl Effects) -> Effected<Outcome> {
    let done = |()| Outcome::Done;
    match operation.step {
        Step::Preflight => effects.preflight(operation).map(Outcome::Preflight),
        Step::Confirm => effects.confirm(operation).map(done),
        Step::PrepareSplit => effects.prepare_split(operation).map(done),
        Step::PrepareClone => effects.prepare_clone(operation).map(done),
        Step::Split => effects.split(operation).map(Outcome::Split),
        Step::BootClone => effects.boot_clone(operation).map(done),
        Step::AwaitBoot => effects.await_clone_boot(operation).map(Outcome::CloneBoot),
        Step::Integrate => effects.integrate(operation, false, None).map(Outcome::Round),
        Step::Probe => effects.probe(operation).map(Outcome::Answer),
        Step::HoldIngress => effects
            .hold_ingress(operation, lease_ms(operation, now))
            .map(done),
        Step::FreezeUserland => effects
            .freeze_userland(operation, lease_ms(operation, now))
            .map(done),
        Step::FinalIntegrate => {
            let deadline = operation.held_at.map(|held| held.plus(operation.plan.max_pause));
            effects.integrate(operation, true, deadline).map(Outcome::Round)
        }
        Step::Seal => effects
            .seal(operation, lease_ms(operation, now))
            .map(Outcome::Sealed),
        Step::Verify => effects.count_dirty(operation).map(Outcome::Dirty),
        Step::Pause => effects.pause(operation, lease_ms(operation, now)).map(done),
        Step::Commit => effects.commit(operation).map(done),
        Step::HandOverNetwork => effects.hand_over_network(operation).map(done),
        Step::ActivateClone => effects
            .activate_clone(operation, !operation.network_given)
            .map(done),
        Step::ActivateAgent => effects.activate_agent(operation).map(Outcome::Activation),
        Step::ColdBoot => effects.cold_boot(operation).map(done),
        Step::Retire => {
            let from = operation.committed_at.unwrap_or(now);
            let deadline = from.plus(operation.plan.retain_dormant);
            effects.retire(operation, deadline).map(done)
        }
        Step::Release => effects.release(operation).map(done),
        Step::ReadOwner => effects.read_owner(operation).map(Outcome::Owner),
        Step::ThawUserland => effects.thaw_userland(operation).map(done),
        Step::ThawFilesystems => effects.thaw_filesystems(operation).map(done),
        Step::EndCapture => effects.end_capture(operation).map(done),
        Step::KillClone => effects.kill_clone(operation).map(done),
        Step::DiscardClone => effects.discard_clone(operation).map(done),
        Step::FindDormant => effects.find_dormant(operation).map(Outcome::Dormancy),
        Step::HoldClone => effects
            .hold_clone(operation, lease_ms(operation, now))
            .map(Outcome::Held),
        Step::CommitBack => effects.commit_back(operation).map(done),
        Step::ActivateGuest => effects.activate_guest(operation).map(done),
        Step::Reinstate => effects.reinstate(operation).map(Outcome::Reinstated),
        Step::ReleaseClone => effects.release_clone(operation).map(done),
        // Only the clock and the user end that.
        Step::AwaitCutover | Step::Done => Ok(Outcome::Done),
    }
}

/// What is left of `maxPause`, in milliseconds: the guest's own VMM and agent end a hold that lasts longer,
/// whatever becomes of this agent.
fn lease_ms(operation: &Operation, now: Moment) -> u64 {
    let elapsed = operation.held_at.map_or(0, |held| now.since(held));
    let left = (operation.plan.max_pause - elapsed) / 1000;
    u64::try_from(left).unwrap_or(0).max(1)
}
