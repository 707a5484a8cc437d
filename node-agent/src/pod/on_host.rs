//! Commands of the host, run from within the Pod: by this program itself, which enters the mount namespace of the
//! host's PID 1 and becomes the command. So what runs is what an administrator would type on the host, systemctl
//! speaks with systemd as it does there (in a chroot it refuses to), and the image needs neither shell nor tools.
//! That takes `hostPID` and a privileged container, which a Pod that writes units of the host is in all but name.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where the host's commands are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOSTS: &str = "/proc/1/ns/mnt";
const OURS: &str = "/proc/self/ns/mnt";

/// Why a command did not run on the host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host's namespace could not be entered.
    #[error(
        "entering the host's mount namespace ({HOSTS}): {0}; the Pod needs hostPID: true and a privileged container"
    )]
    Enter(io::Error),
    /// The command could not be started.
    #[error("running `{command}` on the host: {source}")]
    Run {
        /// The command.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// The command has failed.
    #[error("`{command}` failed on the host: {message}")]
    Failed {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
}

/// Runs commands of the host.
pub trait Host: Send + Sync {
    /// Runs one to its end; what it printed.
    fn run(&self, command: &[&str]) -> Result<String, HostError>;
    /// Starts one that prints where we do.
    fn follow(&self, command: &[&str]) -> Result<Child, HostError>;
}

/// By this program as `understudy-node on-host`.
#[derive(Debug)]
pub struct Entering {
    program: PathBuf,
}

impl Entering {
    /// By the program that runs.
    pub fn new() -> io::Result<Entering> {
        Ok(Entering {
            program: std::env::current_exe()?,
        })
    }

    fn command(&self, command: &[&str]) -> Command {
        let mut entering = Command::new(&self.program);
        entering
            .arg("on-host")
            .arg("--")
            .args(command)
            .stdin(Stdio::null());
        entering
    }
}

impl Host for Entering {
    fn run(&self, command: &[&str]) -> Result<String, HostError> {
        let name = command.join(" ");
        let output = self.command(command).output().map_err(|source| HostError::Run {
            command: name.clone(),
            source,
        })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        let message = match text(&output.stderr) {
            empty if empty.is_empty() => format!("{} {}", output.status, text(&output.stdout)),
            message => message,
        };
        Err(HostError::Failed {
            command: name,
            message,
        })
    }

    fn follow(&self, command: &[&str]) -> Result<Child, HostError> {
        self.command(command).spawn().map_err(|source| HostError::Run {
            command: command.join(" "),
            source,
        })
    }
}

/// Becomes a command of the host. Returns only where that fails. The process must have one thread: the kernel lets
/// no other into a mount namespace (setns(2)).
pub fn become_command(command: &[OsString]) -> HostError {
    if let Err(error) = enter() {
        return HostError::Enter(error);
    }
    let mut words = command.iter();
    let program = words.next().cloned().unwrap_or_default();
    let source = Command::new(&program)
        .args(words)
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .exec();
    HostError::Run {
        command: program.to_string_lossy().into_owned(),
        source,
    }
}

fn enter() -> io::Result<()> {
    // Where we are there already nothing is to be entered, and no right is needed.
    if fs::read_link(HOSTS)? == fs::read_link(OURS)? {
        return Ok(());
    }
    let namespace = File::open(HOSTS)?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    std::env::set_current_dir("/")
}
