//! Resource types of Understudy.
