//! The command line.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::run;

/// The operator of Understudy: assigns Guests and SeamlessReboots to nodes and rolls HostUpdates out.
#[derive(Debug, Parser)]
#[command(name = "understudy", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the operator until SIGTERM (the default)
    Run,
}

/// How the operator runs.
#[derive(Clone, Debug, Args)]
pub struct Settings {
    /// Namespace of the Lease; the operator's own
    #[arg(
        long,
        global = true,
        env = "POD_NAMESPACE",
        default_value = "understudy-system"
    )]
    pub namespace: String,
    /// Name of the Lease by which replicas elect their leader
    #[arg(
        long,
        global = true,
        env = "UNDERSTUDY_LEASE",
        default_value = "understudy-operator"
    )]
    pub lease: String,
    /// What this replica calls itself in the Lease; its Pod's name
    #[arg(long, global = true, env = "POD_NAME")]
    pub identity: Option<String>,
    /// Address on which /healthz, /readyz and /metrics are served
    #[arg(
        long,
        global = true,
        env = "UNDERSTUDY_LISTEN",
        default_value = "0.0.0.0:8080"
    )]
    pub listen: SocketAddr,
    /// Writes to the API server a second, at most; five times as many at once
    #[arg(
        long,
        global = true,
        env = "UNDERSTUDY_WRITES_PER_SECOND",
        default_value_t = 50,
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub writes_per_second: u32,
    /// What is logged: error, warn, info, debug, trace, or directives such as understudy=debug
    #[arg(long, global = true, env = "UNDERSTUDY_LOG", default_value = "info")]
    pub log_level: String,
    /// How it is logged
    #[arg(long, global = true, env = "UNDERSTUDY_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json)]
    pub log_format: LogFormat,
}

/// How it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line
    Json,
    /// Lines for people
    Text,
}

/// Runs the command that was given.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let Some(Command::Run) = cli.command.or(Some(Command::Run)) else {
        return ExitCode::FAILURE;
    };
    let settings = cli.settings;
    // What it says of a failed connection our own lines say with what was tried.
    let directives = format!("{},kube_client::client::builder=off", settings.log_level);
    let filter = match EnvFilter::try_new(directives) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("understudy: --log-level {:?}: {error}", settings.log_level);
            return ExitCode::from(2);
        }
    };
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Json => logs.json().flatten_event(true).init(),
        LogFormat::Text => logs.init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run::run(settings)),
        Err(source) => Err(run::RunError::Runtime(source)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the operator ends");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound_and_run_is_the_default() {
        Cli::command().debug_assert();
        let bare = Cli::parse_from(["understudy", "--namespace", "a"]);
        let run = Cli::parse_from(["understudy", "run", "--namespace", "a"]);
        assert_eq!(bare.settings.namespace, run.settings.namespace);
        assert!(Cli::try_parse_from(["understudy", "--writes-per-second", "0"]).is_err());
    }
}
