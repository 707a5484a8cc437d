//! The agent is cut at every point; then anything goes, thousands of times.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use understudy_api::Phase;
use understudy_api::conditions::reasons;
use understudy_api::reboot::{ActionType, CutoverMode};

use super::scenario::{Ended, Scenario, WITH_WAYS_BACK, play};
use super::world::{BootFate, Fault, MS, Readiness, SECOND};

/// Seeds that found a defect once, in the engine or in this world; each is played for ever.
const KEPT: &[u64] = &[
    // `prepare-split` arrives after the clone's layer was removed.
    14330,
    // Power is lost while a command is on its way; the guest that boots later must not get it.
    53932,
];

/// Plays a scenario and says how to play it again when it fails.
fn play_or_tell(scenario: &Scenario) -> Ended {
    match catch_unwind(AssertUnwindSafe(|| play(scenario))) {
        Ok(ended) => ended,
        Err(payload) => {
            eprintln!("failing scenario: {scenario:?}");
            eprintln!(
                "replay a wild one: UNDERSTUDY_SIM_SEED={} cargo test -p understudy-node one_seed",
                scenario.seed
            );
            resume_unwind(payload)
        }
    }
}

#[test]
fn one_seed() {
    if let Ok(seed) = std::env::var("UNDERSTUDY_SIM_SEED") {
        let ended = play_or_tell(&Scenario::wild(seed.parse().unwrap()));
        println!("{:?}\n{:?}", ended.verdict, ended.trace);
    }
}

#[test]
fn a_crash_at_any_point_costs_nothing_that_was_acknowledged_and_the_operation_ends() {
    let mut succeeded = 0;
    let mut played = 0;
    for seed in 0..4 {
        let points = play_or_tell(&Scenario::quiet(seed)).crash_points;
        assert!(points > 60, "only {points} crash points");
        for point in 1..=points {
            // The fate of a command that was on its way hangs on the seed's random numbers.
            let mut scenario = Scenario::quiet(seed);
            scenario.crash_at = vec![point];
            let ended = play_or_tell(&scenario);
            played += 1;
            succeeded += u64::from(ended.verdict.phase == Phase::Succeeded);
        }
    }
    // Only a crash around the split fails the reboot; all others are gone over.
    assert!(succeeded * 10 >= played * 9, "{succeeded} of {played} succeeded");
}

#[test]
fn two_crashes_at_any_two_points_are_gone_over_as_well() {
    let points = play_or_tell(&Scenario::quiet(5)).crash_points;
    for first in 1..=points {
        for after in (1..40).step_by(3) {
            let mut scenario = Scenario::quiet(5);
            scenario.crash_at = vec![first, first + after];
            play_or_tell(&scenario);
        }
    }
}

#[test]
fn a_crash_at_any_point_of_a_rollback_leaves_the_guest_with_one_owner_who_serves() {
    let (mut rolled_back, mut refused) = (0, 0);
    for seed in 0..4 {
        let mut scenario = Scenario::quiet(seed);
        let before = play_or_tell(&scenario).crash_points;
        scenario.rollback = Some(SECOND);
        let points = play_or_tell(&scenario).crash_points;
        assert!(points > before + 15, "only {} crash points", points - before);
        for point in before..=points {
            for after in [None, Some(1), Some(4), Some(9)] {
                scenario.crash_at = [point]
                    .into_iter()
                    .chain(after.map(|after| point + after))
                    .collect();
                match play_or_tell(&scenario).verdict.phase {
                    Phase::RolledBack => rolled_back += 1,
                    _ => refused += 1,
                }
            }
        }
    }
    // Whoever dies, the next one tries again.
    assert!(
        rolled_back > 300 && refused == 0,
        "{rolled_back} rolled back, {refused} not"
    );
}

#[test]
fn a_crash_at_any_point_of_a_manual_cutover_or_a_rehearsal_loses_nothing() {
    for mode in [CutoverMode::Manual, CutoverMode::Rehearse] {
        let mut scenario = Scenario::quiet(7);
        scenario.mode = mode;
        scenario.faults = vec![
            (8 * SECOND, Fault::Ask(Some(ActionType::Proceed))),
            // Git takes it out again.
            (9 * SECOND, Fault::Ask(None)),
        ];
        let whole = play_or_tell(&scenario);
        assert_eq!(whole.verdict.phase, Phase::Succeeded, "{:?}", whole.verdict);
        let mut succeeded = 0;
        for point in 1..=whole.crash_points {
            scenario.crash_at = vec![point];
            let ended = play_or_tell(&scenario);
            succeeded += u64::from(ended.verdict.phase == Phase::Succeeded);
        }
        let played = whole.crash_points;
        assert!(succeeded * 10 >= played * 9, "{mode:?}: {succeeded} of {played}");
    }
}

#[test]
fn a_pause_that_is_hard_to_keep_ends_one_way_or_the_other() {
    let (mut kept, mut given_up) = (0, 0);
    for seed in 0..300 {
        match play_or_tell(&Scenario::tight(seed)).verdict.phase {
            Phase::Succeeded => kept += 1,
            _ => given_up += 1,
        }
    }
    assert!(kept > 20 && given_up > 20, "{kept} kept, {given_up} given up");
}

#[test]
fn every_fault_at_any_time_is_survived() {
    for fault in [
        Fault::GuestDies,
        Fault::CloneDies,
        Fault::GuestResets,
        Fault::HostDies,
        Fault::Abort,
        Fault::JournalFull(true),
        Fault::AgentStops,
    ] {
        for step in 0..250 {
            let mut scenario = Scenario::quiet(step);
            let at = i64::try_from(step).unwrap() * 15 * MS;
            scenario.faults = vec![(at, fault), (at + 30 * SECOND, Fault::JournalFull(false))];
            play_or_tell(&scenario);
        }
    }
}

#[test]
fn a_clone_that_does_not_come_up_costs_nothing() {
    for fate in [
        BootFate::Hangs,
        BootFate::Panics,
        BootFate::FailsAUnit,
        BootFate::EmergencyShell,
        BootFate::OldKernel,
    ] {
        for seed in 0..20 {
            let mut scenario = Scenario::quiet(seed);
            scenario.boot_fate = fate;
            assert_eq!(play_or_tell(&scenario).verdict.phase, Phase::Failed, "{fate:?}");
        }
    }
}

#[test]
fn a_clone_that_is_not_ready_costs_nothing_and_one_that_becomes_so_takes_over() {
    for (readiness, mode, phase) in [
        (Readiness::Never, CutoverMode::Automatic, Phase::Failed),
        (Readiness::Never, CutoverMode::Rehearse, Phase::Failed),
        (Readiness::Late, CutoverMode::Automatic, Phase::Succeeded),
    ] {
        let mut scenario = Scenario::quiet(11);
        (scenario.readiness, scenario.mode) = (readiness, mode);
        let whole = play_or_tell(&scenario);
        assert_eq!(whole.verdict.phase, phase, "{:?}", whole.verdict);
        let told: Vec<_> = whole
            .operation
            .result
            .readiness
            .iter()
            .map(|told| told.ready)
            .collect();
        assert_eq!(told, [Some(true), Some(readiness == Readiness::Late)]);
        for point in 1..=whole.crash_points {
            scenario.crash_at = vec![point];
            play_or_tell(&scenario);
        }
    }
}

#[test]
fn thousands_of_wild_runs_keep_every_promise() {
    let runs = std::env::var("UNDERSTUDY_SIM_RUNS").map_or(4000, |runs| runs.parse().unwrap());
    let mut ends = [0u32; 5];
    let with_ways_back = WITH_WAYS_BACK..WITH_WAYS_BACK + runs;
    for seed in KEPT
        .iter()
        .copied()
        .chain(10_000..10_000 + runs)
        .chain(with_ways_back)
    {
        let ended = play_or_tell(&Scenario::wild(seed));
        match ended.verdict.phase {
            Phase::Succeeded if ended.verdict.reason == reasons::REHEARSED => ends[3] += 1,
            Phase::Succeeded => ends[0] += 1,
            Phase::Failed => ends[1] += 1,
            Phase::RolledBack => ends[4] += 1,
            _ => ends[2] += 1,
        }
    }
    // The world must not be so wild that nothing is reached any more, nor so tame.
    assert!(ends.iter().all(|count| *count > 50), "{ends:?}");
}
