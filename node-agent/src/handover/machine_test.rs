use super::super::sim::new_operation;
use super::*;
use crate::handover::effects::{EffectError, ErrorKind, Preflight};
use understudy_api::reboot::CutoverMode;
use understudy_vmm_control::owner::Owner;

const KINDS: [ErrorKind; 5] = [
    ErrorKind::Retry,
    ErrorKind::Refused,
    ErrorKind::Lapsed,
    ErrorKind::GuestGone,
    ErrorKind::CloneGone,
];

fn at(boot_us: i64) -> Moment {
    Moment {
        unix_us: boot_us,
        boot_us,
    }
}

/// An operation at a step, in the phase that the step belongs to.
fn operation(step: Step) -> Operation {
    let mut operation = new_operation();
    let phases = [
        Phase::Confirmed,
        Phase::Cloning,
        Phase::Rebooting,
        Phase::Integrating,
        Phase::CuttingOver,
    ];
    let reached = match step {
        Step::Preflight | Step::Confirm => 0,
        Step::PrepareSplit => 1,
        Step::PrepareClone | Step::Split => 2,
        Step::BootClone | Step::AwaitBoot => 3,
        Step::Integrate | Step::Probe | Step::AwaitCutover => 4,
        _ => 5,
    };
    for phase in &phases[..reached] {
        operation.enter(*phase, at(0));
    }
    operation.step = step;
    if step == Step::AwaitCutover {
        operation.plan.mode = CutoverMode::Manual;
        operation.enter(Phase::AwaitingCutover, at(0));
    }
    if step.is_rollback() {
        operation.enter(Phase::Succeeded, at(0));
        operation = super::rollback::begin(operation, at(0));
        operation.rollback.as_mut().unwrap().epoch = 9;
        operation.step = step;
    }
    if step.is_held() && step != Step::HoldIngress {
        operation.held_at = Some(at(0));
    }
    operation
}

fn deleted() -> Asked {
    Asked {
        abort: Some("deleted".to_owned()),
        action: None,
    }
}

#[test]
fn an_error_never_leads_towards_the_commit_nor_back_behind_it() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Done) {
        for kind in KINDS {
            let before = operation(step);
            let error = EffectError::new(kind, "it did not happen");
            let after = apply(before.clone(), Err(error), at(1), at(1));
            let told = format!("{step:?} with {kind:?} became {:?}", after.step);
            if step.is_rollback() {
                // Nor into a cutover; where the way back ends, the reboot has succeeded as before.
                let ended = after.step == Step::Done;
                assert_eq!(ended, after.verdict.is_some(), "{told}");
                assert!(!ended || after.phase() == Phase::Succeeded, "{told}");
                let undoes = matches!(after.step, Step::KillClone | Step::ReadOwner);
                assert!(ended || undoes || after.step.is_rollback(), "{told}");
                assert!(after.step != Step::CommitBack, "{told}");
            } else if step.is_forward() {
                let stays = after.step == step && kind == ErrorKind::Retry && !step.is_held();
                let ended = step == Step::Preflight && after.step == Step::Done;
                assert!(stays || ended || after.step == Step::Release, "{told}");
            } else if step.is_committed() {
                assert!(after.step.is_committed() && after.step >= step, "{told}");
                assert!(after.verdict.is_none(), "{told}");
            } else {
                assert!(!after.step.is_forward() && !after.step.is_committed(), "{told}");
            }
        }
    }
}

#[test]
fn only_the_owner_file_leads_over_the_commit_point_after_doubt() {
    let mut operation = operation(Step::Commit);
    operation.before = Some(Preflight {
        incarnation: 3,
        epoch: 7,
        boot_id: String::new(),
        kernel_release: String::new(),
        booted_at: 0,
        failed_units: Vec::new(),
    });
    let silent = EffectError::new(ErrorKind::Retry, "no answer");
    let doubtful = apply(operation.clone(), Err(silent), at(1), at(1));
    assert_eq!(doubtful.step, Step::Release);
    let asked = apply(doubtful, Ok(Outcome::Done), at(2), at(2));
    assert_eq!(asked.step, Step::ReadOwner);
    let owner = |epoch, incarnation, layer| Owner {
        version: 1,
        epoch,
        incarnation,
        layer: Some(layer),
    };
    let (guest, clone) = (operation.guest_layer, operation.clone_layer);
    for (owner, step) in [
        (owner(7, 3, guest), Step::ThawUserland),
        (owner(8, 4, clone), Step::HandOverNetwork),
        // Booted anew since: forward; of another operation: not ours.
        (owner(9, 5, clone), Step::HandOverNetwork),
        (owner(8, 4, guest), Step::ThawUserland),
    ] {
        let next = apply(asked.clone(), Ok(Outcome::Owner(owner.clone())), at(3), at(3));
        assert_eq!(next.step, step, "{owner:?}");
    }
}

#[test]
fn an_abort_that_comes_after_the_commit_is_forgotten() {
    for step in Step::ALL {
        let before = operation(step);
        let after = interrupt(before.clone(), deleted(), at(1));
        let may_abort =
            step.is_forward() || [Step::Release, Step::ReadOwner, Step::ThawUserland].contains(&step);
        let aborts = after.undo.is_some() || after.verdict.is_some();
        assert_eq!(aborts, may_abort, "{step:?}");
        if !may_abort {
            assert_eq!(after, before);
        }
    }
}

#[test]
fn each_phase_has_its_own_limit_and_says_which() {
    for (step, field) in [
        (Step::Preflight, "pending"),
        (Step::PrepareSplit, "cloning"),
        (Step::Split, "cloning"),
        (Step::AwaitBoot, "rebooting"),
        (Step::Integrate, "integrating"),
        (Step::AwaitCutover, "awaitingCutover"),
    ] {
        let just = |at_us| interrupt(operation(step), Asked::default(), at(at_us));
        let limit = match field {
            "pending" => operation(step).plan.pending,
            "cloning" => operation(step).plan.cloning,
            "rebooting" => operation(step).plan.rebooting,
            "awaitingCutover" => operation(step).plan.awaiting_cutover,
            _ => operation(step).plan.integrating,
        };
        assert_eq!(just(limit - 1).step, step);
        let after = just(limit);
        let verdict = after.undo.or(after.verdict).unwrap();
        assert!(
            verdict.message.contains(&format!("timeouts.{field}")),
            "{}",
            verdict.message
        );
    }
    let held = interrupt(
        operation(Step::Seal),
        Asked::default(),
        at(operation(Step::Seal).plan.max_pause),
    );
    assert_eq!((held.step, held.undo), (Step::Release, None));
}

#[test]
fn what_a_restarted_agent_finds_in_a_cutover_is_taken_back() {
    for step in Step::ALL {
        let found = resume(operation(step), at(1));
        let held = step.is_held() || step == Step::Commit;
        let wanted = match step {
            Step::HoldClone | Step::CommitBack => Step::ReleaseClone,
            _ if held => Step::Release,
            _ => step,
        };
        assert_eq!(found.step, wanted);
    }
}
