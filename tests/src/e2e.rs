//! End-to-end tests: what a test is given, and what is kept of one that fails.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::bed::{Node, Ssh, Stage, repository};
use crate::machine::Machine;
use anyhow::{Context as _, Result, anyhow};

/// One run of the tests, on one stage.
pub struct Run {
    stage: Stage,
    binaries: PathBuf,
    dir: PathBuf,
}

/// What a test works with.
pub struct Context<'run> {
    /// The node, images and binaries.
    pub stage: &'run Stage,
    /// The directory of static binaries.
    pub binaries: PathBuf,
    /// A directory on the node for this test alone, empty at its start; kept until its next run. Text
    /// files in it are collected when the test fails.
    pub dir: String,
    started: Instant,
}

impl Context<'_> {
    /// The node VM.
    pub fn node(&self) -> &Node {
        &self.stage.node
    }

    /// Commands in the node VM.
    pub fn ssh(&self) -> &Ssh {
        self.stage.node.ssh()
    }

    /// Says what the test has come to.
    pub fn say(&self, what: &str) {
        eprintln!("    {:>6.1} s  {what}", self.started.elapsed().as_secs_f64());
    }
}

impl Run {
    /// Sets the stage: images, node, binaries.
    pub fn prepare() -> Result<Self> {
        let node = std::env::var("UNDERSTUDY_NODE").unwrap_or_else(|_| "node".to_owned());
        let binaries = Stage::binaries()?;
        let stage = Stage::set(&node, &binaries)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?;
        let dir = repository()
            .join("target/e2e")
            .join(format!("{}-{}", now.as_secs(), std::process::id()));
        Ok(Self { stage, binaries, dir })
    }

    /// Runs one test; what went on is collected when it fails. A test whose node was lost under it is run once
    /// more, for emulated processors have faults of their own: a test that loses its node twice has failed.
    pub fn test(&self, name: &str, test: fn(&Context) -> Result<()>) -> Result<(), String> {
        let outcome = match self.run(name, test) {
            Ok(()) => Ok(()),
            Err(error) if self.reset_lost_node() => {
                eprintln!("    {name} failed when its node was lost ({error:#}); once more");
                self.run(name, test)
            }
            failed => failed,
        };
        outcome.map_err(|error| {
            // Logs are on its disk, and a test may have failed while the node was down.
            let powered = self.stage.power_on();
            let logs = match powered.and_then(|()| self.collect(name)) {
                Ok(dir) => format!("logs: {}", dir.display()),
                Err(error) => format!("logs could not be collected: {error:#}"),
            };
            format!("{error:#}\n{logs}")
        })
    }

    /// Whether the node was lost; then what can be seen of it is printed, for a machine may keep no files of a run, and
    /// its power is cut.
    fn reset_lost_node(&self) -> bool {
        let node = &self.stage.node;
        let kept = match node.lost() {
            Ok(Some(kept)) => kept,
            Ok(None) => return false,
            Err(error) => {
                eprintln!("    whether the node is lost could not be told: {error:#}");
                return false;
            }
        };
        match fs::read_to_string(&kept) {
            Ok(seen) => eprintln!("{seen}"),
            Err(error) => eprintln!("    {} cannot be read: {error}", kept.display()),
        }
        match node.kill() {
            Ok(()) => true,
            Err(error) => {
                eprintln!("    the lost node could not be reset: {error:#}");
                false
            }
        }
    }

    fn run(&self, name: &str, test: fn(&Context) -> Result<()>) -> Result<()> {
        eprintln!();
        // A test before this one may have failed with the power cut.
        self.stage.power_on()?;
        let dir = Self::dir_on_node(name);
        let ssh = self.stage.node.ssh();
        ssh.run(&format!(
            "rm -rf {dir} && mkdir -p {dir} && journalctl --rotate -q && echo 'e2e: {name}' >/dev/kmsg"
        ))?;
        let context = Context {
            stage: &self.stage,
            binaries: self.binaries.clone(),
            dir,
            started: Instant::now(),
        };
        // A failed assertion is a failed test like any other, and has logs too.
        let result = catch_unwind(AssertUnwindSafe(|| test(&context))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("{}", text.unwrap_or("the test panicked")))
        });
        if result.is_ok() {
            context.say("ok");
        }
        result
    }

    /// Everything that may explain a failure, in one folder on this machine.
    fn collect(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let node = &self.stage.node;
        let ssh = node.ssh();
        for (file, line) in [
            ("node-processes.log", "ps axfww -o pid,ppid,stat,rss,args"),
            ("node-network.log", "ip -d addr; bridge link; bridge fdb"),
            (
                "node-disk.log",
                "df -h; find /var/lib/understudy -xdev -printf '%s %b %p\\n' | head -n 500",
            ),
        ] {
            fs::write(dir.join(file), ssh.output(line)?.stdout)?;
        }
        Machine::in_node(&self.stage, &self.binaries).collect_logs(&dir.join("agent"))?;
        let files = dir.join("files");
        fs::create_dir_all(&files)?;
        let tar = ssh
            .ssh()
            .arg(format!(
                "cd {} && find . -type f -size -2048k \\( -name '*.log*' -o -name '*.json' -o -name '*.yaml' -o -name '*.txt' -o -name '*.jsonl' \\) -print0 \
                 | tar --null -T - -cf -",
                Self::dir_on_node(name)
            ))
            .output()
            .context("cannot run ssh")?;
        if tar.stdout.is_empty() {
            return Ok(dir);
        }
        let archive = dir.join("files.tar");
        fs::write(&archive, tar.stdout)?;
        std::process::Command::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&files)
            .status()
            .context("cannot run tar")?;
        fs::remove_file(&archive)?;
        Ok(dir)
    }

    fn dir_on_node(name: &str) -> String {
        format!("/var/lib/understudy/e2e/{name}")
    }
}
