//! Command line of the test bed: images and node VMs.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use understudy_tests::bed::{Images, NODE_BIN, Node, NodeOptions, Stage, Status, check_guest};

/// Images and node VMs of Understudy's test bed
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Directory with the static binaries (default: where this program is)
    #[arg(long, global = true, value_name = "DIR")]
    bin: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build what is missing or outdated and print where the images are (JSON)
    Images {
        /// What to build
        #[arg(value_parser = ["node", "guest-base", "guest"])]
        only: Vec<String>,
    },
    /// Boot the guest image in plain QEMU and ask its services
    GuestCheck,
    /// A node VM with real (emulated) SVM
    Node {
        /// Which node: each name is an instance with disks and a network of its own
        #[arg(long, global = true, env = "UNDERSTUDY_NODE", default_value = "node")]
        name: String,
        #[command(subcommand)]
        command: NodeCommand,
    },
}

#[derive(Subcommand)]
enum NodeCommand {
    /// Start it where it is not up; wait until it takes commands
    Up {
        /// Make its disks anew
        #[arg(long)]
        fresh: bool,
        /// Processors
        #[arg(long, default_value_t = 2)]
        cpus: u8,
        /// Memory in MiB
        #[arg(long, default_value_t = 3072)]
        memory: u32,
    },
    /// Shut it down in order
    Down,
    /// Cut its power
    Kill,
    /// Remove it with its disks and network
    Remove,
    /// Say whether it is up and where its files are
    Status,
    /// A shell in it, or one command
    Ssh {
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run a command of this machine inside the node's network
    Net {
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Copy a file into it
    Push {
        /// File here
        local: PathBuf,
        /// Path there
        remote: String,
    },
    /// Start it where it is not up, bring current binaries and guest image into it
    Stage,
    /// Print its console log
    Logs,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let bin = match cli.bin {
        Some(dir) => dir,
        None => std::env::current_exe()?
            .parent()
            .context("this program has no directory")?
            .to_path_buf(),
    };
    match cli.command {
        Command::Images { only } => {
            let only: Vec<&str> = only.iter().map(String::as_str).collect();
            let images = Images::build(&bin, &only)?;
            println!("{}", serde_json::to_string_pretty(&images)?);
            Ok(())
        }
        Command::GuestCheck => check_guest(&Images::build(&bin, &["guest"])?),
        Command::Node { name, command } => node(&Node::named(&name)?, command, &bin),
    }
}

fn node(node: &Node, command: NodeCommand, bin: &std::path::Path) -> Result<()> {
    match command {
        NodeCommand::Up { fresh, cpus, memory } => {
            let started = Instant::now();
            // Who runs on it shall not have it made anew under their feet.
            let _lock = node.lock()?;
            let images = Images::build(bin, &["node"])?;
            let options = NodeOptions {
                cpus,
                memory_mib: memory,
                ..NodeOptions::default()
            };
            let new = node.up(&images, &options, fresh)?;
            let what = if new { "up" } else { "was up" };
            eprintln!(
                "  node {}: {what}, {:.1} s",
                node.name(),
                started.elapsed().as_secs_f64()
            );
            Ok(())
        }
        NodeCommand::Stage => {
            let stage = Stage::set(node.name(), bin)?;
            println!(
                "binaries     {NODE_BIN}\nguest image  {} (copy it before use)",
                stage.guest_image
            );
            Ok(())
        }
        NodeCommand::Down => node.down(),
        NodeCommand::Kill => node.kill(),
        NodeCommand::Remove => node.remove(),
        NodeCommand::Status => {
            match node.status() {
                Status::Up(pid) => println!("up, QEMU is process {pid}"),
                Status::Down => println!("down"),
            }
            println!("directory  {}", node.dir().display());
            println!("console    {}", node.console_log().display());
            println!("namespace  {}", node.netns().name());
            Ok(())
        }
        NodeCommand::Ssh { command } => {
            must_be_up(node)?;
            let mut ssh = node.ssh().ssh();
            Err(ssh.args(command).exec()).context("cannot run ssh")
        }
        NodeCommand::Net { command } => {
            must_be_up(node)?;
            Err(node.netns().command(&command[0]).args(&command[1..]).exec())
                .context("cannot run ip netns exec")
        }
        NodeCommand::Push { local, remote } => {
            must_be_up(node)?;
            node.ssh().push(&local, &remote, 0o755)
        }
        NodeCommand::Logs => {
            let log = node.console_log();
            let text = std::fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
            print!("{}", String::from_utf8_lossy(&text));
            Ok(())
        }
    }
}

fn must_be_up(node: &Node) -> Result<()> {
    if node.status() == Status::Down {
        bail!("node {} is down; 'understudy-bed node up' starts it", node.name());
    }
    Ok(())
}
