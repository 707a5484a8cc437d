//! Starting a VMM process so that it outlives the agent: as a transient systemd unit, or detached.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use understudy_vmm_control::api::VmInfo;
use understudy_vmm_control::config::VmConfig;

use super::instance::{Instance, Instances};
use super::process::Process;
use crate::config::Supervisor;
use crate::durable::{self, DurableError};
use crate::store::Key;

/// How long a VMM may take from its start to its first answer. Mapping the guest's memory and reading
/// its kernel are in it.
const START: Duration = Duration::from_secs(60);
/// Pause between two looks at a VMM that is starting.
const LOOK: Duration = Duration::from_millis(20);
/// How much of a VMM's log an error quotes.
const QUOTED_LOG: u64 = 2048;
/// The slice of all VMMs.
const SLICE: &str = "understudy-vmms.slice";

/// Why a VMM did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file could not be made.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The binary could not be run.
    #[error("starting {program}: {source}; is it installed? The configuration's `vmm` names it")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// systemd did not start the unit.
    #[error("systemd-run did not start {unit}: {message}")]
    Unit {
        /// The unit.
        unit: String,
        /// What it said.
        message: String,
    },
    /// It ended before it answered.
    #[error("the VMM ended at its start: {message} (whole log: {log})")]
    Ended {
        /// The last lines of its log.
        message: String,
        /// The log.
        log: PathBuf,
    },
    /// It did not answer in time.
    #[error("the VMM does not answer on {control} after {seconds} s: {message} (log: {log})")]
    Silent {
        /// The control socket.
        control: PathBuf,
        /// How long we waited.
        seconds: u64,
        /// What the last attempt said.
        message: String,
        /// The log.
        log: PathBuf,
    },
}

/// Starts VMMs.
#[derive(Clone, Debug)]
pub struct Launcher {
    vmm: PathBuf,
    systemd: bool,
}

impl Launcher {
    /// A launcher of the binary `vmm`.
    pub fn new(vmm: &Path, supervisor: Supervisor) -> Launcher {
        let systemd = match supervisor {
            Supervisor::Systemd => true,
            Supervisor::Detached => false,
            // sd_booted(3).
            Supervisor::Auto => Path::new("/run/systemd/system").is_dir(),
        };
        Launcher {
            vmm: vmm.to_owned(),
            systemd,
        }
    }

    /// Whether systemd keeps what is started.
    pub fn has_systemd(&self) -> bool {
        self.systemd
    }

    /// Name of the unit of an incarnation, where there is systemd.
    pub fn unit(&self, key: &Key, incarnation: u64) -> Option<String> {
        self.systemd.then(|| {
            format!(
                "understudy-vmm-{}-{}-{incarnation}.service",
                key.namespace, key.name
            )
        })
    }

    /// Starts `instance` with `config`, or adopts it where it runs already; returns when it answers. The
    /// record is durable before the process exists, so that no process is ever unknown.
    pub fn start(
        &self,
        instances: &Instances,
        instance: &mut Instance,
        config: &VmConfig,
    ) -> Result<VmInfo, LaunchError> {
        if instance.is_alive() {
            return self.await_answer(instances, instance, None);
        }
        instance.process = None;
        for directory in [
            instance.control.parent(),
            instance.log.parent(),
            instance.config.parent(),
        ] {
            durable::make_dir(directory.unwrap_or(Path::new("/")))?;
        }
        instances.put(instance)?;
        durable::write_json(&instance.config, config)?;
        let child = match &instance.unit {
            Some(unit) => {
                self.start_unit(unit, instance)?;
                None
            }
            None => Some(self.start_detached(instance)?),
        };
        instance.process = match (&child, &instance.unit) {
            (Some(child), _) => Process::of(child.id()),
            (None, Some(unit)) => main_pid(unit).and_then(Process::of),
            (None, None) => None,
        };
        instances.put(instance)?;
        self.await_answer(instances, instance, child)
    }

    fn await_answer(
        &self,
        instances: &Instances,
        instance: &mut Instance,
        child: Option<Child>,
    ) -> Result<VmInfo, LaunchError> {
        let deadline = Instant::now() + START;
        if let Some(child) = child {
            reap(child);
        }
        loop {
            let message = match instance.client().info() {
                Ok(info) => {
                    if instance.process.is_none() {
                        instance.process = Process::of(info.pid);
                        instances.put(instance)?;
                    }
                    return Ok(info);
                }
                Err(error) => error.to_string(),
            };
            let ended = match (&instance.process, &instance.unit) {
                (Some(process), _) => !process.is_alive(),
                // It was gone before its number could be read.
                (None, Some(unit)) => main_pid(unit).is_none(),
                (None, None) => true,
            };
            if ended {
                return Err(LaunchError::Ended {
                    message: log_end(&instance.log),
                    log: instance.log.clone(),
                });
            }
            if Instant::now() >= deadline {
                return Err(LaunchError::Silent {
                    control: instance.control.clone(),
                    seconds: START.as_secs(),
                    message,
                    log: instance.log.clone(),
                });
            }
            std::thread::sleep(LOOK);
        }
    }

    fn start_unit(&self, unit: &str, instance: &Instance) -> Result<(), LaunchError> {
        // A unit that failed before keeps its name until it is forgotten.
        let _ = Command::new("systemctl")
            .args(["reset-failed", unit])
            .stderr(Stdio::null())
            .status();
        let log = instance.log.display();
        let output = Command::new("systemd-run")
            // It would notify systemd in our name.
            .env_remove("NOTIFY_SOCKET")
            .arg(format!("--unit={unit}"))
            .arg(format!("--slice={SLICE}"))
            .args(["--quiet", "--collect"])
            .arg(format!(
                "--description=Understudy VMM, incarnation {}",
                instance.incarnation
            ))
            .args(["--property=Type=exec", "--property=Restart=no"])
            // At a shutdown of the host units stop in reverse order: the agent first, whose stop job saves
            // sessions, then its VMMs, and only then networks and file systems.
            .arg("--property=Before=understudy-node.service")
            .arg("--property=After=network.target remote-fs.target")
            .arg("--property=TimeoutStopSec=90s")
            .args(["--property=OOMScoreAdjust=-500", "--property=LimitNOFILE=65536"])
            .arg(format!("--property=StandardOutput=append:{log}"))
            .arg(format!("--property=StandardError=append:{log}"))
            .arg("--")
            .arg(&self.vmm)
            .arg("run")
            .arg("--config")
            .arg(&instance.config)
            .output()
            .map_err(|source| LaunchError::Spawn {
                program: "systemd-run".into(),
                source,
            })?;
        if !output.status.success() {
            return Err(LaunchError::Unit {
                unit: unit.to_owned(),
                message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        Ok(())
    }

    fn start_detached(&self, instance: &Instance) -> Result<Child, LaunchError> {
        let open = |path: &Path| OpenOptions::new().create(true).append(true).open(path);
        let spawn = |source| LaunchError::Spawn {
            program: self.vmm.clone(),
            source,
        };
        if !self.vmm.exists() {
            return Err(spawn(io::ErrorKind::NotFound.into()));
        }
        let log = open(&instance.log).map_err(spawn)?;
        // setsid(1): a session of its own, so that no terminal's hang-up or Ctrl-C reaches it. A child
        // that has just been forked leads no group, so it keeps the process ID that we know.
        Command::new("setsid")
            .arg(&self.vmm)
            .arg("run")
            .arg("--config")
            .arg(&instance.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(spawn)?)
            .stderr(log)
            .spawn()
            .map_err(spawn)
    }
}

/// Collects a child's exit so that no zombie stays.
fn reap(mut child: Child) {
    let _ = std::thread::Builder::new()
        .name("reaper".into())
        .spawn(move || child.wait());
}

/// Main process of a unit that is starting or runs.
fn main_pid(unit: &str) -> Option<u32> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let output = Command::new("systemctl")
            .args(["show", "--property=MainPID,ActiveState", unit])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let value = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_default()
                .to_owned()
        };
        match value("MainPID").parse::<u32>() {
            Ok(pid) if pid > 0 => return Some(pid),
            _ if value("ActiveState") != "activating" => return None,
            _ if Instant::now() >= deadline => return None,
            _ => std::thread::sleep(LOOK),
        }
    }
}

/// Length of a log, to find later what was added to it.
pub(crate) fn log_length(log: &Path) -> u64 {
    fs::metadata(log).map_or(0, |metadata| metadata.len())
}

/// What was added to a log since it had this length: its end, where it is much.
pub(crate) fn log_since(log: &Path, length: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(log)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.max(end.saturating_sub(QUOTED_LOG))))?;
        let mut text = Vec::new();
        file.take(QUOTED_LOG).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

/// The last lines of a log, for an error.
pub(crate) fn log_end(log: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(QUOTED_LOG)))?;
        let mut text = Vec::new();
        file.take(QUOTED_LOG).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    match read() {
        Ok(text) => {
            let lines: Vec<&str> = text
                .lines()
                .rev()
                .filter(|line| !line.trim().is_empty())
                .take(4)
                .collect();
            if lines.is_empty() {
                return "it said nothing".to_owned();
            }
            lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
        }
        Err(error) => format!("no log: {error}"),
    }
}

#[cfg(test)]
#[path = "launch_test.rs"]
mod tests;
