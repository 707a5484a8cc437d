//! `understudy-node`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    understudy_node::cli::main()
}
