//! Freezing and thawing, on a file system and on control groups that the tests made themselves.
#![allow(clippy::unwrap_used)]

#[path = "common/images.rs"]
mod images;
#[path = "common/root.rs"]
mod root;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use images::{Mounted, make};
use root::is_root;
use understudy_guest::freeze::Filesystems;
use understudy_guest::userland::Userland;
use understudy_guest::view::View;

const PATIENCE: Duration = Duration::from_secs(60);

/// A file system of our own.
struct Disk {
    at: PathBuf,
    _mounted: Mounted,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        make(&image);
        Self {
            _mounted: Mounted::new(&image, &at),
            at,
            _dir: dir,
        }
    }
}

/// A program that writes a file and says so on each line.
fn writer(file: &Path) -> (Child, std::sync::mpsc::Receiver<()>) {
    let script = format!(
        "while :; do echo x >> {0}; sync {0}; echo wrote; done",
        file.display()
    );
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in lines.map_while(Result::ok) {
            if told.send(()).is_err() {
                return;
            }
        }
    });
    heard.recv_timeout(PATIENCE).unwrap();
    (child, heard)
}

/// Waits until the writer writes nothing any more: what it wrote before is not counted.
fn silent(heard: &std::sync::mpsc::Receiver<()>) -> bool {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if heard.recv_timeout(Duration::from_millis(300)).is_err() {
            return true;
        }
    }
    false
}

#[test]
fn a_frozen_file_system_makes_writers_wait_until_it_thaws() {
    if !is_root() {
        return;
    }
    let disk = Disk::new();
    let filesystems = Filesystems::default();
    let (mut child, heard) = writer(&disk.at.join("f"));
    filesystems
        .freeze_these(vec![View::open(&disk.at).unwrap()], 60_000)
        .unwrap();
    assert!(silent(&heard));
    assert!(
        filesystems.freeze_these(Vec::new(), 60_000).is_err(),
        "frozen for something else"
    );
    let thawed = filesystems.thaw();
    assert!(!thawed.by_watchdog && thawed.frozen_us > 0);
    heard.recv_timeout(PATIENCE).expect("the writer goes on");
    assert_eq!(filesystems.thaw().frozen_us, 0, "thawing again does nothing");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn when_the_host_falls_silent_the_file_system_thaws_by_itself() {
    if !is_root() {
        return;
    }
    let disk = Disk::new();
    let filesystems = Filesystems::default();
    let (mut child, heard) = writer(&disk.at.join("f"));
    filesystems
        .freeze_these(vec![View::open(&disk.at).unwrap()], 1500)
        .unwrap();
    while heard.try_recv().is_ok() {}
    heard.recv_timeout(PATIENCE).expect("the writer goes on");
    assert!(filesystems.thaw().by_watchdog);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A control group of its own below the unified hierarchy.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let root = roots
            .iter()
            .map(Path::new)
            .find(|r| r.join("cgroup.controllers").exists())?;
        let path = root.join(format!("understudy-test-{}-{name}", std::process::id()));
        for group in ["system.slice", "user.slice", "understudy.slice", "init.scope"] {
            fs::create_dir_all(path.join(group)).ok()?;
        }
        Some(Self(path))
    }

    fn run(&self, group: &str) -> Child {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(self.0.join(group).join("cgroup.procs"), child.id().to_string()).unwrap();
        child
    }

    fn is_frozen(&self, group: &str) -> bool {
        fs::read_to_string(self.0.join(group).join("cgroup.events"))
            .unwrap()
            .contains("frozen 1")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn user_land_is_frozen_but_for_pid_1_and_the_agents_slice() {
    if !is_root() {
        return;
    }
    let Some(groups) = Group::new("all") else {
        eprintln!("SKIPPED: no unified control group hierarchy that can be written to");
        return;
    };
    let mut children: Vec<Child> = ["system.slice", "user.slice", "understudy.slice", "init.scope"]
        .iter()
        .map(|g| groups.run(g))
        .collect();
    let userland = Userland::new(groups.0.clone());
    userland.freeze(120_000, &[]).unwrap();
    assert!(groups.is_frozen("system.slice") && groups.is_frozen("user.slice"));
    assert!(!groups.is_frozen("understudy.slice") && !groups.is_frozen("init.scope"));
    userland.freeze(120_000, &[]).expect("asking again renews");
    let thawed = userland.thaw();
    assert!(!thawed.by_watchdog);
    let until = Instant::now() + PATIENCE;
    while groups.is_frozen("system.slice") || groups.is_frozen("user.slice") {
        assert!(Instant::now() < until, "still frozen");
        std::thread::yield_now();
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn when_the_host_falls_silent_user_land_thaws_by_itself() {
    if !is_root() {
        return;
    }
    let Some(groups) = Group::new("dog") else {
        eprintln!("SKIPPED: no unified control group hierarchy that can be written to");
        return;
    };
    let mut child = groups.run("system.slice");
    let userland = Userland::new(groups.0.clone());
    // On a busy machine the final sync may be slower than the watchdog: then it is refused, and thawed, too.
    let frozen = userland.freeze(3000, &[]);
    let until = Instant::now() + PATIENCE;
    while groups.is_frozen("system.slice") {
        assert!(Instant::now() < until, "still frozen");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(frozen.is_err() || userland.thaw().by_watchdog);
    child.kill().unwrap();
    child.wait().unwrap();
}
