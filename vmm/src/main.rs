//! `understudy-vmm`: one virtual machine in one process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use understudy_vmm::supervisor::ResumeError;
use understudy_vmm_control::session::REFUSED_EXIT_CODE;

/// Runs one virtual machine on /dev/kvm, controlled over a Unix socket.
#[derive(Parser)]
#[command(name = "understudy-vmm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the guest of a configuration until it powers itself off or the process is told to stop.
    Run {
        /// Configuration (JSON); its format is documented in the crate understudy-vmm-control.
        #[arg(long)]
        config: PathBuf,
    },
    /// Tells whether this host's /dev/kvm can run stock kernels; exit code 0: it can.
    Check,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    understudy_vmm::process::log_to_stderr();
    let result = match cli.command {
        Command::Run { config } => understudy_vmm::process::run(&config, started),
        Command::Check => understudy_vmm::check::report(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => match error.downcast_ref() {
            Some(ResumeError::Refused(refused)) => {
                // One line, whatever is in the message: the last of the log tells why.
                eprintln!("{}", refused.to_string().replace('\n', " "));
                ExitCode::from(REFUSED_EXIT_CODE as u8)
            }
            _ => {
                eprintln!("understudy-vmm: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
