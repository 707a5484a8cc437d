//! A program of the control plane while it runs: its log, its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{process_mentions, wait_until};

/// How often a condition is asked for.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// Lines of a log that an error shows.
const TAIL: usize = 15;

/// A running program, and what is needed to find it again.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    dir: PathBuf,
    pid: u32,
    /// Absent when another process started it.
    child: Option<Child>,
}

impl Process {
    /// Starts `command` with its output appended to `<dir>/<name>.log`. One of its arguments must name a path in
    /// `dir`: by that it is told apart from a stranger that got its process id later.
    pub fn start(name: &str, dir: &Path, mut command: Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log);
        let out = open().with_context(|| format!("cannot open {}", log.display()))?;
        let err = open().with_context(|| format!("cannot open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("cannot run {name}: {command:?}"))?;
        let process = Self {
            name: name.to_owned(),
            dir: dir.to_path_buf(),
            pid: child.id(),
            child: Some(child),
        };
        let file = pid_file(dir, name);
        fs::write(&file, process.pid.to_string())
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(process)
    }

    /// The program of that name that another process has started in `dir` and that still runs.
    pub fn find(name: &str, dir: &Path) -> Option<Self> {
        let pid = fs::read_to_string(pid_file(dir, name))
            .ok()?
            .trim()
            .parse()
            .ok()?;
        process_mentions(pid, dir).then(|| Self {
            name: name.to_owned(),
            dir: dir.to_path_buf(),
            pid,
            child: None,
        })
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> Result<bool> {
        match &mut self.child {
            Some(child) => Ok(child
                .try_wait()
                .with_context(|| format!("cannot ask for the state of {}", self.name))?
                .is_none()),
            None => Ok(process_mentions(self.pid, &self.dir)),
        }
    }

    /// An error when it has ended, with what it said last.
    pub fn must_run(&mut self) -> Result<()> {
        if !self.is_running()? {
            bail!("{} has ended by itself\n{}", self.name, self.tail());
        }
        Ok(())
    }

    /// Asks it to end, and ends it when it has not within `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<()> {
        self.signal(Signal::TERM)?;
        if self.wait(limit).is_err() {
            return self.kill();
        }
        self.forget()
    }

    /// Ends it at once.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10))?;
        self.forget()
    }

    /// The end of its log, as part of an error.
    pub fn tail(&self) -> String {
        let log = self.dir.join(format!("{}.log", self.name));
        let text = fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(TAIL)..].join("\n    | ");
        format!("  the end of {}:\n    | {last}", log.display())
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        if !self.is_running()? {
            return Ok(());
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("{} is no process id", self.pid))?;
        match kill_process(pid, signal) {
            // Not a child of ours, and gone meanwhile.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot signal {} ({})", self.name, self.pid)),
        }
    }

    fn wait(&mut self, limit: Duration) -> Result<()> {
        let what = format!("{} (process {}) to end", self.name, self.pid);
        wait_until(&what, limit, POLL, || Ok((!self.is_running()?).then_some(())))
    }

    fn forget(&self) -> Result<()> {
        let file = pid_file(&self.dir, &self.name);
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }
}

fn pid_file(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.pid"))
}
