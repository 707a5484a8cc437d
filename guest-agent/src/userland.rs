//! Freezing of user land by the control group freezer (DESIGN §5, step 7b): everything but PID 1 and this
//! agent's own slice.

use std::fs;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::freeze::{Thawed, Watchdog};
use crate::log::Laps;
use crate::service::spawn;
use crate::systemd::{Systemd, Verb, micros};
use crate::{info, warning};

/// Groups that stay awake: PID 1, and this agent.
const AWAKE: &[&str] = &["init.scope", "understudy.slice"];
/// How long programs get to read what their sockets have received.
const DRAIN: Duration = Duration::from_millis(50);
/// How long units may take to stop before the freeze.
const STOP: Duration = Duration::from_secs(90);

/// Why user land could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum UserlandError {
    /// No unified hierarchy.
    #[error(
        "{0} is not a unified control group hierarchy (cgroup v2); boot the guest with systemd.unified_cgroup_hierarchy=1"
    )]
    NoCgroups(PathBuf),
    /// The agent would freeze itself.
    #[error("the agent runs in {0}, which would be frozen; start it by its unit, in understudy.slice")]
    Self_(String),
    /// A group could not be frozen.
    #[error("control group {group} could not be frozen: {source}; everything is thawed again")]
    Group {
        /// Group.
        group: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A group did not freeze in time.
    #[error(
        "control group {0} was not frozen in time (a process in it waits for I/O?); everything is thawed again"
    )]
    TooLate(PathBuf),
    /// Units to be stopped did not stop.
    #[error("units could not be stopped: {0}; everything runs again")]
    Stop(String),
}

#[derive(Debug)]
struct Frozen {
    groups: Vec<PathBuf>,
    stopped: Vec<String>,
}

/// Freezes user land.
#[derive(Debug)]
pub struct Userland {
    root: PathBuf,
    frozen: Watchdog<Frozen>,
}

impl Default for Userland {
    fn default() -> Self {
        Self::new("/sys/fs/cgroup".into())
    }
}

impl Userland {
    /// User land as the control groups directly below `root`.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            frozen: Watchdog::default(),
        }
    }

    /// Stops units and freezes all else. Nothing is written out: the next export does that. Asked again while
    /// frozen, it renews the watchdog.
    pub fn freeze(&self, watchdog_ms: u32, stop: &[String]) -> Result<(), UserlandError> {
        let watchdog = Duration::from_millis(watchdog_ms.into());
        if self.frozen.renew(Instant::now() + watchdog) {
            return Ok(());
        }
        let mut laps = Laps::begin();
        let groups = self.groups()?;
        stop_units(stop)?;
        laps.lap("groups");
        wait_for_receive_queues();
        laps.lap("queues");
        // The time to freeze counts from here: stopping units may take as long as they need.
        let begin = Instant::now();
        let deadline = begin + watchdog;
        let result = freeze_all(&groups, deadline);
        let frozen = Frozen {
            groups,
            stopped: stop.to_vec(),
        };
        if let Err(error) = result {
            undo(frozen);
            return Err(error);
        }
        let froze = begin.elapsed();
        self.frozen.hold(frozen, begin, deadline, undo);
        info!("user land frozen in {} us ({laps} before)", micros(froze));
        Ok(())
    }

    /// Thaws and starts what was stopped; idempotent.
    pub fn thaw(&self) -> Thawed {
        self.frozen.release(undo)
    }

    fn groups(&self) -> Result<Vec<PathBuf>, UserlandError> {
        if !self.root.join("cgroup.controllers").exists() {
            return Err(UserlandError::NoCgroups(self.root.clone()));
        }
        let own = own_group();
        let failed = |source| UserlandError::Group {
            group: self.root.clone(),
            source,
        };
        let mut groups = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            if AWAKE.contains(&name.as_str()) || !path.join("cgroup.freeze").exists() {
                continue;
            }
            if own.as_deref().is_some_and(|o| Path::new(o).starts_with(&path)) {
                return Err(UserlandError::Self_(own.unwrap_or_default()));
            }
            groups.push(path);
        }
        Ok(groups)
    }
}

/// Path of this process's control group below `/sys/fs/cgroup`.
fn own_group() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
    Some(format!("/sys/fs/cgroup{path}"))
}

fn freeze_all(groups: &[PathBuf], deadline: Instant) -> Result<(), UserlandError> {
    for group in groups {
        let failed = |source| UserlandError::Group {
            group: group.clone(),
            source,
        };
        match fs::write(group.join("cgroup.freeze"), "1") {
            // It went away by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(failed)?,
        }
    }
    for group in groups {
        let failed = |source| UserlandError::Group {
            group: group.clone(),
            source,
        };
        if !wait_frozen(group, deadline).map_err(failed)? {
            return Err(UserlandError::TooLate(group.clone()));
        }
    }
    Ok(())
}

/// Waits for `frozen 1` in `cgroup.events`; false when that did not come until `deadline`.
fn wait_frozen(group: &Path, deadline: Instant) -> io::Result<bool> {
    let mut events = match fs::File::open(group.join("cgroup.events")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|l| l == "frozen 1") {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = rustix::time::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn undo(frozen: Frozen) {
    for group in &frozen.groups {
        match fs::write(group.join("cgroup.freeze"), "0") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warning!("{} could not be thawed: {error}", group.display());
            }
            _ => {}
        }
    }
    start_in_background(frozen.stopped);
}

/// Nobody waits for units that start again after a cutover was taken back.
fn start_in_background(units: Vec<String>) {
    if units.is_empty() {
        return;
    }
    spawn("restart", move || {
        let started = Systemd::connect().and_then(|mut s| s.run_jobs(Verb::Start, &units, STOP));
        match started {
            Ok(results) => {
                for failed in results.iter().filter(|r| r.result != "done") {
                    warning!("{} did not start again: {}", failed.unit, failed.result);
                }
            }
            Err(error) => warning!("stopped units could not be started again: {error}"),
        }
    });
}

fn stop_units(units: &[String]) -> Result<(), UserlandError> {
    if units.is_empty() {
        return Ok(());
    }
    let stopped = Systemd::connect().and_then(|mut s| s.run_jobs(Verb::Stop, units, STOP));
    let problem = match stopped {
        Ok(results) => {
            let failed: Vec<String> = results
                .iter()
                .filter(|r| r.result != "done")
                .map(|r| format!("{}: {}", r.unit, r.result))
                .collect();
            if failed.is_empty() {
                return Ok(());
            }
            failed.join(", ")
        }
        Err(error) => error.to_string(),
    };
    start_in_background(units.to_vec());
    Err(UserlandError::Stop(problem))
}

/// Waits until no established TCP connection has unread data, but not for long: ingress is held, so what was
/// acknowledged gets to its program before that is frozen.
fn wait_for_receive_queues() {
    let deadline = Instant::now() + DRAIN;
    while unread() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn unread() -> bool {
    established().any(|line| {
        let queues = line.split_whitespace().nth(4).unwrap_or_default();
        queues
            .split_once(':')
            .is_some_and(|(_, rx)| rx.bytes().any(|b| b != b'0'))
    })
}

/// Lines of `/proc/net/tcp` and `tcp6` of established connections (state 01).
pub fn established() -> impl Iterator<Item = String> {
    let files = ["/proc/net/tcp", "/proc/net/tcp6"];
    let texts = files
        .into_iter()
        .map(|f| fs::read_to_string(f).unwrap_or_default());
    texts.flat_map(|t| {
        let lines: Vec<String> = t
            .lines()
            .skip(1)
            .filter(|l| l.split_whitespace().nth(3) == Some("01"))
            .map(str::to_owned)
            .collect();
        lines
    })
}
