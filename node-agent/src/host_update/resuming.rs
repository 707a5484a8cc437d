//! Sessions after the host's reboot: keys, resuming, what cannot be resumed, and cleaning up.

use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::SessionState;
use understudy_vmm_control::session::Refusal;

use super::effects::{CheckpointFacts, EffectError, Effected, ErrorKind, HostFacts, Resumption, Settling};
use super::machine::{Action, Decision, Outcome, SECOND, boot_of, is_decided, try_again};
use super::record::{Session, Step, Update, Verdict};
use crate::moment::Moment;

/// How long a provider, or a start of a VMM, is tried again without success.
const SESSION_PATIENCE: i64 = 60 * SECOND;
/// How long a resumed guest runs before its checkpoint and key are destroyed.
pub const SETTLE: i64 = 60 * SECOND;
/// Pause between two looks at a guest whose memory is still being loaded.
const SETTLE_LOOK: i64 = SECOND;
/// How long the removal of a checkpoint is tried.
const DESTROY_PATIENCE: i64 = 30 * SECOND;

/// The host has booted anew since the record was written.
pub(super) fn rebooted(update: &mut Update, host: &HostFacts, now: Moment) {
    update.trouble = None;
    update.look_at = None;
    // A time of the boot before, such as that of the next try, says nothing in this one.
    for session in &mut update.sessions {
        session.trouble = None;
    }
    update.going_down = None;
    match update.phase() {
        NodeUpdatePhase::Pending | NodeUpdatePhase::Notified => went_down_early(update),
        phase if phase.is_terminal() => {
            if update.sessions.iter().any(is_tried_again) {
                log_on(update, host, now);
            } else {
                // What goes on no more, because the host went down without us, leaves files behind.
                update.step = Step::Release;
            }
        }
        phase => {
            if phase == NodeUpdatePhase::Acknowledged {
                update.enter(NodeUpdatePhase::Rebooting, now);
            }
            log_on(update, host, now);
        }
    }
}

/// Sessions that could not be resumed are tried again by an agent that was started anew in the same boot, whether
/// others still settle or not. Before the host has rebooted there is nothing to try.
pub(super) fn try_kept_again(update: &mut Update, host: &HostFacts, now: Moment) {
    if update.after.is_some() && update.sessions.iter().any(is_tried_again) {
        log_on(update, host, now);
    }
}

fn is_tried_again(session: &Session) -> bool {
    match session.state {
        SessionState::Kept => !session.is_damaged,
        SessionState::Saving | SessionState::Saved | SessionState::Resuming => true,
        _ => false,
    }
}

/// The host went down before anything was being saved: nothing is there to be resumed.
fn went_down_early(update: &mut Update) {
    for session in &mut update.sessions {
        Update::lost(session, "the host went down before it was being saved");
    }
    if update.undo.is_none() {
        let message = "the host went down before sessions were being saved; its guests boot anew";
        update.undo = Some(Verdict::failed(reasons::HOST_WENT_DOWN, message));
    }
    update.step = Step::Forget;
}

fn log_on(update: &mut Update, host: &HostFacts, now: Moment) {
    if update.boot_before() != host.boot_id {
        update.after = Some(boot_of(host));
        update.after_booted_at = host.booted_at;
        update.after_agent_at = host.agent_started_at;
    }
    update.enter(NodeUpdatePhase::LoggingOn, now);
    update.step = Step::LogOn;
    for session in &mut update.sessions {
        session.is_inspected = false;
        session.has_key = false;
        session.resume_began = None;
        match session.state {
            SessionState::Waiting | SessionState::RunsOn => {
                Update::lost(session, "it was not saved when the host went down");
            }
            SessionState::Kept if !session.is_damaged => session.state = SessionState::Saved,
            _ => {}
        }
    }
}

/// Takes the steps that sessions are ready for.
pub(super) fn advance(update: &mut Update, now: Moment) {
    match update.step {
        Step::LogOn => {
            let is_ready =
                |session: &Session| is_decided(session.state) || session.is_inspected && session.has_key;
            if update.sessions.iter().all(is_ready) {
                // The post-reboot notification: recorded before anything is resumed because of it.
                update.enter(NodeUpdatePhase::Resuming, now);
                update.step = Step::Resume;
            }
        }
        Step::Resume => {
            if update.sessions.iter().all(|session| is_decided(session.state)) {
                if update.verdict.is_none() {
                    let verdict = conclude(update);
                    update.decide(verdict, now);
                }
                update.step = Step::Release;
                return;
            }
            if let Some(index) = next_to_resume(update, now) {
                let session = &mut update.sessions[index];
                session.state = SessionState::Resuming;
                session.resume_began = session.resume_began.or(Some(now));
            }
        }
        Step::Settle => {
            let is_settled = |session: &Session| session.is_settled || session.state == SessionState::Kept;
            if update.sessions.iter().all(is_settled) {
                update.step = Step::Done;
            }
        }
        _ => {}
    }
}

/// Whose turn it is: by priority, then by name; who waits for another try lets the next one go first.
fn next_to_resume(update: &Update, now: Moment) -> Option<usize> {
    (0..update.sessions.len())
        .filter(|index| {
            let session = &update.sessions[*index];
            !is_decided(session.state) && session.waits_until(now).is_none()
        })
        .min_by_key(|index| (std::cmp::Reverse(update.sessions[*index].priority), *index))
}

/// The next session that something is to be done for.
pub(super) fn next(update: &Update, now: Moment) -> Decision {
    if update.step == Step::Resume
        && let Some(index) = next_to_resume(update, now)
    {
        return Decision::Perform(Action::Resume(index));
    }
    let mut wait: Option<Moment> = None;
    for (index, session) in update.sessions.iter().enumerate() {
        let Some(action) = action(update, index, session, now) else {
            continue;
        };
        match session.waits_until(now) {
            None if update.step != Step::Resume => return Decision::Perform(action),
            None => {}
            Some(until) => {
                let is_sooner = wait.is_none_or(|wait| until.since(now) < wait.since(now));
                wait = if is_sooner { Some(until) } else { wait };
            }
        }
    }
    Decision::Wait {
        until: wait.unwrap_or(now.plus(SECOND)),
    }
}

fn action(update: &Update, index: usize, session: &Session, now: Moment) -> Option<Action> {
    match update.step {
        Step::LogOn if is_decided(session.state) => None,
        Step::LogOn if !session.is_inspected => Some(Action::InspectCheckpoint(index)),
        Step::LogOn if !session.has_key => Some(Action::ObtainKey(index)),
        Step::Resume if !is_decided(session.state) => Some(Action::Resume(index)),
        Step::Settle if session.is_settled => None,
        Step::Settle => match session.state {
            SessionState::Kept => None,
            SessionState::Resumed if !is_due_to_be_destroyed(session, now) => Some(Action::LookAfter(index)),
            _ => Some(Action::Destroy(index)),
        },
        _ => None,
    }
}

/// A look at the guest sets when it has run for long enough.
fn is_due_to_be_destroyed(session: &Session, now: Moment) -> bool {
    session.live.is_loaded
        && session
            .first_instruction
            .is_none_or(|first| now.since(first) >= SETTLE)
}

/// In an undo: what is void and not yet removed.
pub(super) fn next_to_destroy(update: &Update) -> Option<usize> {
    update
        .sessions
        .iter()
        .position(|session| session.state != SessionState::Kept && !session.is_settled)
}

/// What becomes of one session.
pub(super) fn apply(
    update: &mut Update,
    action: Action,
    index: usize,
    result: Effected<Outcome>,
    now: Moment,
) {
    if let Action::Destroy(_) = action {
        destroyed(&mut update.sessions[index], result, now);
        return;
    }
    match result {
        Ok(outcome) => {
            update.sessions[index].trouble = None;
            succeeded(update, action, index, outcome, now);
        }
        Err(error) => failed(update, action, index, &error, now),
    }
}

fn succeeded(update: &mut Update, action: Action, index: usize, outcome: Outcome, now: Moment) {
    let acknowledged = update.acknowledged;
    let session = &mut update.sessions[index];
    match (action, outcome) {
        (Action::InspectCheckpoint(_), Outcome::Checkpoint(facts)) => match facts {
            CheckpointFacts::Complete => session.is_inspected = true,
            CheckpointFacts::Running => {
                session.state = SessionState::Resumed;
                session.first_instruction = session.first_instruction.or(Some(now));
            }
            // It was promised: that it is not there is told, and nothing runs in its place.
            CheckpointFacts::Missing if acknowledged && session.saved_at.is_some() => {
                Update::kept(
                    session,
                    Refusal::CheckpointMissing.as_str(),
                    "its checkpoint is not there, or not complete",
                );
            }
            CheckpointFacts::Missing => Update::lost(session, "it was not saved when the host went down"),
            CheckpointFacts::Consumed => Update::lost(
                session,
                "it went on after an earlier reboot, and ended before this one",
            ),
            CheckpointFacts::Unwanted => {
                session.reason = None;
                Update::lost(session, "the guest goes on without it");
            }
        },
        (Action::ObtainKey(_), _) => session.has_key = true,
        (Action::Resume(_), Outcome::Resumption(Resumption::Runs { first_instruction })) => {
            session.state = SessionState::Resumed;
            session.first_instruction = Some(first_instruction);
            session.reason = None;
            session.message = None;
        }
        (Action::Resume(_), Outcome::Resumption(Resumption::Refused { refusal, message })) => {
            // A guest that was told to run on, or whose lease ran out, has made its checkpoint void: there
            // is no session any more, and never was one promised.
            let void = matches!(refusal, Refusal::CheckpointMissing | Refusal::CheckpointStale);
            if void && !acknowledged {
                Update::lost(session, message);
            } else {
                Update::kept(session, refusal.as_str(), message);
            }
        }
        (Action::LookAfter(_), Outcome::Settling(settling)) => match settling {
            Settling::Loading => session.live.look_at = Some(now.plus(SETTLE_LOOK)),
            Settling::Loaded => {
                session.live.is_loaded = true;
                let first = session.first_instruction.unwrap_or(now);
                session.live.look_at = Some(first.plus(SETTLE));
            }
            Settling::Gone => {
                session.live.is_loaded = true;
                session.first_instruction = None;
            }
            Settling::Damaged { message } => {
                session.is_damaged = true;
                Update::kept(session, Refusal::CheckpointDamaged.as_str(), message);
            }
        },
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

fn failed(update: &mut Update, action: Action, index: usize, error: &EffectError, now: Moment) {
    let session = &mut update.sessions[index];
    if let (Action::Resume(_), ErrorKind::GuestGone) = (action, error.kind) {
        // Consumed: it has run, and what it wrote since is on its disks.
        Update::lost(session, error.message.clone());
        return;
    }
    let usual = match action {
        Action::ObtainKey(_) => reasons::CREDENTIAL_UNAVAILABLE,
        _ => reasons::STEP_FAILED,
    };
    let lasted = try_again(&mut session.trouble, error, usual, now);
    if matches!(action, Action::LookAfter(_)) || error.kind == ErrorKind::Awaited {
        return;
    }
    if error.kind != ErrorKind::Retry || lasted >= SESSION_PATIENCE {
        let reason = match error.reason {
            "" => usual,
            reason => reason,
        };
        Update::kept(session, reason, error.message.clone());
    }
}

/// A checkpoint that is of no more use is gone, or left behind.
fn destroyed(session: &mut Session, result: Effected<Outcome>, now: Moment) {
    let is_over = match result {
        Ok(_) => true,
        Err(error) => {
            let lasted = try_again(&mut session.trouble, &error, reasons::STEP_FAILED, now);
            error.kind != ErrorKind::Retry || lasted >= DESTROY_PATIENCE
        }
    };
    if is_over {
        session.trouble = None;
        session.is_settled = true;
    }
}

/// How the update ended, once the fate of every session is known.
fn conclude(update: &Update) -> Verdict {
    let of = |state| {
        update
            .sessions
            .iter()
            .filter(move |session| session.state == state)
    };
    let (all, resumed) = (update.sessions.len(), of(SessionState::Resumed).count());
    let mut message = format!("{resumed} of {all} sessions go on");
    for (state, text) in [
        (SessionState::Lost, "lost"),
        (SessionState::Kept, "kept, not resumed"),
    ] {
        for session in of(state) {
            let reason = session.reason.as_deref().unwrap_or(reasons::STEP_FAILED);
            let why = session.message.as_deref().unwrap_or_default();
            message.push_str(&format!("; {text}: {} ({reason}: {why})", session.guest));
        }
    }
    if let Some(undo) = &update.undo {
        message = format!("{}; then the host went down, and {message}", undo.message);
        return Verdict::failed(&undo.reason, message);
    }
    if of(SessionState::Lost).count() > 0 {
        return Verdict::failed(reasons::SESSION_LOST, message);
    }
    if of(SessionState::Kept).count() > 0 {
        return Verdict::failed(reasons::SESSION_REFUSED, message);
    }
    let kernel = update
        .after
        .as_ref()
        .map(|after| after.kernel_release.as_str())
        .unwrap_or_default();
    if let Some(expect) = &update.plan.expect
        && let Err(missed) = expect.satisfied_by(kernel, update.after_booted_at)
    {
        let message = format!("{message}, but {missed}");
        return Verdict::failed(reasons::EXPECTATION_NOT_MET, message);
    }
    Verdict::resumed(
        reasons::SESSIONS_RESUMED,
        format!("the host runs kernel {kernel}; {message}"),
    )
}
