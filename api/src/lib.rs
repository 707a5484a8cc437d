//! Resource types of Understudy.
#![forbid(unsafe_code)]
