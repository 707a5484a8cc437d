//! A guest and its clone as two mounted images, and rounds between them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use understudy_channel::{Applied, Export, FrameError, Import, Imported, OnConflict, RoundEnd};
use understudy_guest::export::Capture;
use understudy_guest::import::Importer;
use understudy_guest::view::View;

use crate::images::{Mounted, make};
use crate::root::run;

/// The operation that all rounds belong to.
const OPERATION: &str = "operation-1";

/// Two mounted images that parted when the second was copied from the first.
pub struct Pair {
    /// Where the guest's is mounted.
    pub guest: PathBuf,
    /// Where the clone's is mounted.
    pub clone: PathBuf,
    _mounted: [Mounted; 2],
    dir: tempfile::TempDir,
}

impl Pair {
    /// Makes the guest's image, lets `fill` put something into it, and copies it.
    pub fn new(fill: impl FnOnce(&Path)) -> Self {
        Self::within(&std::env::temp_dir(), fill)
    }

    /// As [`Pair::new`], with the images below `folder`.
    pub fn within(folder: &Path, fill: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir_in(folder).unwrap();
        let (guest, clone) = (dir.path().join("guest"), dir.path().join("clone"));
        let (a, b) = (dir.path().join("a.img"), dir.path().join("b.img"));
        make(&a);
        let filled = Mounted::new(&a, &guest);
        fill(&guest);
        // The split: everything is written out, as FIFREEZE would.
        rustix::fs::syncfs(std::fs::File::open(&guest).unwrap()).unwrap();
        unmount(&guest);
        drop(filled);
        let paths = [a.to_str().unwrap(), b.to_str().unwrap()];
        run("cp", &["--sparse=always", paths[0], paths[1]]);
        Self {
            _mounted: [Mounted::new(&a, &guest), Mounted::new(&b, &clone)],
            guest,
            clone,
            dir,
        }
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

/// Unmounts, patiently: a program that a test beside is just starting has our open files, until its exec.
fn unmount(at: &Path) {
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

fn as_root(mounted: &Path) -> View {
    let mut view = View::open(mounted).unwrap();
    view.mount_point = "/".into();
    view
}

/// One round from guest to clone.
pub fn round(capture: &Capture, importer: &Importer, applied: u64, last: bool) -> (RoundEnd, Applied) {
    let (end, imported) = try_round(capture, importer, applied, last, OnConflict::PreferGuest);
    match imported {
        Imported::Applied(applied) => (end, applied),
        Imported::Refused(refusal) => panic!("refused: {}", refusal.reason),
    }
}

/// As [`round`], which may be refused.
pub fn try_round(
    capture: &Capture,
    importer: &Importer,
    applied: u64,
    last: bool,
    on_conflict: OnConflict,
) -> (RoundEnd, Imported) {
    let (mut sender, mut receiver) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let export = scope.spawn(move || export(capture, applied, last, &mut sender));
        let imported = import(importer, on_conflict, &mut receiver).unwrap();
        drop(receiver);
        (export.join().unwrap(), imported)
    })
}

/// The guest's half of a round.
pub fn export(capture: &Capture, applied: u64, last: bool, out: &mut impl Write) -> RoundEnd {
    ask(capture, applied, last, false, out)
}

/// The clone's half of a round.
pub fn import(
    importer: &Importer,
    on_conflict: OnConflict,
    from: &mut impl Read,
) -> Result<Imported, FrameError> {
    let request = Import {
        operation: OPERATION.into(),
        on_conflict,
    };
    importer.import(&request, from)
}

/// How many entries are dirty after round `applied`, without sending any.
pub fn count(capture: &Capture, applied: u64) -> u64 {
    let end = ask(capture, applied, true, true, &mut Vec::new());
    assert_eq!(end.dirty, end.entries);
    end.entries
}

fn ask(capture: &Capture, applied: u64, last: bool, count_only: bool, out: &mut impl Write) -> RoundEnd {
    let request = Export {
        operation: OPERATION.into(),
        applied,
        last,
        count_only,
    };
    capture.export(&request, out).unwrap()
}
