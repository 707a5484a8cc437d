//! The agent inside the guest (DESIGN §5): it tells the host what this boot is, captures which files change,
//! exports and imports them, freezes and thaws, holds and starts units.
//!
//! It never waits for user land, because it must work while user land is frozen: it logs to the kernel's
//! ring, talks to PID 1 by its private socket, and lives in a slice of its own, locked in memory.

pub mod bus;
pub mod cli;
pub mod control;
pub mod describe;
pub mod generator;
pub mod install;
pub mod local;
pub mod log;
pub mod mounts;
pub mod network;
pub mod role;
pub mod service;
pub mod sys;
pub mod systemd;
