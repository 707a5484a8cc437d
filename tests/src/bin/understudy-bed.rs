//! Command line of the test bed: images, node VMs and a Kubernetes control plane.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use understudy_tests::bed::{Images, NODE_BIN, Node, NodeOptions, Stage, Status, cache_dir, check_guest};
use understudy_tests::control_plane::{self, ControlPlane, Options, Programs};

/// Images, node VMs and a Kubernetes control plane of Understudy's test bed
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
    /// A real Kubernetes control plane
    Cluster {
        #[command(subcommand)]
        command: ClusterCommand,
    },
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Start etcd and the API server where they do not run, apply our CRDs; what was stored is there again
    Up {
        /// Forget what was stored
        #[arg(long)]
        fresh: bool,
        /// Run kube-controller-manager and kube-scheduler as well
        #[arg(long)]
        controllers: bool,
    },
    /// Stop it in order; what is stored stays
    Down,
    /// Say whether it runs and where its files are
    Status,
    /// Run kubectl against it
    Kubectl {
        /// kubectl's arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
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
        Command::Cluster { command } => cluster(command),
    }
}

fn cluster(command: ClusterCommand) -> Result<()> {
    let dir = cache_dir().join("cluster");
    let kubeconfig = dir.join("admin.kubeconfig");
    let up = control_plane::is_up(&dir);
    match command {
        ClusterCommand::Up { fresh, controllers } => {
            let started = Instant::now();
            if up && !fresh {
                eprintln!("  cluster: was up");
                println!("export KUBECONFIG={}", kubeconfig.display());
                return Ok(());
            }
            control_plane::stop(&dir)?;
            if fresh && dir.exists() {
                std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
            }
            let options = Options {
                controllers,
                ..Options::default()
            };
            let plane = ControlPlane::start(&dir, options)?;
            plane.apply_crds()?;
            plane.detach();
            eprintln!("  cluster: up, {:.1} s", started.elapsed().as_secs_f64());
            println!("export KUBECONFIG={}", kubeconfig.display());
            Ok(())
        }
        ClusterCommand::Down => control_plane::stop(&dir),
        ClusterCommand::Status => {
            println!("{}", if up { "up" } else { "down" });
            println!("directory   {}", dir.display());
            println!("kubeconfig  {}", kubeconfig.display());
            Ok(())
        }
        ClusterCommand::Kubectl { arguments } => {
            if !up {
                bail!("the cluster is down; 'understudy-bed cluster up' starts it");
            }
            let programs = Programs::build(&["kubectl"])?;
            let mut kubectl = std::process::Command::new(programs.path("kubectl")?);
            kubectl.env("KUBECONFIG", kubeconfig).args(arguments);
            Err(kubectl.exec()).context("cannot run kubectl")
        }
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
