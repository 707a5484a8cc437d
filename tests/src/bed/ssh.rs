//! Commands and files for a machine of the bed, over one kept ssh connection.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::NetNs;

/// How long a connection may take, in seconds: a busy guest whose memory comes from its checkpoint takes its time.
const CONNECT: u32 = 30;
/// The same where it is asked whether a machine answers at all.
const LOOK: u32 = 5;

/// What a finished command said.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended; 255 is ssh's own failure.
    pub status: ExitStatus,
    /// Standard output, lossy UTF-8.
    pub stdout: String,
    /// Standard error, lossy UTF-8.
    pub stderr: String,
}

/// A way into a machine: root at an address in a namespace, by the bed's key.
#[derive(Clone, Debug)]
pub struct Ssh {
    netns: NetNs,
    address: String,
    key: PathBuf,
    control: PathBuf,
}

impl Ssh {
    /// Root at `address`, reached from within `netns`, with the private key in `key`.
    pub fn new(netns: &NetNs, address: &str, key: &Path) -> Self {
        let control = netns.run_dir().join(format!("ssh-{address}"));
        Self {
            netns: netns.clone(),
            address: address.to_owned(),
            key: key.to_path_buf(),
            control,
        }
    }

    /// An `ssh` command to which arguments of the remote command can be added. The first one opens a
    /// connection that later ones share, so that they cost milliseconds.
    pub fn ssh(&self) -> Command {
        self.ssh_within(CONNECT)
    }

    /// The same, with a connection within so many seconds.
    fn ssh_within(&self, connect: u32) -> Command {
        let mut command = self.netns.command("ssh");
        command
            .arg("-i")
            .arg(&self.key)
            .arg("-o")
            .arg(format!("ControlPath={}", self.control.display()))
            .args(["-o", "ControlMaster=auto", "-o", "ControlPersist=1h"])
            .args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
            ])
            // A machine that is gone is noticed, in half a minute at worst.
            .args([
                "-o",
                &format!("ConnectTimeout={connect}"),
                "-o",
                "ServerAliveInterval=10",
                "-o",
                "ServerAliveCountMax=3",
            ])
            .args(["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"])
            .arg(format!("root@{}", self.address))
            .arg("--");
        command
    }

    /// Runs a shell command line and returns whatever came of it.
    pub fn output(&self, line: &str) -> Result<Output> {
        let output = self
            .ssh()
            .arg(line)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run ssh to {}", self.address))?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a shell command line that must succeed and returns its standard output.
    pub fn run(&self, line: &str) -> Result<String> {
        let output = self.output(line)?;
        if !output.status.success() {
            bail!(
                "on {}: '{line}' failed ({}): {}",
                self.address,
                output.status,
                if output.stderr.trim().is_empty() {
                    output.stdout.trim()
                } else {
                    output.stderr.trim()
                }
            );
        }
        Ok(output.stdout)
    }

    /// Starts a shell command line and leaves it running; its output is piped to the caller.
    pub fn spawn(&self, line: &str) -> Result<std::process::Child> {
        self.ssh()
            .arg(line)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run ssh to {}", self.address))
    }

    /// True when a command can be run there now.
    pub fn answers(&self) -> Result<bool> {
        // A control connection to a machine that was reset would hold this up until it times out.
        let output = self
            .ssh_within(LOOK)
            .arg("true")
            .stdin(Stdio::null())
            .output()
            .context("cannot run ssh")?;
        Ok(output.status.success())
    }

    /// Forgets the kept connection, for instance because the machine was reset.
    pub fn forget(&self) {
        // Where there is none this fails, and that is what was wanted.
        let _ = self
            .netns
            .command("ssh")
            .arg("-o")
            .arg(format!("ControlPath={}", self.control.display()))
            .args(["-O", "exit", "bed"])
            .stdin(Stdio::null())
            .output();
        let _ = std::fs::remove_file(&self.control);
    }

    /// Copies a file there under a temporary name and renames it, so that it is there whole or not
    /// at all, and a program that is running is not written to. Holes are not kept.
    pub fn push(&self, local: &Path, remote: &str, mode: u32) -> Result<()> {
        let file = File::open(local).with_context(|| format!("cannot open {}", local.display()))?;
        let line = format!(
            "set -e; mkdir -p \"$(dirname '{remote}')\"; cat >'{remote}.new'; chmod {mode:o} '{remote}.new'; mv '{remote}.new' '{remote}'"
        );
        self.feed(&line, file.into())
    }

    /// Writes a small text file there, whole or not at all.
    pub fn write(&self, remote: &str, text: &str) -> Result<()> {
        let line = format!(
            "set -e; mkdir -p \"$(dirname '{remote}')\"; cat >'{remote}.new'; mv '{remote}.new' '{remote}'"
        );
        let mut child = self
            .ssh()
            .arg(line)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ssh")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(text.as_bytes())
                .with_context(|| format!("cannot write {remote} on {}", self.address))?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "cannot write {remote} on {}: {}",
                self.address,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    fn feed(&self, line: &str, stdin: Stdio) -> Result<()> {
        let output = self
            .ssh()
            .arg(line)
            .stdin(stdin)
            .output()
            .context("cannot run ssh")?;
        if !output.status.success() {
            bail!(
                "on {}: '{line}' failed: {}",
                self.address,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    /// Waits until commands can be run there.
    pub fn wait(&self, limit: Duration, mut alive: impl FnMut() -> Result<()>) -> Result<()> {
        super::wait_until(
            &format!("ssh to {}", self.address),
            limit,
            Duration::from_millis(250),
            || {
                alive()?;
                Ok(self.answers()?.then_some(()))
            },
        )
    }
}
