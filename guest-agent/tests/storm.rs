//! Promise 4: after integration the trees are equal, under a random file system storm.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/images.rs"]
mod images;
#[path = "common/root.rs"]
mod root;
#[path = "common/rounds.rs"]
mod rounds;

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use root::is_root;
use rounds::{Pair, count, round};
use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags, Timespec, Timestamps, XattrFlags};

/// A small generator (xorshift), so that a seed tells a whole storm.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// For writing; without waiting for a reader where it is a FIFO.
fn open() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    options
}

struct Storm {
    root: PathBuf,
    dice: Dice,
    mapped: Vec<(*mut libc::c_void, usize)>,
}

impl Storm {
    fn new(root: &Path, seed: u64) -> Self {
        Self {
            root: root.to_owned(),
            dice: Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            mapped: Vec::new(),
        }
    }

    /// A path that may or may not exist, of few names, so that they collide.
    fn path(&mut self) -> PathBuf {
        let mut path = self.root.clone();
        for _ in 0..self.dice.roll(3) {
            path.push(format!("d{}", self.dice.roll(4)));
        }
        path.push(if self.dice.roll(4) == 0 {
            format!("d{}", self.dice.roll(4))
        } else {
            format!("f{}", self.dice.roll(12))
        });
        path
    }

    /// A path to something that exists, of any kind.
    fn existing(&mut self) -> Option<PathBuf> {
        (0..20)
            .map(|_| self.path())
            .find(|p| fs::symlink_metadata(p).is_ok())
    }

    /// One random change. Most can fail by what is there already, which is part of the storm.
    fn step(&mut self) {
        let _ = self.try_step();
    }

    fn try_step(&mut self) -> Option<()> {
        let path = self.path();
        let size = self.dice.roll(300_000);
        match self.dice.roll(22) {
            0 | 1 => {
                let content = vec![self.dice.roll(256) as u8; size as usize];
                open()
                    .create(true)
                    .truncate(true)
                    .open(&path)
                    .ok()?
                    .write_all(&content)
                    .ok()
            }
            2 | 3 => {
                let file = open().open(&path).ok()?;
                let at = self.dice.roll(500_000);
                file.write_all_at(&vec![self.dice.roll(256) as u8; (size % 9000) as usize], at)
                    .ok()
            }
            4 => open()
                .append(true)
                .open(&path)
                .ok()?
                .write_all(b"one more line\n")
                .ok(),
            5 => open().open(&path).ok()?.set_len(size).ok(),
            6 => {
                let file = open().open(&path).ok()?;
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, flags, self.dice.roll(40) * 4096, 8192).ok()
            }
            7 | 8 => fs::create_dir(&path).ok(),
            9 | 10 => fs::rename(self.existing()?, &path).ok(),
            11 => {
                let other = self.existing()?;
                rustix::fs::renameat_with(CWD, &other, CWD, &path, RenameFlags::EXCHANGE).ok()
            }
            12 => fs::hard_link(self.existing()?, &path).ok(),
            13 => fs::remove_file(&path).ok(),
            14 if self.dice.roll(4) == 0 => fs::remove_dir_all(self.existing()?).ok(),
            14 => fs::remove_dir(&path).ok(),
            15 => symlink(format!("target{}", self.dice.roll(5)), &path).ok(),
            16 => rustix::fs::mknodat(
                CWD,
                &path,
                [rustix::fs::FileType::Fifo, rustix::fs::FileType::CharacterDevice]
                    [self.dice.roll(2) as usize],
                rustix::fs::Mode::from_raw_mode(0o640),
                rustix::fs::makedev(1, 3),
            )
            .ok(),
            17 => {
                let existing = self.existing()?;
                if fs::symlink_metadata(&existing).ok()?.is_symlink() {
                    return None;
                }
                fs::set_permissions(
                    existing,
                    fs::Permissions::from_mode([0o600, 0o4755, 0o1777, 0o644][self.dice.roll(4) as usize]),
                )
                .ok()
            }
            18 => {
                let existing = self.existing()?;
                std::os::unix::fs::lchown(existing, Some(self.dice.roll(3) as u32 * 500), Some(100)).ok()
            }
            19 => {
                let existing = self.existing()?;
                let name = CString::new(format!("user.x{}", self.dice.roll(3))).ok()?;
                if self.dice.roll(3) == 0 {
                    rustix::fs::lremovexattr(&existing, &name).ok()
                } else {
                    let value = vec![self.dice.roll(256) as u8; self.dice.roll(200) as usize];
                    rustix::fs::lsetxattr(&existing, &name, &value, XattrFlags::empty()).ok()
                }
            }
            20 => {
                let existing = self.existing()?;
                let spec = |seconds| Timespec {
                    tv_sec: seconds,
                    tv_nsec: 123_456_789,
                };
                let times = Timestamps {
                    last_access: spec(1),
                    last_modification: spec(1_000_000 + self.dice.roll(1000) as i64),
                };
                rustix::fs::utimensat(CWD, &existing, &times, AtFlags::SYMLINK_NOFOLLOW).ok()
            }
            _ => self.map(&path),
        }
    }

    /// Stores into a shared mapping whose descriptor is closed: no event tells of the stores.
    fn map(&mut self, path: &Path) -> Option<()> {
        let file = open().read(true).open(path).ok()?;
        let length = file.metadata().ok()?.len() as usize;
        if !(4096..1 << 20).contains(&length) {
            return None;
        }
        if self.mapped.len() > 4 {
            let (old, length) = self.mapped.remove(0);
            // SAFETY: the mapping was made below with this length and is not used any more.
            unsafe { libc::munmap(old, length) };
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: a new mapping of an open file; the result is checked.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0) };
        if at != libc::MAP_FAILED {
            self.mapped.push((at, length));
        }
        Some(())
    }

    /// Stores into what is mapped. Files that were cut since would raise SIGBUS beyond their end, so only
    /// the mapping's first page is used, and only where it is still backed.
    fn store(&mut self) {
        let value = self.dice.roll(256) as u8;
        for &(at, _) in &self.mapped {
            let page = [value; 64];
            let local = libc::iovec {
                iov_base: page.as_ptr() as *mut _,
                iov_len: page.len(),
            };
            let remote = libc::iovec {
                iov_base: at,
                iov_len: page.len(),
            };
            // SAFETY: writing through the kernel fails with EFAULT instead of a signal where the page is gone.
            unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
        }
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        for &(at, length) in &self.mapped {
            // SAFETY: the mapping was made with this length and is not used any more.
            unsafe { libc::munmap(at, length) };
        }
    }
}

/// Not a test of its own: the process that storms, for its changes must not be the agent's own.
#[test]
#[ignore = "run by the storm test in a process of its own"]
fn storm_worker() {
    let Some(root) = std::env::var_os("STORM_ROOT") else {
        return;
    };
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let mut storm = Storm::new(Path::new(&root), number("STORM_SEED"));
    let pause = std::time::Duration::from_micros(number("STORM_PAUSE_US"));
    for step in 0..number("STORM_STEPS") {
        storm.step();
        // A gale comes in gusts: more rounds fall into it, and fewer of its changes into each.
        if step % 8 == 0 && !pause.is_zero() {
            std::thread::sleep(pause);
        }
        if step % 16 == 0 {
            storm.store();
        }
    }
    storm.store();
    println!("STORM-OVER");
    // Mappings stay until the other side has looked.
    let _ = std::io::stdin().read(&mut [0]);
}

fn storm_with(seed: u64) {
    let (steps, pause) = if seed.is_multiple_of(2) {
        (30_000, 0)
    } else {
        (12_000, 500)
    };
    let pair = Pair::new(|root| {
        let mut before = Storm::new(root, seed ^ 0xabcdef);
        for _ in 0..600 {
            before.step();
        }
    });
    let capture = pair.capture();
    let importer = pair.importer();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["storm_worker", "--exact", "--ignored", "--nocapture"])
        .env("STORM_ROOT", &pair.guest)
        .env("STORM_SEED", seed.to_string())
        .env("STORM_STEPS", steps.to_string())
        .env("STORM_PAUSE_US", pause.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // The channel closes without a word where the storm broke off.
        for line in lines.map_while(Result::ok) {
            if line.contains("STORM-OVER") {
                let _ = told.send(());
            }
        }
    });
    let (mut applied, mut rounds, mut repeated, mut conflicts) = (0, 0, 0, Vec::new());
    // Rounds while the storm rages; now and then the clone's answer is lost.
    let mut dice = Dice(seed | 1);
    let mut over = false;
    while !over {
        over = match heard.try_recv() {
            Ok(()) => true,
            Err(std::sync::mpsc::TryRecvError::Empty) => false,
            Err(error) => panic!("the storm did not come to its end: {error}"),
        };
        let (end, result) = round(&capture, &importer, applied, false);
        assert!(result.round <= end.round, "{result:?}");
        rounds += 1;
        repeated += u32::from(result.round < end.round);
        conflicts.extend(result.conflicts);
        if dice.roll(3) > 0 {
            applied = result.round;
        }
    }
    // As the engine does: once the guest is still, a round that is not acknowledged is sent again, three times
    // at most.
    for _ in 0..4 {
        let (_, result) = round(&capture, &importer, applied, true);
        applied = result.round;
        conflicts.extend(result.conflicts);
        if count(&capture, applied) == 0 {
            break;
        }
    }
    assert_eq!(count(&capture, applied), 0, "nothing is left to be sent");
    pair.assert_equal();
    assert!(conflicts.is_empty(), "{conflicts:?}");
    eprintln!("seed {seed}: {rounds} rounds in the storm, {repeated} of them not acknowledged");
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn after_a_storm_the_trees_are_equal() {
    if !is_root() {
        return;
    }
    let seeds: Vec<u64> = match std::env::var("STORM_SEEDS") {
        Ok(list) => list.split(',').map(|s| s.parse().unwrap()).collect(),
        Err(_) => (1..=6).collect(),
    };
    for seed in seeds {
        eprintln!("seed {seed}: STORM_SEEDS={seed} runs it alone");
        storm_with(seed);
    }
}
