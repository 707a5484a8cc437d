//! The host engine: reboots a host over which the sessions of its guests go on (patent US10387187B2).
//!
//! A pure state machine ([`machine`]) over a durable record ([`record`]), effects behind a trait
//! ([`effects`]), and a loop that brings them together ([`driver`]). It knows no Kubernetes client, no VMM,
//! no systemd and no socket, so that a deterministic simulation can cut it anywhere. `docs/host-update.md`
//! has the steps and the table of recovery.

pub mod driver;
pub mod effects;
pub mod hold;
pub mod journal;
pub mod machine;
pub mod plan;
pub mod quiesce;
pub mod record;
mod resuming;
mod saving;
mod schedule;
pub mod status;

pub use driver::{Run, run};
pub use effects::{EffectError, Effected, Effects, ErrorKind, Report};
pub use plan::Plan;
pub use record::{Session, Step, Update, Verdict};

#[cfg(test)]
mod sim;
