//! Deterministic crash simulation of the host engine.
//!
//! A world that a seed decides: a host that reboots when it is asked to, or by itself, or loses its power;
//! guests that run and write; VMMs that save, hold leases and resume; checkpoints and a credential provider
//! that survive; a guest manager that boots whatever it may. The agent is cut before, after and within every
//! effect, VMMs die, saves fail, keys are lost, checkpoints are refused. Invariants are checked after every
//! event. A failing run prints its seed; `UNDERSTUDY_SIM_SEED=N cargo test -p understudy-node
//! one_host_seed` replays it.
//!
//! - [`world`]: what there is, and how time passes in it;
//! - [`agent`]: the effects, with crash points and faults;
//! - [`scenario`]: one run from the manifest to the end, with what must hold then;
//! - the tests: [`crashes`], [`mutations`], [`stories`].

mod agent;
mod crashes;
mod judge;
mod mutations;
mod operator;
mod scenario;
mod stories;
mod world;
