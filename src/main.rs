//! `understudy`, the operator.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    understudy::cli::main()
}
