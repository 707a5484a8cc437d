//! Behind the closed write gate (DESIGN §5, step 7c): the host asks how much is dirty while nothing that the
//! guest writes reaches its disk.
#![allow(clippy::unwrap_used)]

#[path = "common/images.rs"]
mod images;
#[path = "common/root.rs"]
mod root;
#[path = "common/rounds.rs"]
mod rounds;
#[path = "common/shell.rs"]
mod shell;

use std::fs;
use std::sync::Arc;
use std::sync::mpsc::{TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use root::is_root;
use rounds::{Pair, count, round};
use shell::sh;
use understudy_guest::freeze::Filesystems;
use understudy_guest::view::View;

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a thread of ours waits for a disk.
fn waits_for_a_disk(thread: rustix::thread::Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{}/stat", thread.as_raw_nonzero())).unwrap();
    // The name before it is in brackets and may have spaces in it.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('D'))
}

#[test]
fn a_count_behind_the_closed_write_gate_syncs_nothing() {
    if !is_root() {
        return;
    }
    let outer = Pair::new(|_| {});
    // The images lie on a file system that will be frozen: then they can be read, and writing to them waits.
    let pair = Pair::within(&outer.guest, |root| sh(root, "echo base > log"));
    let (capture, importer) = (Arc::new(pair.capture()), pair.importer());
    sh(&pair.guest, "echo guest >> log");
    let (_, applied) = round(&capture, &importer, 0, true);
    sh(&pair.guest, "echo late >> log; echo late > new");
    let gate = Filesystems::default();
    gate.freeze_these(vec![View::open(&outer.guest).unwrap()], 120_000)
        .unwrap();

    // The gate is closed: whoever syncs now waits.
    let (told, synced) = channel();
    let (tell_thread, thread_of_sync) = channel();
    let guest = fs::File::open(&pair.guest).unwrap();
    let sync = thread::spawn(move || {
        tell_thread.send(rustix::thread::gettid()).unwrap();
        told.send(rustix::fs::syncfs(guest)).unwrap();
    });
    let syncing = thread_of_sync.recv_timeout(PATIENCE).unwrap();
    let until = Instant::now() + PATIENCE;
    while !waits_for_a_disk(syncing) {
        assert!(Instant::now() < until, "a sync does not wait: the gate is open");
        thread::sleep(Duration::from_millis(5));
    }

    let (tell, counted) = channel();
    let counting = thread::spawn({
        let capture = Arc::clone(&capture);
        move || tell.send(count(&capture, applied.round))
    });
    let dirty = counted.recv_timeout(PATIENCE);
    let still_closed = matches!(synced.try_recv(), Err(TryRecvError::Empty));
    let thawed = gate.thaw();
    // The log, the new file and its directory.
    assert_eq!(dirty, Ok(3), "the count waits for the disk");
    assert!(still_closed && !thawed.by_watchdog, "the gate was open");
    counting.join().unwrap().unwrap();
    sync.join().unwrap();
    synced.recv_timeout(PATIENCE).unwrap().unwrap();
    round(&capture, &importer, applied.round, true);
    pair.assert_equal();
}
