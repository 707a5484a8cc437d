//! Placeholder, replaced by the first landing.
#![forbid(unsafe_code)]

//! `understudy-node`.
fn main() {}
