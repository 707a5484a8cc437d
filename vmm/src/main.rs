//! Placeholder, replaced by the first landing.
fn main() {}
