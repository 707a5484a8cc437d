//! Sessions up to the host's reboot: keys, saves, and taking them back.

use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::SessionState;
use understudy_vmm_control::session::{Refusal, SaveState};

use super::effects::{CheckpointFacts, EffectError, Effected, ErrorKind, Preflight, SaveProgress};
use super::machine::{
    Action, Decision, Outcome, SECOND, begin_undo, is_decided, names, try_again, verify_again,
};
use super::record::{GoingDown, Session, Step, Update, Verdict};
use super::resuming::next_to_destroy;
use super::schedule;
use crate::moment::Moment;

/// Lease of a save, renewed while others are being saved: an agent that dies costs a pause of this length.
pub const SAVE_LEASE_MS: u64 = 120_000;
/// How long leases outlast `reboot.timeout` once all is saved.
const REBOOT_LEASE_BEYOND_MS: u64 = 600_000;
/// The longest lease that a VMM takes.
const LONGEST_LEASE_MS: u64 = 3_600_000;
/// Pause between two looks at a save, while the guest runs and while it is paused.
const SAVE_LOOK: i64 = SECOND / 10;
const PAUSE_LOOK: i64 = SECOND / 50;
/// Nearer to the host's deadline guests are paused each for itself, as soon as they are ready.
const HURRY: i64 = 60 * SECOND;
/// Pause between two renewals of a lease while others are being saved, and while the host is waited for.
const KEEP_LOOK: i64 = 20 * SECOND;
const AWAIT_LOOK: i64 = 60 * SECOND;
/// How long a VMM or a provider may fail to answer before the update does.
const SESSION_PATIENCE: i64 = 30 * SECOND;
/// How long a guest is told to run on before its state is called unknown.
const CANCEL_PATIENCE: i64 = 600 * SECOND;

/// Takes up what preflight found.
pub(super) fn preflighted(update: &mut Update, found: Preflight, now: Moment) {
    let is_forced = update.is_forced();
    if !is_forced && let Some(problem) = found.provider_problem {
        begin_undo(
            update,
            Verdict::failed(reasons::CREDENTIAL_UNAVAILABLE, problem),
            now,
        );
        return;
    }
    let problems: Vec<String> = found
        .guests
        .iter()
        .filter_map(|guest| {
            let problem = guest.problem.as_ref()?;
            Some(format!("{}: {problem}", guest.guest))
        })
        .collect();
    if !is_forced && !problems.is_empty() {
        begin_undo(
            update,
            Verdict::failed(reasons::PREFLIGHT_FAILED, problems.join("; ")),
            now,
        );
        return;
    }
    update.sessions = found
        .guests
        .into_iter()
        .map(|guest| {
            // The host does not wait: what cannot be saved is told to be lost, and the others are saved.
            let lost = match (&found.provider_problem, &guest.problem) {
                (Some(problem), _) => Some((reasons::CREDENTIAL_UNAVAILABLE, problem.clone())),
                (None, Some(problem)) => Some((reasons::PREFLIGHT_FAILED, problem.clone())),
                (None, None) => None,
            };
            let mut session = Session::new(guest);
            if let Some((reason, message)) = lost {
                session.given_up = true;
                session.explain(reason, message);
            }
            session
        })
        .collect();
    update.sessions.sort_by(|one, other| one.guest.cmp(&other.guest));
    update.step = Step::RegisterKeys;
}

/// Ends what takes too long.
pub(super) fn watch_the_clock(update: &mut Update, now: Moment) {
    if let Some(going) = &update.going_down {
        let (deadline, what) = (going.deadline, going.reason.clone());
        if deadline.since(now) > 0 {
            return;
        }
        let message = format!("the host's {what} did not wait until it was saved");
        for session in &mut update.sessions {
            if session.state == SessionState::Saved {
                session.live.is_verified = true;
            } else if !session.given_up && session.state != SessionState::RunsOn {
                session.given_up = true;
                session.explain(reasons::SESSION_LOST, message.clone());
            }
        }
        if update.step < Step::Save {
            if update.before.is_none() {
                return;
            }
            update.enter(NodeUpdatePhase::Notified, now);
            update.enter(NodeUpdatePhase::Saving, now);
            update.step = Step::Save;
            update.trouble = None;
        }
        return;
    }
    if update.step == Step::Save && now.since(update.phase_since()) >= update.plan.save_timeout {
        let late = names(
            update
                .sessions
                .iter()
                .filter(|session| session.state != SessionState::Saved),
        );
        let message = format!("saving took longer than sessions.timeout; not saved: {late}");
        begin_undo(update, Verdict::failed(reasons::TIMED_OUT, message), now);
    }
}

/// Takes the steps that sessions are ready for.
pub(super) fn advance(update: &mut Update, now: Moment) {
    match update.step {
        Step::RegisterKeys
            if update
                .sessions
                .iter()
                .all(|session| session.key_registered || session.given_up) =>
        {
            update.enter(NodeUpdatePhase::Saving, now);
            update.step = Step::Save;
        }
        Step::Save => {
            for index in schedule::due(&update.sessions, update.is_forced()) {
                update.sessions[index].state = SessionState::Saving;
            }
            if update.sessions.iter().all(is_done) {
                verify_again(update);
            }
        }
        Step::Verify => {
            let is_verified = |session: &Session| {
                session.state != SessionState::Saved || session.live.is_verified || session.vmm_gone
            };
            if update.sessions.iter().all(is_done) && update.sessions.iter().all(is_verified) {
                update.verified_at = Some(now);
                // Recorded before its effect: this is the acknowledgement.
                // (A host that thought better of it, after it was acknowledged, is told once more.)
                if update.phase() != NodeUpdatePhase::Rebooting {
                    update.enter(NodeUpdatePhase::Acknowledged, now);
                }
                update.acknowledged = true;
                update.step = Step::Acknowledge;
            }
        }
        Step::Cancel => {
            for session in &mut update.sessions {
                if session.state == SessionState::Waiting {
                    session.state = SessionState::RunsOn;
                }
            }
            if update.sessions.iter().all(|session| is_decided(session.state)) {
                update.step = Step::Forget;
            }
        }
        Step::Forget if next_to_destroy(update).is_none() => update.step = Step::Release,
        _ => {}
    }
}

/// Whether nobody waits for this session's save any more.
fn is_done(session: &Session) -> bool {
    match session.state {
        SessionState::Saved | SessionState::RunsOn => true,
        _ => session.given_up,
    }
}

/// The next session that something is to be done for.
pub(super) fn next(update: &Update, now: Moment) -> Decision {
    let mut wait: Option<Moment> = None;
    for (index, session) in update.sessions.iter().enumerate() {
        let Some(action) = action(update, index, session, now) else {
            continue;
        };
        match session.waits_until(now) {
            None => return Decision::Perform(action),
            Some(until) => {
                let is_sooner = wait.is_none_or(|wait| until.since(now) < wait.since(now));
                wait = if is_sooner { Some(until) } else { wait };
            }
        }
    }
    // The host's reboot, or a deadline, may be all that there is to wait for.
    Decision::Wait {
        until: wait.unwrap_or(now.plus(SECOND)),
    }
}

/// Whether a guest that is ready is paused now. It stays paused until the host has rebooted, so that all are
/// paused together, when the last one is ready; not where the host may not wait for that.
fn is_time_to_pause(update: &Update, now: Moment) -> bool {
    let hurries = |going: &GoingDown| going.deadline.since(now) < HURRY;
    update.going_down.as_ref().is_some_and(hurries)
        || update.sessions.iter().all(|session| match session.state {
            SessionState::Waiting => session.given_up,
            SessionState::Saving => session.given_up || session.vmm_gone || session.live.is_ready,
            _ => true,
        })
}

fn action(update: &Update, index: usize, session: &Session, now: Moment) -> Option<Action> {
    let look = Action::InspectCheckpoint(index);
    match (update.step, session.state) {
        (Step::RegisterKeys, _) => {
            (!session.key_registered && !session.given_up).then_some(Action::RegisterKey(index))
        }
        (Step::Save | Step::Verify, SessionState::Saving) if !session.given_up => {
            Some(match session.vmm_gone {
                true => look,
                false if session.live.is_ready && is_time_to_pause(update, now) => Action::Pause(index),
                false => Action::Save(index, SAVE_LEASE_MS),
            })
        }
        (Step::Save, SessionState::Saved) if !session.vmm_gone => Some(Action::Keep(index, SAVE_LEASE_MS)),
        (Step::Verify, SessionState::Saved) if !session.vmm_gone && !session.live.is_verified => {
            Some(Action::Keep(index, reboot_lease(update)))
        }
        (Step::AwaitReboot, SessionState::Saved) if !session.vmm_gone => {
            Some(Action::Keep(index, reboot_lease(update)))
        }
        (Step::Cancel, SessionState::Saving | SessionState::Saved) => Some(if session.vmm_gone {
            look
        } else {
            Action::Cancel(index)
        }),
        (Step::Forget, _) => (next_to_destroy(update) == Some(index)).then_some(Action::Destroy(index)),
        _ => None,
    }
}

/// A lease that outlasts the wait for the reboot.
fn reboot_lease(update: &Update) -> u64 {
    let timeout = u64::try_from(update.plan.reboot_timeout / 1000).unwrap_or(0);
    timeout
        .saturating_add(REBOOT_LEASE_BEYOND_MS)
        .min(LONGEST_LEASE_MS)
}

/// What becomes of one session.
pub(super) fn apply(
    update: &mut Update,
    action: Action,
    index: usize,
    result: Effected<Outcome>,
    now: Moment,
) {
    match result {
        Ok(outcome) => {
            update.sessions[index].trouble = None;
            succeeded(update, action, index, outcome, now);
        }
        Err(error) => failed(update, action, index, &error, now),
    }
}

fn succeeded(update: &mut Update, action: Action, index: usize, outcome: Outcome, now: Moment) {
    match (action, outcome) {
        (Action::RegisterKey(_), _) => update.sessions[index].key_registered = true,
        (Action::Save(..) | Action::Pause(_), Outcome::Saved(progress)) => {
            saved(update, action, index, progress, now)
        }
        (Action::Keep(..), Outcome::Saved(progress)) => {
            if progress.state == SaveState::Saved {
                let look = if update.step == Step::AwaitReboot {
                    AWAIT_LOOK
                } else {
                    KEEP_LOOK
                };
                let live = &mut update.sessions[index].live;
                live.look_at = Some(now.plus(look));
                live.is_verified = update.step == Step::Verify;
            } else {
                let why = progress
                    .error
                    .unwrap_or_else(|| "its lease ran out, and it runs on".to_owned());
                runs_on(update, index, reasons::SAVE_FAILED, &why, now);
            }
        }
        (Action::Cancel(_), _) => {
            let session = &mut update.sessions[index];
            session.state = SessionState::RunsOn;
            session.live.look_at = None;
        }
        (Action::InspectCheckpoint(_), Outcome::Checkpoint(facts)) => {
            vmm_ended(update, index, facts, now);
        }
        (action, outcome) => {
            let message = format!("{action:?} brought {outcome:?}, which is a defect of the node agent");
            failed(
                update,
                action,
                index,
                &EffectError::new(ErrorKind::Refused, message),
                now,
            );
        }
    }
}

fn saved(update: &mut Update, action: Action, index: usize, progress: SaveProgress, now: Moment) {
    let session = &mut update.sessions[index];
    session.rounds = progress.rounds;
    session.live.written_bytes = progress.written_bytes;
    session.live.remaining_bytes = progress.remaining_bytes;
    session.live.is_ready = matches!(progress.state, SaveState::Ready | SaveState::Pausing);
    match progress.state {
        SaveState::Ready if action == Action::Pause(index) => {
            session.live.look_at = Some(now.plus(PAUSE_LOOK));
        }
        SaveState::PreCopying | SaveState::Ready => session.live.look_at = Some(now.plus(SAVE_LOOK)),
        SaveState::Pausing => session.live.look_at = Some(now.plus(PAUSE_LOOK)),
        SaveState::Saved => {
            let pause = i64::try_from(progress.pause_us).unwrap_or(i64::MAX);
            session.state = SessionState::Saved;
            session.saved_bytes = progress.written_bytes;
            session.checkpoint_bytes = progress.checkpoint_bytes;
            session.saved_at = Some(now);
            session.paused_at = Some(now.plus(-pause));
            session.live.look_at = Some(now.plus(KEEP_LOOK));
        }
        SaveState::Failed => {
            let why = progress
                .error
                .unwrap_or_else(|| "the VMM did not say why".to_owned());
            runs_on(update, index, reasons::SAVE_FAILED, &why, now);
        }
        SaveState::Cancelled => {
            let why = "its lease ran out while the node agent was away";
            runs_on(update, index, reasons::SAVE_FAILED, why, now);
        }
    }
}

/// The guest runs, and is not saved: the update is undone, or the host, which goes down in any case, takes
/// the session with it.
fn runs_on(update: &mut Update, index: usize, reason: &str, why: &str, now: Moment) {
    let session = &mut update.sessions[index];
    session.state = SessionState::RunsOn;
    session.live.look_at = None;
    session.explain(reason, why);
    not_saved(update, index, reason, why, now);
}

/// A session will not be saved.
fn not_saved(update: &mut Update, index: usize, reason: &str, why: &str, now: Moment) {
    let session = &mut update.sessions[index];
    if session.reason.is_none() {
        session.explain(reason, why);
    }
    let guest = session.guest.clone();
    session.given_up = true;
    if update.undo.is_none() && !update.is_forced() {
        let message = format!(
            "the session of guest {guest} was not saved: {why}; the host is not rebooted, and every guest runs on"
        );
        begin_undo(update, Verdict::failed(reason, message), now);
    }
}

/// The VMM has ended: what it left decides.
fn vmm_ended(update: &mut Update, index: usize, facts: CheckpointFacts, now: Moment) {
    let undoing = update.step == Step::Cancel;
    let session = &mut update.sessions[index];
    session.live.look_at = None;
    if facts == CheckpointFacts::Complete {
        if undoing {
            // It cannot run on, and it is never booted cold over its checkpoint.
            Update::kept(
                session,
                Refusal::CheckpointSameBoot.as_str(),
                "its VMM ended after it was saved; it goes on when the host has rebooted",
            );
        } else {
            session.state = SessionState::Saved;
            session.saved_at = session.saved_at.or(Some(now));
            session.paused_at = session.paused_at.or(Some(now));
        }
        return;
    }
    let why = "its VMM ended before it was saved; the guest boots anew";
    Update::lost(session, why);
    session.explain(reasons::GUEST_DIED, why);
    if !undoing {
        not_saved(update, index, reasons::GUEST_DIED, why, now);
    }
}

fn failed(update: &mut Update, action: Action, index: usize, error: &EffectError, now: Moment) {
    let usual = match action {
        Action::RegisterKey(_) => reasons::CREDENTIAL_UNAVAILABLE,
        Action::Save(..) | Action::Pause(_) | Action::Keep(..) => reasons::SAVE_FAILED,
        _ => reasons::STEP_FAILED,
    };
    let (step, is_forced) = (update.step, update.is_forced());
    let session = &mut update.sessions[index];
    if error.kind == ErrorKind::GuestGone && !matches!(action, Action::RegisterKey(_)) {
        session.vmm_gone = true;
        session.trouble = None;
        session.live.look_at = None;
        return;
    }
    let lasted = try_again(&mut session.trouble, error, usual, now);
    let is_hopeless = error.kind != ErrorKind::Retry || lasted >= SESSION_PATIENCE;
    let reason = match error.reason {
        "" => usual,
        reason => reason,
    };
    if step == Step::Cancel {
        if lasted >= CANCEL_PATIENCE {
            let message = format!("whether it runs on is not known: {}", error.message);
            Update::kept(session, reason, message);
        }
        return;
    }
    match action {
        // While the host goes down its VMM may not answer any more: it is saved all the same.
        Action::Keep(..) if step == Step::AwaitReboot => {}
        // The host waits in any case: until its deadline there is time to try.
        _ if is_forced && error.kind == ErrorKind::Retry => {}
        _ if is_hopeless => {
            session.trouble = None;
            not_saved(update, index, reason, &error.message, now);
        }
        _ => {}
    }
}
