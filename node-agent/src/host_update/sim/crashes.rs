//! The agent is cut at every point; then anything goes, thousands of times.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use understudy_api::NodeUpdatePhase;

use super::scenario::{Ended, Scenario, play};
use super::world::{Fault, MS, SECOND};

/// Seeds that found a defect once, in the engine or in this world; each is played for ever.
const KEPT: &[u64] = &[
    // The host calls its reboot off after it was acknowledged; the update then asks for its own.
    10706,
    // A checkpoint was destroyed after a guest had gone on without it, and no record could be written.
    11153,
];

/// Plays a scenario and says how to play it again when it fails.
fn play_or_tell(scenario: &Scenario) -> Ended {
    match catch_unwind(AssertUnwindSafe(|| play(scenario))) {
        Ok(ended) => ended,
        Err(payload) => {
            eprintln!("failing scenario: {scenario:?}");
            eprintln!(
                "replay a wild one: UNDERSTUDY_SIM_SEED={} cargo test -p understudy-node one_host_seed",
                scenario.seed
            );
            resume_unwind(payload)
        }
    }
}

/// Whether every session goes on after the reboot.
fn goes_on(ended: &Ended) -> bool {
    ended.verdict.phase == NodeUpdatePhase::Resumed
}

#[test]
fn one_host_seed() {
    if let Ok(seed) = std::env::var("UNDERSTUDY_SIM_SEED") {
        let ended = play_or_tell(&Scenario::wild(seed.parse().unwrap()));
        println!("{:?}\n{:?}", ended.verdict, ended.trace);
    }
}

#[test]
fn a_crash_of_the_agent_at_any_point_costs_no_session() {
    for base in [Scenario::quiet, Scenario::forced, Scenario::kept_by_operator] {
        for seed in 0..3 {
            let points = play_or_tell(&base(seed)).crash_points;
            assert!(points > 40, "only {points} crash points");
            for point in 1..=points {
                let mut scenario = base(seed);
                scenario.crash_at = vec![point];
                let ended = play_or_tell(&scenario);
                assert!(goes_on(&ended), "seed {seed}, point {point}: {:?}", ended.verdict);
            }
        }
    }
}

#[test]
fn two_crashes_at_any_two_points_cost_none_either() {
    let points = play_or_tell(&Scenario::quiet(5)).crash_points;
    for first in (1..=points).step_by(2) {
        for after in (1..40).step_by(6) {
            let mut scenario = Scenario::quiet(5);
            scenario.crash_at = vec![first, first + after];
            let ended = play_or_tell(&scenario);
            assert_eq!(
                ended.verdict.phase,
                NodeUpdatePhase::Resumed,
                "{:?}",
                ended.verdict
            );
        }
    }
}

#[test]
fn an_agent_that_stays_away_longer_than_leases_costs_a_pause_and_no_more() {
    let points = play_or_tell(&Scenario::quiet(1)).crash_points;
    for point in 1..=points {
        let mut scenario = Scenario::quiet(1);
        scenario.crash_at = vec![point];
        scenario.away = 4000 * SECOND;
        play_or_tell(&scenario);
    }
}

#[test]
fn every_fault_at_any_time_is_survived() {
    for fault in [
        Fault::VmmDies(0),
        Fault::VmmDies(1),
        Fault::PowerLost,
        Fault::Abort,
        Fault::JournalFull(true),
        Fault::AgentStops,
        Fault::ProviderSilent(true),
        Fault::HostBegins { waits: 5 * SECOND },
        Fault::HostBegins { waits: 60 * SECOND },
        Fault::HostCallsOff,
    ] {
        for step in 0..120 {
            for base in [Scenario::quiet, Scenario::forced, Scenario::kept_by_operator] {
                let mut scenario = base(step);
                let at = i64::try_from(step).unwrap() * 250 * MS;
                scenario.faults = vec![
                    (at, fault),
                    (at + 30 * SECOND, Fault::JournalFull(false)),
                    (at + 30 * SECOND, Fault::ProviderSilent(false)),
                ];
                play_or_tell(&scenario);
            }
        }
    }
}

#[test]
fn power_lost_twice_costs_nothing_that_was_acknowledged() {
    for first in 0..50 {
        for second in 0..10 {
            for base in [Scenario::quiet, Scenario::kept_by_operator] {
                let mut scenario = base(first);
                let at = i64::try_from(first).unwrap() * 400 * MS;
                let again = at + SECOND + i64::from(second) * 5 * SECOND;
                scenario.faults = vec![(at, Fault::PowerLost), (again, Fault::PowerLost)];
                play_or_tell(&scenario);
            }
        }
    }
}

#[test]
fn thousands_of_wild_runs_keep_every_promise() {
    let runs = std::env::var("UNDERSTUDY_SIM_RUNS").map_or(3000, |runs| runs.parse().unwrap());
    let mut ends = [0u32; 3];
    for seed in KEPT.iter().copied().chain(10_000..10_000 + runs) {
        let ended = play_or_tell(&Scenario::wild(seed));
        match ended.verdict.phase {
            NodeUpdatePhase::Resumed => ends[0] += 1,
            NodeUpdatePhase::Failed => ends[1] += 1,
            _ => ends[2] += 1,
        }
    }
    // The world must not be so wild that nothing is reached any more, nor so tame.
    assert!(ends.iter().all(|count| *count > 30), "{ends:?}");
}
