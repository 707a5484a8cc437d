//! The agent inside the guest: see `understudy-guest --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    understudy_guest::cli::main()
}
