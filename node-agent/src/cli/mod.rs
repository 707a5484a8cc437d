//! The command line: names, output and flags that a kubectl user guesses right.

mod action;
mod delete;
mod discard;
mod hosts;
mod install;
mod list;
mod render;
mod status;
mod wait;

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, DEFAULT_PATH};
use crate::{agent, logs, pod};

/// Owns the guests of this node and reboots them without interruption.
#[derive(Debug, Parser)]
#[command(name = "understudy-node", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
struct Global {
    /// Configuration file [default: /etc/understudy/node.yaml, where it exists]
    #[arg(
        long,
        short = 'c',
        global = true,
        value_name = "FILE",
        env = "UNDERSTUDY_CONFIG"
    )]
    config: Option<PathBuf>,
    /// Directory of durable state, instead of the configuration's stateDir
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: stand-alone on a directory of manifests, or on a cluster where the configuration's mode says so
    Run {
        /// Directory of manifests, instead of the configuration's manifestsDir
        #[arg(long, value_name = "DIR")]
        manifests: Option<PathBuf>,
        /// Directory of sockets, instead of the configuration's runDir
        #[arg(long, value_name = "DIR")]
        run_dir: Option<PathBuf>,
        /// The VMM's binary, instead of the configuration's vmm
        #[arg(long, value_name = "FILE")]
        vmm: Option<PathBuf>,
    },
    /// Show this host, guests, reboots, host updates and malformed manifests
    Status(status::Arguments),
    /// Delete a guest, a seamless reboot or a host update
    ///
    /// A deleted guest is powered off; its disks are kept unless its deletionPolicy is Delete. A reboot that
    /// is deleted before its clone has taken over is aborted; so is a host update whose host is not rebooting
    /// yet.
    Delete(delete::Arguments),
    /// Approve the cutover of a seamless reboot whose cutover.mode is Manual
    ///
    /// The clone takes over as soon as it is ready and cutover.window, if any, is open.
    Approve(action::Arguments),
    /// Abort a seamless reboot whose clone has not taken over yet
    ///
    /// The clone is discarded, and the guest serves on. Unlike `delete` this keeps the SeamlessReboot, with what it
    /// tells.
    Abort(action::Arguments),
    /// Let the incarnation before a seamless reboot take the guest's place again
    ///
    /// As long as it is dormant (retainDormantFor). It goes on where it was paused; what the guest has changed since
    /// then is discarded.
    Rollback(action::RollbackArguments),
    /// Give up the saved session of a guest, so that it boots anew
    ///
    /// For a session that cannot be resumed, as `status` tells. What was in the guest's memory is lost; its
    /// disks are as they were when it was saved, as after a power cut.
    DiscardSession(discard::Arguments),
    /// Install the systemd unit of this agent, and enable it
    Install(install::Arguments),
    /// Bring the agent to the node of a cluster: what the container of the DaemonSet runs
    ///
    /// Copies the image's binaries to the host by version, writes the service's configuration and its access to the
    /// API server, installs and starts the service, and shows its logs, health and metrics. The service and the
    /// guests go on when the Pod ends.
    Pod(pod::Arguments),
    /// Run a command in the mount namespace of the host's PID 1, from a container
    #[command(hide = true)]
    OnHost {
        /// The command
        #[arg(required = true, last = true)]
        command: Vec<OsString>,
    },
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> Result<(), Box<dyn Error>> {
    match &cli.command {
        // These have no configuration of their own.
        Command::Pod(arguments) => {
            logs::init(None);
            return pod::run(arguments);
        }
        Command::OnHost { command } => return Err(Box::new(pod::become_command(command))),
        _ => {}
    }
    let mut config = Config::load(cli.global.config.as_deref())?;
    if let Some(state_dir) = cli.global.state_dir {
        config.state_dir = state_dir;
    }
    match cli.command {
        Command::Run {
            manifests,
            run_dir,
            vmm,
        } => {
            config.manifests_dir = manifests.unwrap_or(config.manifests_dir);
            config.run_dir = run_dir.unwrap_or(config.run_dir);
            config.vmm = vmm.unwrap_or(config.vmm);
            config.check()?;
            logs::init(Some(&config.state_dir));
            agent::run(config)?;
        }
        Command::Status(arguments) => {
            config.check()?;
            status::run(&config, &arguments)?;
        }
        Command::Delete(arguments) => {
            config.check()?;
            delete::run(&config, &arguments)?;
        }
        Command::Approve(arguments) => {
            config.check()?;
            action::approve(&config, &arguments)?;
        }
        Command::Abort(arguments) => {
            config.check()?;
            action::abort(&config, &arguments)?;
        }
        Command::Rollback(arguments) => {
            config.check()?;
            action::rollback(&config, &arguments)?;
        }
        Command::DiscardSession(arguments) => {
            config.check()?;
            discard::run(&config, &arguments)?;
        }
        Command::Install(arguments) => {
            config.check()?;
            let file = cli.global.config.unwrap_or_else(|| PathBuf::from(DEFAULT_PATH));
            install::run(&config, &file, &arguments)?;
        }
        Command::Pod(_) | Command::OnHost { .. } => {}
    }
    Ok(())
}

/// Kinds that the command line knows, by any name that kubectl would take.
fn kind(name: &str) -> Result<Kind, String> {
    let name = name.to_ascii_lowercase();
    match name.split('.').next().unwrap_or_default() {
        "guest" | "guests" | "gst" => Ok(Kind::Guest),
        "reboot" | "reboots" | "seamlessreboot" | "seamlessreboots" | "sr" => Ok(Kind::Reboot),
        "hostupdate" | "hostupdates" | "hu" => Ok(Kind::HostUpdate),
        "nodeupdate" | "nodeupdates" | "nu" => Ok(Kind::NodeUpdate),
        "host" | "hosts" => Ok(Kind::Host),
        _ => Err(format!(
            "no kind {name:?} here; known: guest (gst), seamlessreboot (sr, reboot), hostupdate (hu), nodeupdate (nu), host"
        )),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Guest,
    Reboot,
    HostUpdate,
    NodeUpdate,
    Host,
}

impl Kind {
    fn singular(self) -> &'static str {
        match self {
            Kind::Guest => "guest",
            Kind::Reboot => "seamlessreboot",
            Kind::HostUpdate => "hostupdate",
            Kind::NodeUpdate => "nodeupdate",
            Kind::Host => "host",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_takes_what_a_kubectl_user_types() {
        Cli::command().debug_assert();
        for line in [
            "status",
            "status -w",
            "status -o json --config /x",
            "status reboot kernel -n web",
            "delete guest web",
            "delete sr kernel -n default --wait=false",
            "run --config /x --manifests /y",
            "install",
            "status nodeupdate",
            "status hu kernel -o yaml",
            "status host",
            "delete hostupdate kernel",
            "discard-session default/web --yes",
            "approve kernel -n web",
            "abort kernel --wait=false",
            "rollback kernel -n web --discard-changes --timeout 1m",
            "pod",
            "pod --host-root /host --server https://10.0.0.1:443 --listen 127.0.0.1:9465",
            "on-host -- systemctl restart understudy-node.service",
        ] {
            let words = ["understudy-node"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        assert!(Cli::try_parse_from(["understudy-node", "delete", "pod", "x"]).is_err());
    }
}
