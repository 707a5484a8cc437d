use understudy_api::host_update::RebootMethod;
use uuid::Uuid;

use super::super::effects::FoundGuest;
use super::super::plan::Plan;
use super::*;

fn at(micros: i64) -> Moment {
    Moment {
        unix_us: 1_700_000_000 * SECOND + micros,
        boot_us: micros,
    }
}

fn host(boot: &str) -> HostFacts {
    HostFacts {
        boot_id: boot.to_owned(),
        kernel_release: "6.1.0-50-amd64".to_owned(),
        booted_at: 1,
        agent_started_at: 2,
    }
}

fn new(origin: Origin) -> Update {
    let plan = Plan {
        origin,
        reason: None,
        command: vec!["/usr/bin/true".to_owned()],
        command_timeout: 60 * SECOND,
        expect: None,
        reboot: RebootMethod::Systemd,
        reboot_command: Vec::new(),
        reboot_timeout: 600 * SECOND,
        credential_provider: None,
        save_timeout: 600 * SECOND,
    };
    Update::new("u".to_owned(), "kernel-1".to_owned(), plan, at(0))
}

/// An update as it is in a run without trouble when it comes to this step.
fn update(step: Step) -> Update {
    use NodeUpdatePhase::*;
    let mut update = new(Origin::HostUpdate);
    update.before = Some(boot_of(&host("one")));
    let phases: &[NodeUpdatePhase] = match step {
        Step::Inspect => &[],
        Step::RunCommand | Step::Quiesce | Step::Preflight | Step::RegisterKeys | Step::EndCommand => {
            &[Notified]
        }
        Step::Save | Step::Verify | Step::Cancel | Step::Forget => &[Notified, Saving],
        Step::Acknowledge | Step::Reboot => &[Notified, Saving, Acknowledged],
        Step::AwaitReboot | Step::CallOff => &[Notified, Saving, Acknowledged, Rebooting],
        Step::LogOn => &[Notified, Saving, Acknowledged, Rebooting, LoggingOn],
        Step::Resume => &[Notified, Saving, Acknowledged, Rebooting, LoggingOn, Resuming],
        Step::Release | Step::Settle | Step::Done => &[
            Notified,
            Saving,
            Acknowledged,
            Rebooting,
            LoggingOn,
            Resuming,
            Resumed,
        ],
    };
    for phase in phases {
        update.enter(*phase, at(0));
    }
    update.acknowledged = phases.contains(&Acknowledged);
    update.reboot_asked = phases.contains(&Rebooting);
    update.verified_at = update.acknowledged.then(|| at(0));
    update.step = step;
    for (name, priority) in [("a", 0), ("b", 5), ("c", 0)] {
        let mut session = Session::new(FoundGuest {
            guest: format!("default/{name}"),
            uid: name.to_owned(),
            incarnation: 1,
            checkpoint: Uuid::nil(),
            priority,
            memory_bytes: 1 << 30,
            expected_bytes: 1 << 29,
            problem: None,
        });
        session.key_registered = true;
        session.state = match step {
            _ if step < Step::Save => SessionState::Waiting,
            Step::Save => SessionState::Saving,
            Step::Release | Step::Settle | Step::Done => SessionState::Resumed,
            _ => SessionState::Saved,
        };
        if step >= Step::LogOn {
            (session.is_inspected, session.has_key) = (true, step >= Step::Resume);
        }
        if step > Step::Save {
            (session.paused_at, session.saved_at) = (Some(at(0)), Some(at(0)));
        }
        update.sessions.push(session);
    }
    update
}

#[test]
fn sessions_are_resumed_by_priority_then_by_name() {
    let mut update = update(Step::Resume);
    let mut order = Vec::new();
    loop {
        update = advance(update, at(0));
        let Decision::Perform(Action::Resume(index)) = next(&update, at(0)) else {
            break;
        };
        order.push(update.sessions[index].guest.clone());
        let runs = Resumption::Runs {
            first_instruction: at(0),
        };
        update = apply(
            update,
            Action::Resume(index),
            Ok(Outcome::Resumption(runs)),
            at(0),
        );
    }
    assert_eq!(order, ["default/b", "default/a", "default/c"]);
}

#[test]
fn a_session_that_waits_for_another_try_lets_the_next_one_go_first() {
    let update = advance(update(Step::Resume), at(0));
    let silent = EffectError::new(ErrorKind::Retry, "no answer");
    let update = apply(update, Action::Resume(1), Err(silent), at(0));
    let update = advance(update, at(0));
    assert_eq!(next(&update, at(0)), Decision::Perform(Action::Resume(0)));
}

#[test]
fn nothing_asks_for_the_reboot_before_every_session_was_seen_saved() {
    for missing in 0..3 {
        let mut update = update(Step::Verify);
        for (index, session) in update.sessions.iter_mut().enumerate() {
            session.live.is_verified = index != missing;
        }
        let update = advance(update, at(0));
        assert_eq!(update.step, Step::Verify);
        assert!(!update.acknowledged || missing > 3);
    }
    let mut all = update(Step::Verify);
    for session in &mut all.sessions {
        session.live.is_verified = true;
    }
    let all = advance(all, at(0));
    assert_eq!(all.step, Step::Acknowledge);
    assert_eq!(all.phase(), NodeUpdatePhase::Acknowledged);
    // And the record of it is durable first.
    assert!(Action::Acknowledge.needs_record() && Action::Reboot.needs_record());
}

#[test]
fn a_restarted_agent_asks_again_before_it_reboots_on_old_knowledge() {
    for step in Step::ALL {
        let found = resume(update(step), &host("one"), at(1));
        let expected = match step {
            Step::Acknowledge | Step::Reboot => Step::Verify,
            step => step,
        };
        assert_eq!(found.step, expected, "{step:?}");
    }
    let late = advance(update(Step::Reboot), at(VERIFIED_FOR));
    assert_eq!(late.step, Step::Verify);
}

#[test]
fn another_boot_leads_to_logging_on_wherever_sessions_were_being_saved() {
    for step in Step::ALL {
        let found = resume(update(step), &host("two"), at(1));
        match step {
            Step::Inspect
            | Step::RunCommand
            | Step::Quiesce
            | Step::Preflight
            | Step::RegisterKeys
            | Step::EndCommand => {
                assert_eq!(found.step, Step::Forget, "{step:?}");
                assert_eq!(found.undo.unwrap().reason, reasons::HOST_WENT_DOWN);
            }
            Step::Release | Step::Settle | Step::Done => assert_eq!(found.step, Step::Release, "{step:?}"),
            _ => {
                assert_eq!(found.step, Step::LogOn, "{step:?}");
                assert_eq!(found.after.as_ref().unwrap().boot_id, "two");
            }
        }
    }
}

#[test]
fn an_update_without_a_command_does_not_wait_for_one() {
    let mut update = update(Step::RunCommand);
    (update.plan.command, update.plan.command_timeout) = (Vec::new(), 0);
    let update = interrupt(update, None, HostIntent::StaysUp, at(0));
    assert!(update.undo.is_none());
    assert_eq!(advance(update, at(0)).step, Step::Quiesce);
}

#[test]
fn an_abort_that_comes_after_the_reboot_was_asked_for_is_forgotten() {
    for step in Step::ALL {
        let before = update(step);
        let after = interrupt(
            before.clone(),
            Some("deleted".to_owned()),
            HostIntent::StaysUp,
            at(1),
        );
        if step.is_before_reboot() {
            let verdict = after.undo.or(after.verdict).unwrap();
            assert_eq!(verdict.phase, NodeUpdatePhase::Aborted, "{step:?}");
            assert!(!after.acknowledged);
        } else {
            assert_eq!(after, before, "{step:?}");
        }
    }
}

#[test]
fn a_reboot_that_may_have_been_asked_for_is_called_off_before_any_guest_runs_on() {
    let mut update = update(Step::AwaitReboot);
    update.awaiting_since = Some(at(0));
    let limit = update.plan.reboot_timeout;
    let waits = interrupt(update.clone(), None, HostIntent::Unknown, at(limit - 1));
    assert_eq!(waits.step, Step::AwaitReboot);
    let late = interrupt(update, None, HostIntent::Unknown, at(limit));
    assert_eq!(late.step, Step::CallOff);
    assert_eq!(late.undo.as_ref().unwrap().reason, reasons::REBOOT_TIMED_OUT);
    let off = apply(late.clone(), Action::CallOff, Ok(Outcome::Done), at(limit));
    assert_eq!(off.step, Step::Cancel);
    // A host that goes down all the same keeps its guests paused.
    let refused = EffectError::new(ErrorKind::Refused, "the host is going down");
    let on = apply(late, Action::CallOff, Err(refused), at(limit));
    assert_eq!((on.step, on.undo), (Step::AwaitReboot, None));
}

#[test]
fn only_what_was_never_acknowledged_is_lost_when_its_checkpoint_is_void() {
    use understudy_vmm_control::session::Refusal;
    for refusal in Refusal::ALL {
        for acknowledged in [true, false] {
            let mut update = advance(update(Step::Resume), at(0));
            update.acknowledged = acknowledged;
            let refused = Resumption::Refused {
                refusal,
                message: "as the VMM says".to_owned(),
            };
            let update = apply(update, Action::Resume(1), Ok(Outcome::Resumption(refused)), at(0));
            let session = &update.sessions[1];
            let void = matches!(refusal, Refusal::CheckpointMissing | Refusal::CheckpointStale);
            let expected = if void && !acknowledged {
                SessionState::Lost
            } else {
                SessionState::Kept
            };
            assert_eq!(session.state, expected, "{refusal}, acknowledged: {acknowledged}");
            assert!(session.reason.is_some() && session.message.is_some());
        }
    }
}

#[test]
fn every_error_of_every_effect_of_the_host_leads_on_or_back_and_never_to_the_reboot() {
    for kind in [ErrorKind::Retry, ErrorKind::Refused, ErrorKind::GuestGone] {
        for (step, action) in [
            (Step::Inspect, Action::Inspect),
            (Step::RunCommand, Action::RunCommand),
            (Step::Preflight, Action::Preflight),
            (Step::Acknowledge, Action::Acknowledge),
            (Step::Reboot, Action::Reboot),
        ] {
            let error = EffectError::new(kind, "told why");
            let after = apply(update(step), action, Err(error), at(1));
            if kind == ErrorKind::Retry {
                assert_eq!(after.step, step);
                assert!(matches!(next(&after, at(1)), Decision::Wait { .. }), "{step:?}");
            } else {
                let verdict = after.undo.clone().or(after.verdict.clone()).unwrap();
                assert!(verdict.message.contains("told why"), "{step:?}");
                assert!(after.step > Step::AwaitReboot, "{step:?}: {:?}", after.step);
            }
        }
    }
}

#[test]
fn what_the_host_begins_it_may_call_off_and_what_a_host_update_began_goes_on() {
    let going = HostIntent::GoesDown {
        deadline: at(60 * SECOND),
        reason: "reboot".to_owned(),
    };
    let mut own = new(Origin::Host);
    own.before = Some(boot_of(&host("one")));
    own.enter(NodeUpdatePhase::Notified, at(0));
    own.step = Step::Quiesce;
    let own = interrupt(own, None, going.clone(), at(1));
    assert!(own.undo.is_none() && own.going_down.is_some());
    // An agent that does not know yet takes nothing back.
    let unsure = interrupt(own.clone(), None, HostIntent::Unknown, at(2));
    assert!(unsure.undo.is_none());
    let off = interrupt(own, None, HostIntent::StaysUp, at(2));
    assert_eq!(off.undo.unwrap().reason, reasons::REBOOT_CALLED_OFF);
    let insisted = interrupt(update(Step::RunCommand), None, going, at(1));
    assert_eq!(insisted.step, Step::Quiesce);
    let goes_on = interrupt(insisted, None, HostIntent::StaysUp, at(2));
    assert!(goes_on.undo.is_none() && goes_on.going_down.is_none());
}

#[test]
fn what_holds_already_is_left_alone() {
    let mut update = new(Origin::HostUpdate);
    update.plan.expect = Some(understudy_api::host_update::HostExpect {
        kernel_release: Some("6.1.0-50-amd64".to_owned()),
        booted_after: None,
    });
    let done = apply(update, Action::Inspect, Ok(Outcome::Host(host("one"))), at(1));
    assert!(done.is_over());
    assert_eq!(done.verdict.unwrap().reason, reasons::ALREADY_SATISFIED);
}

#[test]
fn a_restarted_agent_tries_a_kept_session_again_while_others_settle() {
    for step in [Step::Release, Step::Settle, Step::Done] {
        let mut update = update(step);
        update.after = Some(boot_of(&host("two")));
        Update::kept(&mut update.sessions[1], "CheckpointDamaged", "manifest: torn");
        let update = advance(resume(update, &host("two"), at(SECOND)), at(SECOND));
        assert_eq!(
            next(&update, at(SECOND)),
            Decision::Perform(Action::InspectCheckpoint(1)),
            "from {step:?}"
        );
        assert_eq!(update.sessions[0].state, SessionState::Resumed);
    }
}

#[test]
fn before_the_host_has_rebooted_a_kept_session_is_not_tried_and_nobody_is_called_lost() {
    for step in [Step::Settle, Step::Done] {
        let mut update = update(step);
        for session in &mut update.sessions {
            session.state = SessionState::RunsOn;
        }
        Update::kept(&mut update.sessions[1], "CheckpointSameBoot", "its VMM ended");
        let update = resume(update, &host("one"), at(SECOND));
        assert_eq!(update.step, step);
        assert_eq!(update.sessions[0].state, SessionState::RunsOn);
    }
}
