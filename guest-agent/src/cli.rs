//! The command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use understudy_channel::{Description, PORT};

use crate::local::{Answer, Ask};
use crate::role::Role;
use crate::service::Config;
use crate::{generator, install, local, service, tree};

/// The guest agent of Understudy: reboots of this virtual machine without stopping the show.
#[derive(Debug, Parser)]
#[command(name = "understudy-guest", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service (systemd does this).
    Run {
        /// vsock port to listen on.
        #[arg(long, default_value_t = PORT)]
        port: u32,
        /// Listen on this unix socket instead of vsock (for tests).
        #[arg(long, value_name = "SOCKET")]
        listen: Option<PathBuf>,
        /// Directory of run-time state.
        #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
        run_dir: PathBuf,
    },
    /// Install the agent into the root of an image, or with `--root /` into this running system.
    Install {
        /// Where the image's root file system is mounted or unpacked.
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
    },
    /// Ask the host to reboot this guest while it keeps serving.
    RequestReboot {
        /// Why, in your words; shown to whoever runs the host.
        #[arg(long, default_value = "")]
        reason: String,
        /// Wait for the host's answer for ever (default: 30 seconds; the request stands in any case).
        #[arg(long)]
        wait: bool,
        /// Directory of the service's run-time state.
        #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
        run_dir: PathBuf,
    },
    /// Show what the host is told about this guest.
    Status {
        /// Directory of the service's run-time state.
        #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
        run_dir: PathBuf,
    },
    /// List the file system mounted at PATH in a canonical form: trees are equal when their listings are.
    TreeDigest {
        /// Mount point.
        path: PathBuf,
        /// Name paths as if it were the root file system, so that the rules of merging apply.
        #[arg(long)]
        as_root: bool,
        /// Print only the digest of the listing.
        #[arg(long)]
        short: bool,
    },
    /// Write the drop-ins of a clone (systemd does this, as a generator).
    #[command(hide = true)]
    Generator {
        /// The three directories that systemd names.
        directories: Vec<PathBuf>,
    },
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    let called = arguments.first().map(PathBuf::from).unwrap_or_default();
    if called.file_name().is_some_and(|n| n == generator::NAME) {
        arguments.insert(1, "generator".into());
    }
    match run(Cli::parse_from(arguments).command) {
        Ok(code) => code,
        Err(error) => {
            crate::warning!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match command {
        Command::Run {
            port,
            listen,
            run_dir,
        } => {
            service::run(Config {
                listen,
                port,
                run_dir,
                role: Role::read(),
            })?;
        }
        Command::Install { root } => {
            let changed = install::install(&root)?;
            for path in &changed {
                println!("installed {}", path.display());
            }
            if changed.is_empty() {
                println!("already installed in {}", root.display());
            }
        }
        Command::RequestReboot {
            reason,
            wait,
            run_dir,
        } => {
            let wait_seconds = if wait { None } else { Some(30) };
            return request_reboot(&run_dir, &Ask::RequestReboot { reason, wait_seconds });
        }
        Command::Status { run_dir } => match ask(&run_dir, &Ask::Status)? {
            Answer::Status(description) => print_status(&description),
            other => return Err(format!("unexpected answer of the service: {other:?}").into()),
        },
        Command::TreeDigest { path, as_root, short } => {
            let lines = tree::listing(&path, as_root)
                .map_err(|error| format!("listing {} failed: {error}", path.display()))?;
            if !short {
                for line in &lines {
                    println!("{line}");
                }
            }
            println!("{}", tree::digest(&lines));
        }
        Command::Generator { directories } => {
            let directory = directories
                .first()
                .ok_or("the generator needs a directory to write to")?;
            generator::run(&Role::read(), directory)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(run_dir: &Path, request: &Ask) -> Result<Answer, String> {
    local::ask(run_dir, request).map_err(|error| {
        format!(
            "asking the service at {} failed: {error}; is understudy-guest.service running, and are you root?",
            run_dir.join(local::SOCKET).display()
        )
    })
}

fn request_reboot(run_dir: &Path, request: &Ask) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match ask(run_dir, request)? {
        Answer::Confirmed(operation) => {
            println!("confirmed: {operation}");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Refused(reason) => Err(format!("the host refused: {reason}").into()),
        Answer::Pending => {
            Err("the host has not answered yet; the request stands and is repeated when it connects".into())
        }
        other @ Answer::Status(_) => Err(format!("unexpected answer of the service: {other:?}").into()),
    }
}

fn print_status(d: &Description) {
    println!("agent       {}", d.agent);
    println!(
        "role        {}",
        if d.clone {
            "clone (waiting for cutover)"
        } else {
            "guest"
        }
    );
    println!("kernel      {}", d.kernel_release);
    println!("boot id     {}", d.boot_id);
    println!("system      {}", d.system_state);
    for unit in &d.failed_units {
        println!("failed      {unit}");
    }
    println!(
        "reboot      {}",
        d.reboot_required.as_deref().unwrap_or("not required")
    );
    println!("capturing   {}", d.capturing.as_deref().unwrap_or("no"));
    for fs in &d.filesystems {
        println!("filesystem  {} on {} ({})", fs.mount_point, fs.device, fs.kind);
    }
    for i in &d.interfaces {
        let gateways: Vec<_> = i.gateways.iter().map(|g| g.address.as_str()).collect();
        println!(
            "interface   {} {} {} via {}",
            i.name,
            i.mac,
            i.addresses.join(" "),
            gateways.join(" ")
        );
    }
}
