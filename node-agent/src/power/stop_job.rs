//! The net behind the inhibitor: when systemd stops the agent, whether it does so because the host goes
//! down.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::Shutdown;

/// systemctl(1).
#[derive(Clone, Debug)]
pub struct Systemctl {
    program: PathBuf,
}

impl Systemctl {
    /// With this program, a path or a name to be found in `$PATH`.
    pub fn new(program: &Path) -> Systemctl {
        Systemctl {
            program: program.to_owned(),
        }
    }

    /// Whether the host goes down, and how; `None` when it does not (the agent alone is stopped or
    /// restarted), or when there is no systemd.
    ///
    /// systemd says `stopping` from the moment a job for `shutdown.target` is queued, which every shutdown
    /// does, and the job's companion tells which one it is.
    pub fn shutdown(&self) -> Option<Shutdown> {
        // Its exit status is 1 for everything but `running`.
        let state = self.output(&["is-system-running"])?;
        if state.trim() != "stopping" {
            return None;
        }
        let jobs = self
            .output(&["list-jobs", "--no-legend", "--plain"])
            .unwrap_or_default();
        let queued = |target: &str| {
            jobs.lines()
                .any(|line| line.split_ascii_whitespace().any(|word| word == target))
        };
        if ["reboot.target", "kexec.target", "soft-reboot.target"]
            .into_iter()
            .any(queued)
        {
            Some(Shutdown::Reboot)
        } else if ["poweroff.target", "halt.target"].into_iter().any(queued) {
            Some(Shutdown::PowerOff)
        } else {
            Some(Shutdown::Unknown)
        }
    }

    /// How long systemd waits for a unit to stop (`TimeoutStopUSec`); `None` where it cannot be told, or there
    /// is no limit.
    pub fn stop_timeout(&self, unit: &str) -> Option<Duration> {
        let shown = self.output(&["show", "--property=TimeoutStopUSec", "--value", unit])?;
        time_span(shown.trim())
    }

    fn output(&self, arguments: &[&str]) -> Option<String> {
        let output = Command::new(&self.program)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        match output {
            Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
            Err(error) => {
                tracing::debug!(program = %self.program.display(), %error, "systemd cannot be asked");
                None
            }
        }
    }
}

/// A time span as systemd prints it (systemd.time(7)): `12min`, `1h 30min 5s`, `250ms`.
fn time_span(text: &str) -> Option<Duration> {
    if text.is_empty() {
        return None;
    }
    text.split_ascii_whitespace()
        .map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let (number, unit) = part.split_at(digits);
            let number: f64 = number.parse().ok()?;
            let seconds = match unit {
                "us" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "min" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
            Duration::try_from_secs_f64(number * seconds).ok()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn systemctl(dir: &Path, state: &str, jobs: &str) -> Systemctl {
        let program = dir.join("systemctl");
        let text = format!(
            "#!/bin/sh\ncase $1 in\nis-system-running) echo {state}; exit 1;;\nlist-jobs) printf '{jobs}';;\nesac\n"
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Systemctl::new(&program)
    }

    #[test]
    fn a_restart_of_the_agent_is_no_shutdown_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        for state in ["running", "degraded", "starting", "offline", "unknown"] {
            let jobs = "412 understudy-node.service restart running\\n";
            assert_eq!(systemctl(dir.path(), state, jobs).shutdown(), None, "{state}");
        }
        assert_eq!(Systemctl::new(Path::new("/no/such/systemctl")).shutdown(), None);
    }

    #[test]
    fn the_time_that_a_unit_has_to_stop_is_read_as_systemd_prints_it() {
        assert_eq!(time_span("12min"), Some(Duration::from_secs(720)));
        assert_eq!(time_span("1h 30min 5s"), Some(Duration::from_secs(5405)));
        assert_eq!(time_span("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(time_span("infinity"), None);
        assert_eq!(time_span(""), None);
    }

    #[test]
    fn the_queue_of_jobs_tells_how_the_host_goes_down() {
        let dir = tempfile::tempdir().unwrap();
        for (job, how) in [
            ("reboot.target", Shutdown::Reboot),
            ("kexec.target", Shutdown::Reboot),
            ("poweroff.target", Shutdown::PowerOff),
            ("halt.target", Shutdown::PowerOff),
            ("emergency.target", Shutdown::Unknown),
        ] {
            let jobs = format!("1 {job} start waiting\\n7 understudy-node.service stop running\\n");
            assert_eq!(
                systemctl(dir.path(), "stopping", &jobs).shutdown(),
                Some(how),
                "{job}"
            );
        }
    }
}
