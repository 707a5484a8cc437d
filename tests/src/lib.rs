//! End-to-end harness.
#![forbid(unsafe_code)]

pub mod client;
