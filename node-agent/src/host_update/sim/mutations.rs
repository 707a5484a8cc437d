//! Worlds in which a step is left out, or believed by mistake, must fail the simulation: it finds what it is
//! there to find.

use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::Once;

use super::scenario::{Scenario, play};

/// What is left out, or believed, by mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Operations in flight are not waited for.
    QuiesceIgnoresOperations,
    /// A key is made and not given to the provider.
    KeyIsNotRegistered,
    /// A guest counts as saved while the rest is being written.
    SavedTooEarly,
    /// Saves are begun without a record.
    SavesAreNotRecorded,
    /// The host is rebooted without a record of the acknowledgement.
    AcknowledgementIsNotRecorded,
    /// A guest whose lease runs out leaves its checkpoint as it is.
    LeaseLeavesCheckpoint,
    /// So does one that is told to run on.
    CancelLeavesCheckpoint,
    /// Guests are not told to run on.
    CancelDoesNothing,
    /// A reboot that does not come in time is not called off before guests run on.
    RebootIsNotCalledOff,
    /// A checkpoint is not marked as consumed, and can be resumed again.
    ConsumedIsNotMarked,
    /// A checkpoint is removed while memory is loaded from it.
    LoadedTooEarly,
    /// Keys stay with the provider.
    KeyIsLeftBehind,
    /// The operator destroys the credential as soon as it has released it.
    CredentialIsDestroyedAtRelease,
    /// An agent that is started anew asks the operator by another key.
    RequestKeyIsForgotten,
    /// The guest manager boots what does not run, whatever the records say.
    ManagerIgnoresHolds,
}

const ALL: [Mutation; 15] = [
    Mutation::QuiesceIgnoresOperations,
    Mutation::KeyIsNotRegistered,
    Mutation::SavedTooEarly,
    Mutation::SavesAreNotRecorded,
    Mutation::AcknowledgementIsNotRecorded,
    Mutation::LeaseLeavesCheckpoint,
    Mutation::CancelLeavesCheckpoint,
    Mutation::CancelDoesNothing,
    Mutation::RebootIsNotCalledOff,
    Mutation::ConsumedIsNotMarked,
    Mutation::LoadedTooEarly,
    Mutation::KeyIsLeftBehind,
    Mutation::CredentialIsDestroyedAtRelease,
    Mutation::RequestKeyIsForgotten,
    Mutation::ManagerIgnoresHolds,
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
            let mut scenario = match seed % 4 {
                // Wild ones seldom die as late as when the host is back.
                0 => {
                    let mut scenario = Scenario::kept_by_operator(*seed);
                    scenario.crash_at = vec![1 + seed % 1000];
                    scenario
                }
                _ => Scenario::wild(*seed),
            };
            scenario.mutation = Some(mutation);
            fails(&scenario)
        });
        match found {
            Some(seed) => println!("{mutation:?}: found by seed {seed}"),
            None => unnoticed.push(mutation),
        }
    }
    assert_eq!(unnoticed, [], "left out, and nobody noticed");
}
