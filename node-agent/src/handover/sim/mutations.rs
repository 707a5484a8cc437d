//! Engines with a step left out must fail the simulation: it finds what it is there to find.

use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::Once;

use super::scenario::{Scenario, WITH_WAYS_BACK, play};

/// What is left out, or believed, by mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The guest is confirmed to without capturing.
    ConfirmWithoutCapture,
    /// A split counts even where nobody knows whether file systems were frozen.
    TrustAnySplit,
    /// No round while the guest is held.
    NoFinalRound,
    /// The last round does not compare what is open.
    FinalRoundLikeAnyOther,
    /// Programs are not frozen.
    NoFreeze,
    /// Nothing is verified before the commit.
    NoVerify,
    /// A commit is carried out though its lease is over, or gates are open.
    CommitIgnoresLease,
    /// Taking back does not release the guest first.
    NoRelease,
    /// Whether the commit happened is remembered instead of read.
    OwnerFromMemory,
    /// Taking back does not thaw.
    NoThaw,
    /// An undo leaves the clone's VMM alone.
    NoKill,
    /// Taking a rollback back does not release the clone first.
    NoReleaseOfClone,
}

const ALL: [Mutation; 12] = [
    Mutation::ConfirmWithoutCapture,
    Mutation::TrustAnySplit,
    Mutation::NoFinalRound,
    Mutation::FinalRoundLikeAnyOther,
    Mutation::NoFreeze,
    Mutation::NoVerify,
    Mutation::CommitIgnoresLease,
    Mutation::NoRelease,
    Mutation::OwnerFromMemory,
    Mutation::NoThaw,
    Mutation::NoKill,
    Mutation::NoReleaseOfClone,
];

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Whether a run fails, without a word about it.
fn fails(scenario: &Scenario) -> bool {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let failed = catch_unwind(|| play(scenario)).is_err();
    QUIET.set(false);
    failed
}

#[test]
fn every_step_that_is_left_out_is_found() {
    let mut unnoticed = Vec::new();
    for mutation in ALL {
        let found = (10_000..13_000).find(|seed| {
            let fails_with = |mut scenario: Scenario| {
                scenario.mutation = Some(mutation);
                fails(&scenario)
            };
            fails_with(Scenario::tight(*seed))
                || fails_with(Scenario::wild(*seed))
                || fails_with(Scenario::wild(WITH_WAYS_BACK + *seed))
        });
        match found {
            Some(seed) => println!("{mutation:?}: found by seed {seed}"),
            None => unnoticed.push(mutation),
        }
    }
    assert_eq!(unnoticed, [], "left out, and nobody noticed");
}
