//! Tests on a real control plane: what a test is given, and what is kept of one that fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow};

use crate::bed::repository;
use crate::control_plane::{self, ControlPlane, Options};

/// One run of the tests, on one control plane with our CRDs.
pub struct Run {
    plane: ControlPlane,
    dir: PathBuf,
}

/// What a test works with.
pub struct Context<'run> {
    /// The control plane that all tests share; who stops it starts one of its own.
    pub plane: &'run ControlPlane,
    /// A namespace for this test alone. Objects without a namespace are told apart by their names.
    pub namespace: String,
    /// A folder for this test alone: files, logs, a control plane of its own.
    pub dir: PathBuf,
    started: Instant,
}

impl Context<'_> {
    /// Says what the test has come to.
    pub fn say(&self, what: &str) {
        eprintln!("    {:>6.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// kubectl in the test's namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.plane
            .kubectl(&[&["--namespace", &self.namespace], arguments].concat())
    }

    /// kubectl in the test's namespace with a manifest as its input.
    pub fn kubectl_with(&self, arguments: &[&str], manifest: &str) -> Result<String> {
        let arguments = [&["--namespace", &self.namespace], arguments].concat();
        self.plane.kubectl_with(&arguments, manifest)
    }
}

impl Run {
    /// Starts the control plane and applies our CRDs.
    pub fn prepare() -> Result<Self> {
        let runs = repository().join("target/cluster");
        end_orphans(&runs)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?;
        let dir = runs.join(format!("{}-{}", now.as_secs(), std::process::id()));
        let started = Instant::now();
        let plane = ControlPlane::start(&dir.join("control-plane"), Options::default())?;
        plane.apply_crds()?;
        eprintln!(
            "  control plane with our CRDs: {:.1} s, {}",
            started.elapsed().as_secs_f64(),
            dir.display()
        );
        Ok(Self { plane, dir })
    }

    /// Runs one test in a namespace of its own.
    pub fn test(&self, name: &str, test: fn(&Context) -> Result<()>) -> Result<(), String> {
        let result = self.run(name, test);
        result.map_err(|error| format!("{error:#}\nlogs: {}", self.dir.display()))
    }

    fn run(&self, name: &str, test: fn(&Context) -> Result<()>) -> Result<()> {
        let namespace: String = name.replace('_', "-").chars().take(63).collect();
        let namespace = namespace.trim_end_matches('-').to_owned();
        self.plane.kubectl(&["create", "namespace", &namespace])?;
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let context = Context {
            plane: &self.plane,
            namespace,
            dir,
            started: Instant::now(),
        };
        catch_unwind(AssertUnwindSafe(|| test(&context))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("{}", text.unwrap_or("the test panicked")))
        })
    }

    /// Ends the control plane and removes what it has stored; its logs stay.
    pub fn finish(self) -> Result<()> {
        let data = self.plane.dir().join("etcd");
        self.plane.stop()?;
        std::fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))
    }
}

/// Stops control planes of runs that were killed: each is in a folder `<time>-<process id of its run>`.
fn end_orphans(runs: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(runs) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.split_once('-').map(|(_, pid)| Path::new("/proc").join(pid));
        if owner.is_some_and(|owner| !owner.exists()) {
            let planes = std::fs::read_dir(entry.path()).into_iter().flatten().flatten();
            for plane in planes {
                control_plane::stop(&plane.path())?;
            }
        }
    }
    Ok(())
}
