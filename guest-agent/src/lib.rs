//! The agent inside the guest (DESIGN §5): it tells the host what this boot is, captures which files change,
//! exports and imports them, freezes and thaws, holds and starts units.
//!
//! It never waits for user land, because it must work while user land is frozen: it logs to the kernel's
//! ring, talks to PID 1 by its private socket, and lives in a slice of its own, locked in memory.

pub mod activate;
pub mod apply;
pub mod bus;
pub mod cli;
pub mod conflict;
pub mod content;
pub mod control;
pub mod describe;
pub mod export;
pub mod filter;
pub mod freeze;
pub mod generator;
pub mod import;
pub mod install;
pub mod joined;
pub mod journal;
pub mod local;
pub mod log;
pub mod marks;
pub mod memory;
pub mod meta;
pub mod mounts;
pub mod network;
pub mod place;
pub mod plan;
pub mod probe;
pub mod read;
pub mod remains;
pub mod resumed;
pub mod role;
pub mod rules;
pub mod service;
pub mod silent;
pub mod sys;
pub mod systemd;
pub mod tree;
pub mod units;
pub mod userland;
pub mod view;
