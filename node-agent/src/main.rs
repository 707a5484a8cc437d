//! Placeholder, replaced by the first landing.
#![forbid(unsafe_code)]

fn main() {}
