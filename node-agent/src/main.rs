//! `understudy-node`.
#![forbid(unsafe_code)]

fn main() {}
