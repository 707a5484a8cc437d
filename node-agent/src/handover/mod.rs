//! The handover engine: reboots a guest by cutting over to its clone (patent US10606632B2).
//!
//! A pure state machine ([`machine`], [`outcome`]) over a durable record ([`record`]), effects behind a trait
//! ([`effects`]), and a loop that brings them together ([`driver`]). It knows no Kubernetes client, no VMM
//! and no socket, so that a deterministic simulation can cut it anywhere. What is asked of an operation on its
//! way is in [`approval`], whether its clone is ready in [`readiness`], the way back in [`rollback`]. `docs/handover.md` has the steps and the table of
//! recovery.

pub mod approval;
pub mod driver;
pub mod effects;
pub mod journal;
pub mod machine;
pub mod outcome;
pub mod plan;
pub mod readiness;
pub mod record;
pub mod rollback;
pub mod status;
mod trouble;

pub use driver::{Run, run};
pub use effects::{Asked, EffectError, Effected, Effects, ErrorKind, Report};
pub use plan::Plan;
pub use record::{Moment, Operation, Step, Verdict};

#[cfg(test)]
pub(crate) mod sim;
