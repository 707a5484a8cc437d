//! Deterministic crash simulation of the handover engine.
//!
//! A world that a seed decides: a guest with programs that write, fsync and acknowledge at any time, its
//! filter and watchdogs, two VMMs with gates and leases, layers, `owner.json`, a clock, a journal. The agent
//! is cut before, after and within every effect, commands arrive late or never, machines die. Invariants are
//! checked after every event. A failing run prints its seed; `UNDERSTUDY_SIM_SEED=N cargo test -p
//! understudy-node one_seed` replays it.
//!
//! - [`world`]: what there is, and how time passes in it;
//! - [`machines`]: what VMMs and guest agents do when they are told;
//! - [`wire`]: what becomes of a command on its way, with crash points and faults;
//! - [`agent`]: the effects;
//! - [`scenario`]: one run from the manifest to the end, with what must hold then;
//! - the tests: [`crashes`], [`mutations`], [`stories`].

mod agent;
mod crashes;
mod machines;
mod mutations;
pub(crate) mod rng;
mod scenario;
mod stories;
mod wire;
mod world;

/// An operation as tests of the state machine want it.
pub fn new_operation() -> super::Operation {
    scenario::new_operation(&scenario::Scenario::quiet(0), 0)
}
