//! A process that is not (or no longer) our child: told from a later one with the same number, and ended.

use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Identity of a process: its number, when it started, and in which boot of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Process ID.
    pub pid: u32,
    /// `starttime` of `/proc/<pid>/stat` (proc(5), field 22), in clock ticks since the host's boot.
    pub start_time: u64,
    /// The host's `/proc/sys/kernel/random/boot_id`.
    pub host_boot_id: String,
}

/// The host's boot ID.
pub fn host_boot_id() -> String {
    // The kernel always has it; where /proc is missing nothing else works either.
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

impl Process {
    /// The running process `pid`; `None` when there is none (or only its zombie).
    pub fn of(pid: u32) -> Option<Process> {
        Some(Process {
            pid,
            start_time: start_time(pid)?,
            host_boot_id: host_boot_id(),
        })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.host_boot_id == host_boot_id() && start_time(self.pid) == Some(self.start_time)
    }

    /// When it was started, in microseconds of the host's `CLOCK_BOOTTIME`, to 10 ms (`USER_HZ` is 100 on
    /// every architecture that we run on).
    pub fn started_boot_us(&self) -> i64 {
        i64::try_from(self.start_time).unwrap_or(0).saturating_mul(10_000)
    }

    /// Waits until it has ended, at most for `limit`; returns whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let Some(pidfd) = self.open() else {
            return true;
        };
        let deadline = Instant::now() + limit;
        loop {
            if !self.is_alive() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else {
                return false;
            };
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return !self.is_alive(),
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return !self.is_alive(),
            }
        }
    }

    /// Kills it and waits until it is gone; returns whether it is.
    pub fn kill(&self, limit: Duration) -> bool {
        if let Some(pidfd) = self.open() {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        self.wait(limit)
    }

    /// A descriptor of this very process; `None` when it is gone.
    fn open(&self) -> Option<std::os::fd::OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Looked at after opening: from here on the descriptor means what was looked at.
        self.is_alive().then_some(pidfd)
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so fields are counted after its closing parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let threads: u64 = fields.nth(16)?.parse().ok()?;
    // A main thread is a zombie at once when it is killed; until the last of the others has ended as well,
    // its files are open and its locks are held.
    if (state == "Z" || state == "X") && threads <= 1 {
        return None;
    }
    fields.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_whose_main_thread_has_ended_lives_as_long_as_the_others() {
        // The main thread leaves by the system call `exit` (60), which ends no other; that one reads on.
        let program = "threads->create(sub { <STDIN> })->detach; syscall(60, 0)";
        let mut child = Command::new("perl")
            .args(["-Mthreads", "-e", program])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::of(child.id()).unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(&stat).unwrap().contains(") Z ") {
            assert!(
                std::time::Instant::now() < deadline,
                "the main thread did not end"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(process.is_alive());
        assert!(process.kill(Duration::from_secs(60)));
        child.wait().unwrap();
    }

    #[test]
    fn a_process_is_killed_and_a_later_one_with_its_number_is_spared() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_alive());
        let other = Process {
            start_time: process.start_time - 1,
            ..process.clone()
        };
        assert!(!other.is_alive());
        assert!(other.kill(Duration::from_secs(1)));
        assert!(process.is_alive());
        assert!(process.kill(Duration::from_secs(30)));
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
