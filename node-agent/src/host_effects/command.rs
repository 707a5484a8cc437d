//! `update.command` and `reboot.command`: programs on the host.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::durable;
use crate::host_update::effects::CommandEnd;
use crate::vmm::Process;

/// How much of a command's output is kept.
const OUTPUT: usize = 4096;
/// How long one look at a command may take.
const LOOK: Duration = Duration::from_millis(900);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a command that reboots the host may take before that is taken for its acceptance.
const ACCEPTED: Duration = Duration::from_secs(15);

/// Runs commands of updates, each in a transient unit of its own where there is systemd, so that it outlives
/// the agent; else as a child.
#[derive(Debug, Default)]
pub struct Commands {
    children: Mutex<HashMap<String, Child>>,
}

/// How a command is kept.
#[derive(Clone, Debug)]
pub struct Keeping<'a> {
    /// Whether systemd keeps it.
    pub systemd: bool,
    /// Where its output goes: lost at a reboot.
    pub run_dir: &'a Path,
}

impl Keeping<'_> {
    fn log(&self, uid: &str) -> PathBuf {
        self.run_dir.join("commands").join(format!("{uid}.log"))
    }

    fn process(&self, uid: &str) -> PathBuf {
        self.run_dir.join("commands").join(format!("{uid}.json"))
    }
}

impl Commands {
    /// Begins the command where it was not begun, and waits a moment for its end; `None`: not yet.
    pub fn run(
        &self,
        keeping: &Keeping<'_>,
        uid: &str,
        command: &[String],
    ) -> io::Result<Option<CommandEnd>> {
        let [program, arguments @ ..] = command else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the command is empty",
            ));
        };
        durable::make_dir(&keeping.run_dir.join("commands")).map_err(io::Error::other)?;
        if keeping.systemd {
            self.run_unit(keeping, uid, program, arguments)
        } else {
            self.run_child(keeping, uid, program, arguments)
        }
    }

    /// Ends the command, for sure, and forgets its result.
    pub fn end(&self, keeping: &Keeping<'_>, uid: &str) -> io::Result<()> {
        if keeping.systemd {
            let unit = unit(uid);
            systemctl(&["stop", &unit])?;
            systemctl(&["reset-failed", &unit])?;
        }
        let child = self.children().remove(uid);
        if let Some(mut child) = child {
            child.kill()?;
            child.wait()?;
        }
        let _ = fs::remove_file(keeping.log(uid));
        let _ = fs::remove_file(keeping.process(uid));
        Ok(())
    }

    fn run_unit(
        &self,
        keeping: &Keeping<'_>,
        uid: &str,
        program: &str,
        arguments: &[String],
    ) -> io::Result<Option<CommandEnd>> {
        let unit = unit(uid);
        let mut shown = show(&unit)?;
        if shown.get("LoadState").is_none_or(|state| state != "loaded") {
            let log = keeping.log(uid);
            let _ = fs::remove_file(&log);
            let log = log.display();
            let output = Command::new("systemd-run")
                // It would notify systemd in our name.
                .env_remove("NOTIFY_SOCKET")
                .arg(format!("--unit={unit}"))
                .arg("--quiet")
                .arg("--description=Understudy update of this host")
                // Stays after its end, so that a restarted agent finds the result.
                .args(["--property=Type=exec", "--property=RemainAfterExit=yes"])
                .arg(format!("--property=StandardOutput=append:{log}"))
                .arg(format!("--property=StandardError=append:{log}"))
                .args(["--", program])
                .args(arguments)
                .stdin(Stdio::null())
                .output()?;
            if !output.status.success() {
                // A program that cannot be executed fails here: that is the command's failure, not ours.
                return Ok(Some(CommandEnd {
                    success: false,
                    output: end_of(&String::from_utf8_lossy(&output.stderr)),
                }));
            }
            shown = show(&unit)?;
        }
        let deadline = Instant::now() + LOOK;
        loop {
            let value = |name: &str| shown.get(name).map(String::as_str).unwrap_or_default();
            let ended = match (value("ActiveState"), value("SubState")) {
                ("active", "exited") => Some(true),
                ("failed", _) => Some(false),
                // It was removed meanwhile: nobody knows how it ended.
                ("inactive", _) => Some(false),
                _ => None,
            };
            if let Some(success) = ended {
                let status = match success {
                    true => String::new(),
                    false => format!("{} {}: ", value("Result"), value("ExecMainStatus")),
                };
                return Ok(Some(CommandEnd {
                    success,
                    output: status + &read_end(&keeping.log(uid)),
                }));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(PAUSE);
            shown = show(&unit)?;
        }
    }

    fn run_child(
        &self,
        keeping: &Keeping<'_>,
        uid: &str,
        program: &str,
        arguments: &[String],
    ) -> io::Result<Option<CommandEnd>> {
        let log = keeping.log(uid);
        let mut children = self.children();
        if !children.contains_key(uid) {
            let before: Option<Process> = durable::read_json(&keeping.process(uid)).unwrap_or(None);
            if before.is_some_and(|process| process.is_alive()) {
                // Of an agent before this one. How it ends will not be known; then it is run again.
                drop(children);
                std::thread::sleep(LOOK);
                return Ok(None);
            }
            let file = File::create(&log)?;
            let spawned = Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(file.try_clone()?)
                .stderr(file)
                .spawn();
            let child = match spawned {
                Ok(child) => child,
                Err(error) => {
                    return Ok(Some(CommandEnd {
                        success: false,
                        output: format!("{program}: {error}"),
                    }));
                }
            };
            if let Some(process) = Process::of(child.id()) {
                durable::write_json_relaxed(&keeping.process(uid), &process).map_err(io::Error::other)?;
            }
            children.insert(uid.to_owned(), child);
        }
        let deadline = Instant::now() + LOOK;
        loop {
            let Some(child) = children.get_mut(uid) else {
                return Ok(None);
            };
            if let Some(status) = child.try_wait()? {
                return Ok(Some(ended(status, &log)));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            drop(children);
            std::thread::sleep(PAUSE);
            children = self.children();
        }
    }

    fn children(&self) -> std::sync::MutexGuard<'_, HashMap<String, Child>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a command that reboots the host. `Err` in the command's own words where it fails; one that is still
/// running after a while is taken to have accepted.
pub fn reboot(command: &[String]) -> Result<(), String> {
    let [program, arguments @ ..] = command else {
        return Err("spec.reboot.command is empty".to_owned());
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("running {program}: {error}"))?;
    let deadline = Instant::now() + ACCEPTED;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                let mut text = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    let _ = io::Read::read_to_string(&mut stderr, &mut text);
                }
                return Err(format!("{program} ended with {status}: {}", end_of(&text)));
            }
            Ok(None) if Instant::now() >= deadline => return Ok(()),
            Ok(None) => std::thread::sleep(PAUSE),
            Err(error) => return Err(format!("waiting for {program}: {error}")),
        }
    }
}

fn ended(status: ExitStatus, log: &Path) -> CommandEnd {
    let text = read_end(log);
    CommandEnd {
        success: status.success(),
        output: match status.success() {
            true => text,
            false => format!("{status}: {text}"),
        },
    }
}

fn unit(uid: &str) -> String {
    format!("understudy-update-{uid}.service")
}

fn systemctl(arguments: &[&str]) -> io::Result<String> {
    let output = Command::new("systemctl")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn show(unit: &str) -> io::Result<HashMap<String, String>> {
    let properties = "--property=LoadState,ActiveState,SubState,Result,ExecMainStatus";
    Ok(systemctl(&["show", properties, unit])?
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

fn read_end(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    end_of(&String::from_utf8_lossy(&bytes))
}

fn end_of(text: &str) -> String {
    let text = text.trim();
    let mut from = text.len().saturating_sub(OUTPUT);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        ["sh", "-c", text].map(str::to_owned).to_vec()
    }

    fn run(commands: &Commands, keeping: &Keeping<'_>, uid: &str, text: &str) -> CommandEnd {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(end) = commands.run(keeping, uid, &words(text)).unwrap() {
                return end;
            }
            assert!(Instant::now() < deadline);
        }
    }

    #[test]
    fn a_command_runs_once_for_an_update_and_its_failure_is_told_in_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let keeping = Keeping {
            systemd: false,
            run_dir: dir.path(),
        };
        let commands = Commands::default();
        let count = dir.path().join("count");
        let text = format!("echo once >> {}; echo well", count.display());
        for _ in 0..3 {
            let end = run(&commands, &keeping, "u1", &text);
            assert_eq!((end.success, end.output.as_str()), (true, "well"));
        }
        assert_eq!(fs::read_to_string(&count).unwrap(), "once\n");

        let end = run(&commands, &keeping, "u2", "echo 'E: no space left' >&2; exit 100");
        assert!(!end.success);
        assert!(
            end.output.contains("100") && end.output.contains("E: no space left"),
            "{}",
            end.output
        );
        let end = commands
            .run(&keeping, "u3", &["/no/such/program".to_owned()])
            .unwrap()
            .unwrap();
        assert!(!end.success && end.output.contains("/no/such/program"));
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let keeping = Keeping {
            systemd: false,
            run_dir: dir.path(),
        };
        let commands = Commands::default();
        let command = ["sleep", "600"].map(str::to_owned);
        assert_eq!(commands.run(&keeping, "u", &command).unwrap(), None);
        let process: Process = durable::read_json(&keeping.process("u")).unwrap().unwrap();
        assert!(process.is_alive());
        commands.end(&keeping, "u").unwrap();
        assert!(!process.is_alive());
        commands.end(&keeping, "u").unwrap();
    }

    #[test]
    fn a_reboot_that_its_command_refuses_is_told_in_its_words() {
        reboot(&["true".to_owned()]).unwrap();
        let error = reboot(&words("echo 'not today' >&2; exit 3")).unwrap_err();
        assert!(error.contains("not today"), "{error}");
        assert!(reboot(&["/no/such/reboot".to_owned()]).is_err());
    }
}
