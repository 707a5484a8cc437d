//! The loop: record, act, learn, report. It has no thread of its own and keeps nothing that the record lacks.

use understudy_api::conditions::reasons;

use super::effects::{Effected, Effects, Report};
use super::journal::Journal;
use super::machine::{self, Action, Decision, Outcome};
use super::record::{Update, Verdict};

/// Pause between two tries to look at the host, in microseconds.
const HOST_LOOK: i64 = 500_000;
/// Pause between two tries to write a record that is waited for, in microseconds.
const JOURNAL_LOOK: i64 = 5_000_000;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Run {
    /// Nothing is left to do. Where [`Update::is_over`] the record can be forgotten; else sessions are kept,
    /// and the next run of the agent tries again.
    Finished(Update),
    /// The agent is being stopped; the update goes on from the journal.
    Stopped(Update),
}

/// Runs an update to its end on the calling thread: a new one, or one found in the journal (`recovered`).
pub fn run(
    update: Update,
    recovered: bool,
    effects: &mut impl Effects,
    journal: &mut impl Journal,
    report: &mut impl Report,
) -> Run {
    let mut update = update;
    if recovered {
        // Which boot this is decides everything.
        loop {
            match effects.inspect_host() {
                Ok(host) => {
                    update = machine::resume(update, &host, effects.now());
                    break;
                }
                Err(_) if effects.must_stop() => return Run::Stopped(update),
                Err(_) => {
                    let until = effects.now().plus(HOST_LOOK);
                    effects.wait(until);
                }
            }
        }
    }
    let mut on_disk = None;
    loop {
        let now = effects.now();
        let abort = effects.abort_requested(&update);
        let intent = effects.host_intent();
        update = machine::interrupt(update, abort, intent, now);
        update = machine::advance(update, now);
        match machine::next(&update, now) {
            Decision::Finished => {
                record(&update, &mut on_disk, journal, report);
                report.progress(&update);
                return Run::Finished(update);
            }
            Decision::Wait { until } => {
                report.progress(&update);
                if effects.must_stop() {
                    return Run::Stopped(update);
                }
                effects.wait(until);
            }
            Decision::Perform(action) => {
                if effects.must_stop() {
                    return Run::Stopped(update);
                }
                let is_recorded = !action.is_recorded() || record(&update, &mut on_disk, journal, report);
                if !is_recorded && action.waits_for_record(&update) {
                    report.progress(&update);
                    effects.wait(now.plus(JOURNAL_LOOK));
                    continue;
                }
                if !is_recorded && action.needs_record() {
                    let message = "the journal could not be written; see the node agent's log";
                    let verdict = Verdict::failed(reasons::STEP_FAILED, message);
                    machine::begin_undo(&mut update, verdict, now);
                    continue;
                }
                report.progress(&update);
                let result = perform(&update, action, effects);
                update = machine::apply(update, action, result, effects.now());
            }
        }
    }
}

/// Makes the record durable where it is not so already.
fn record(
    update: &Update,
    on_disk: &mut Option<Update>,
    journal: &mut impl Journal,
    report: &mut impl Report,
) -> bool {
    let durable = update.durable_part();
    if on_disk.as_ref() == Some(&durable) {
        return true;
    }
    match journal.write(update) {
        Ok(()) => {
            *on_disk = Some(durable);
            true
        }
        Err(error) => {
            report.journal_trouble(update, &error.to_string());
            false
        }
    }
}

/// Performs an effect.
fn perform(update: &Update, action: Action, effects: &mut impl Effects) -> Effected<Outcome> {
    let done = |()| Outcome::Done;
    let session = |index: usize| &update.sessions[index];
    match action {
        Action::Inspect => effects.inspect_host().map(Outcome::Host),
        Action::RunCommand => effects.run_command(update).map(Outcome::Command),
        Action::Quiesce(rules) => effects.quiesce_operations(update, &rules).map(Outcome::InFlight),
        Action::Preflight => effects.preflight(update).map(Outcome::Preflight),
        Action::RegisterKey(index) => effects.register_key(update, session(index)).map(done),
        Action::Save(index, lease_ms) => effects.save(update, session(index), lease_ms).map(Outcome::Saved),
        Action::Pause(index) => effects.pause_for_save(update, session(index)).map(Outcome::Saved),
        Action::Keep(index, lease_ms) => effects
            .keep_saved(update, session(index), lease_ms)
            .map(Outcome::Saved),
        Action::InspectCheckpoint(index) => effects
            .inspect_checkpoint(update, session(index))
            .map(Outcome::Checkpoint),
        Action::Acknowledge => effects.acknowledge(update).map(done),
        Action::Reboot => effects.request_reboot(update).map(done),
        Action::EndCommand => effects.end_command(update).map(done),
        Action::CallOff => effects.call_off_reboot(update).map(done),
        Action::Cancel(index) => effects.cancel_save(update, session(index)).map(done),
        Action::ObtainKey(index) => effects.obtain_key(update, session(index)).map(done),
        Action::Resume(index) => effects.resume(update, session(index)).map(Outcome::Resumption),
        Action::Release => effects.release_operations(update).map(done),
        Action::LookAfter(index) => effects.look_after(update, session(index)).map(Outcome::Settling),
        Action::Destroy(index) => effects.destroy(update, session(index)).map(done),
    }
}
