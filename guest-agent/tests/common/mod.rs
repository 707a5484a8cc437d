//! A guest and its clone as two ext4 images on loop devices, and rounds between them.
#![allow(dead_code, clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use understudy_channel::{Applied, Export, Import, Imported, OnConflict, RoundEnd};
use understudy_guest::export::Capture;
use understudy_guest::import::Importer;
use understudy_guest::view::View;

/// The operation that all rounds belong to.
pub const OPERATION: &str = "operation-1";

/// Changes a tree as another program would: the agent's own changes do not count.
pub fn sh(root: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-ec", script])
        .current_dir(root)
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}

/// Says why a test that needs root does not run.
pub fn is_root() -> bool {
    let root = rustix::process::getuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root for loop mounts and fanotify");
    }
    root
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Unmounts, patiently: a program that a test beside is just starting has our open files, until its exec.
pub fn unmount(at: &Path) {
    let started = Instant::now();
    loop {
        let done = Command::new("umount").arg(at).output().unwrap();
        if done.status.success() {
            return;
        }
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        let again = said.contains("busy") && started.elapsed() < Duration::from_secs(60);
        assert!(again, "umount {}: {said}", at.display());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Two mounted images that parted when the second was copied from the first.
pub struct Pair {
    pub dir: tempfile::TempDir,
    pub guest: PathBuf,
    pub clone: PathBuf,
}

impl Pair {
    /// Makes the guest's image, lets `fill` put something into it, and copies it.
    pub fn new(fill: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (guest, clone) = (dir.path().join("guest"), dir.path().join("clone"));
        std::fs::create_dir(&guest).unwrap();
        std::fs::create_dir(&clone).unwrap();
        let (a, b) = (dir.path().join("a.img"), dir.path().join("b.img"));
        std::fs::File::create(&a).unwrap().set_len(256 << 20).unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-F", a.to_str().unwrap()]);
        mount(&a, &guest);
        fill(&guest);
        // The split: everything is written out, as FIFREEZE would.
        rustix::fs::syncfs(std::fs::File::open(&guest).unwrap()).unwrap();
        unmount(&guest);
        run(
            "cp",
            &["--sparse=always", a.to_str().unwrap(), b.to_str().unwrap()],
        );
        mount(&a, &guest);
        mount(&b, &clone);
        Self { dir, guest, clone }
    }

    /// Captures the guest. Its file system counts as the root one, so that rules mean what they say.
    pub fn capture(&self) -> Capture {
        Capture::begin(OPERATION, Some(vec![as_root(&self.guest)])).unwrap()
    }

    /// Imports into the clone. What changes on it from now on, it changes itself.
    pub fn importer(&self) -> Importer {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        let (run, state) = (self.dir.path().join("run"), self.dir.path().join("state"));
        let since = (now.tv_sec, now.tv_nsec as u32);
        Importer::new(Some(vec![as_root(&self.clone)]), run, state, since).unwrap()
    }

    /// Asserts that the trees are equal.
    pub fn assert_equal(&self) {
        let listing = |root| understudy_guest::tree::listing(root, true).unwrap();
        let (guest, clone) = (listing(&self.guest), listing(&self.clone));
        let only = |a: &[String], b: &[String]| {
            let known: std::collections::HashSet<&String> = b.iter().collect();
            a.iter()
                .filter(|l| !known.contains(l))
                .take(12)
                .cloned()
                .collect::<Vec<_>>()
                .join("\n  ")
        };
        assert!(
            guest == clone,
            "the trees differ\nguest only:\n  {}\nclone only:\n  {}",
            only(&guest, &clone),
            only(&clone, &guest)
        );
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for mounted in [&self.guest, &self.clone] {
            let _ = Command::new("umount").arg("-l").arg(mounted).status();
        }
    }
}

fn as_root(mounted: &Path) -> View {
    let mut view = View::open(mounted).unwrap();
    view.mount_point = "/".into();
    view
}

fn mount(image: &Path, at: &Path) {
    run(
        "mount",
        &[
            "-o",
            "loop,user_xattr,acl",
            image.to_str().unwrap(),
            at.to_str().unwrap(),
        ],
    );
}

/// One round from guest to clone.
pub fn round(capture: &Capture, importer: &Importer, applied: u64, last: bool) -> (RoundEnd, Applied) {
    let (end, imported) = try_round(capture, importer, applied, last, OnConflict::PreferGuest);
    match imported {
        Imported::Applied(applied) => (end, applied),
        Imported::Refused(refusal) => panic!("refused: {}", refusal.reason),
    }
}

pub fn try_round(
    capture: &Capture,
    importer: &Importer,
    applied: u64,
    last: bool,
    on_conflict: OnConflict,
) -> (RoundEnd, Imported) {
    let (mut sender, mut receiver) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let export = scope.spawn(move || {
            let request = Export {
                operation: OPERATION.into(),
                applied,
                last,
                count_only: false,
            };
            capture.export(&request, &mut sender).unwrap()
        });
        let request = Import {
            operation: OPERATION.into(),
            on_conflict,
        };
        let imported = importer.import(&request, &mut receiver).unwrap();
        drop(receiver);
        (export.join().unwrap(), imported)
    })
}

/// How many entries are dirty after round `applied`, without sending any.
pub fn count(capture: &Capture, applied: u64) -> u64 {
    let request = Export {
        operation: OPERATION.into(),
        applied,
        last: true,
        count_only: true,
    };
    capture.export(&request, &mut Vec::new()).unwrap().dirty
}
