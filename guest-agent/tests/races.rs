//! What changes hands in the guest while a round is being sent: nothing of it is lost, nothing of it harms the
//! clone, and it fails no round. The guest's part is played at fixed moments of the round, so that each race
//! happens every time.
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
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use root::is_root;
use rounds::{Pair, count, round};
use rustix::fs::XattrFlags;
use shell::sh;
use understudy_channel::{
    Entry, Imported, Meta, Node, OnConflict, RoundEnd, Transfer, read_frame, write_frame,
};
use understudy_guest::export::{Capture, Moment};
use understudy_guest::import::Importer;
use understudy_guest::sys::handle::handle_of;

/// Lets `script` happen once in the guest: at `moment`, of the path where one is told.
fn once(capture: &Capture, pair: &Pair, moment: Moment, path: &'static str, script: &'static str) {
    let guest = pair.guest.clone();
    let mut pending = true;
    capture.at_moments(move |now, of| {
        if pending && now == moment && of == path.as_bytes() {
            pending = false;
            sh(&guest, script);
        }
    });
}

/// A round into a buffer: paths in it, and the stream.
fn export(capture: &Capture, applied: u64) -> (Vec<String>, Vec<u8>) {
    let mut stream = Vec::new();
    rounds::export(capture, applied, false, &mut stream);
    let mut paths = Vec::new();
    let mut rest = stream.as_slice();
    while let Ok(transfer) = read_frame::<Transfer>(&mut rest) {
        if let Transfer::Entry(entry) = transfer {
            paths.push(String::from_utf8(entry.path).unwrap());
        }
    }
    (paths, stream)
}

fn import(importer: &Importer, mut stream: &[u8]) -> Imported {
    rounds::import(importer, OnConflict::PreferGuest, &mut stream).unwrap()
}

/// A round made by hand, of entries without content.
fn made(entries: &[Entry], last: bool) -> Vec<u8> {
    let mut stream = Vec::new();
    for entry in entries {
        write_frame(&mut stream, &Transfer::Entry(Box::new(entry.clone()))).unwrap();
        write_frame(&mut stream, &Transfer::EntryEnd).unwrap();
    }
    let end = RoundEnd {
        round: 1,
        entries: entries.len() as u64,
        last,
        ..RoundEnd::default()
    };
    write_frame(&mut stream, &Transfer::RoundEnd(end)).unwrap();
    stream
}

fn handle(path: &Path) -> (i32, Vec<u8>) {
    let handle = handle_of(fs::File::open(path).unwrap(), c"").unwrap();
    (handle.kind, handle.bytes)
}

/// The rest of the rounds, as the engine makes them; then the trees are equal and nothing is dirty.
fn assert_all_arrives(capture: &Capture, importer: &Importer, pair: &Pair, mut applied: u64) {
    for _ in 0..3 {
        applied = round(capture, importer, applied, true).1.round;
    }
    assert_eq!(count(capture, applied), 0);
    pair.assert_equal();
}

#[test]
fn a_name_that_changes_hands_while_it_is_read_is_left_out_and_sent_in_the_next_round() {
    if !is_root() {
        return;
    }
    for script in [
        "mv f t; mv d f; mv t d",
        "rm f",
        "rm f; ln -s target f",
        "echo other > t; mv t f",
    ] {
        let pair = Pair::new(|root| sh(root, "mkdir d; echo base > d/x; echo base > f"));
        let (capture, importer) = (pair.capture(), pair.importer());
        sh(&pair.guest, "echo guest >> f; echo guest >> d/x");
        once(&capture, &pair, Moment::Read, "/f", script);
        let (paths, stream) = export(&capture, 0);
        assert_eq!(paths, ["/d/x"], "{script}");
        let Imported::Applied(applied) = import(&importer, &stream) else {
            panic!("{script}: refused")
        };
        assert_eq!(applied.round, 1, "{script}");
        assert!(count(&capture, applied.round) > 0, "{script}");
        assert_all_arrives(&capture, &importer, &pair, applied.round);
    }
}

#[test]
fn what_is_left_out_is_sent_again_though_no_further_event_tells_of_it() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > f"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest >> f");
    // The agent's own changes raise no events that count.
    let guest = pair.guest.clone();
    let mut there = true;
    capture.at_moments(move |moment, _| {
        if there && moment == Moment::Read {
            there = false;
            fs::rename(guest.join("f"), guest.join("t")).unwrap();
        }
    });
    let (paths, stream) = export(&capture, 0);
    assert!(paths.is_empty(), "{paths:?}");
    fs::rename(pair.guest.join("t"), pair.guest.join("f")).unwrap();
    let Imported::Applied(applied) = import(&importer, &stream) else {
        panic!("refused")
    };
    assert_eq!(count(&capture, applied.round), 1);
    let (paths, stream) = export(&capture, applied.round);
    assert_eq!(paths, ["/f"]);
    assert!(matches!(import(&importer, &stream), Imported::Applied(_)));
    assert_eq!(fs::read_to_string(pair.clone.join("f")).unwrap(), "base\nguest\n");
}

#[test]
fn a_deletion_follows_its_directory_wherever_that_moves() {
    if !is_root() {
        return;
    }
    let fill = "mkdir a b; echo 1 > a/x; echo 2 > a/y; echo 3 > b/x; echo 4 > b/y";
    // Between two rounds of which the first was not acknowledged.
    let pair = Pair::new(|root| sh(root, fill));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "rm a/x");
    export(&capture, 0);
    sh(&pair.guest, "mv a c");
    assert_all_arrives(&capture, &importer, &pair, 0);
    // Within a round, and another directory has its path now, with a file of that name.
    for moment in [Moment::Planned, Moment::Read] {
        let pair = Pair::new(|root| sh(root, fill));
        let (capture, importer) = (pair.capture(), pair.importer());
        sh(&pair.guest, "rm a/x");
        let path = if moment == Moment::Read { "/a/x" } else { "" };
        once(&capture, &pair, moment, path, "mv a c; mv b a; mv c b");
        let (_, applied) = round(&capture, &importer, 0, false);
        assert_all_arrives(&capture, &importer, &pair, applied.round);
    }
}

#[test]
fn what_is_written_through_a_name_that_is_deleted_arrives_under_the_files_other_name() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir d; echo base > d/kept; ln d/kept name"));
    let (capture, importer) = (pair.capture(), pair.importer());
    let mut writer = Command::new("sh")
        .args([
            "-ec",
            "exec 3>>name; rm name; echo deleted; read line; echo more >&3",
        ])
        .current_dir(&pair.guest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(writer.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    // The deletion is told and done with; what is written afterwards has nothing but the old name.
    let (end, applied) = round(&capture, &importer, 0, false);
    assert_eq!(applied.round, end.round);
    writer.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert!(writer.wait().unwrap().success());
    assert_all_arrives(&capture, &importer, &pair, applied.round);
    assert_eq!(
        fs::read_to_string(pair.clone.join("d/kept")).unwrap(),
        "base\nmore\n"
    );
}

#[test]
fn what_is_in_a_directory_that_moves_during_the_round_waits_until_it_has_a_place() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir d; echo base > d/x; echo base > f"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "mv d e; echo guest >> e/x; echo guest >> f");
    once(&capture, &pair, Moment::Planned, "", "mv e g");
    let (paths, stream) = export(&capture, 0);
    assert_eq!(paths, ["/d", "/", "/f"]);
    let Imported::Applied(applied) = import(&importer, &stream) else {
        panic!("refused")
    };
    assert_eq!(applied.round, 1, "the rest of the round counts");
    assert_all_arrives(&capture, &importer, &pair, applied.round);
}

#[test]
fn content_that_comes_back_through_another_name_is_not_taken_for_known() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > f; ln f g"));
    let (capture, importer) = (pair.capture(), pair.importer());
    let mut applied = 0;
    for script in ["echo 1 > f", "echo 2 > g", "echo 1 > f"] {
        sh(&pair.guest, script);
        applied = round(&capture, &importer, applied, false).1.round;
    }
    assert_eq!(fs::read_to_string(pair.clone.join("g")).unwrap(), "1\n");
    assert_all_arrives(&capture, &importer, &pair, applied);
}

#[test]
fn a_new_directory_that_changes_places_with_an_old_one_leaves_nothing_of_its_own_there() {
    if !is_root() {
        return;
    }
    for moment in [Moment::Planned, Moment::Read] {
        let pair = Pair::new(|root| sh(root, "mkdir -p old/sub; echo base > old/x"));
        let (capture, importer) = (pair.capture(), pair.importer());
        sh(
            &pair.guest,
            "mkdir -p new/sub; echo new > new/own; echo new > new/sub/own",
        );
        let path = if moment == Moment::Read { "/new" } else { "" };
        once(&capture, &pair, moment, path, "mv new t; mv old new; mv t old");
        let (end, applied) = round(&capture, &importer, 0, false);
        assert_eq!(
            applied.round, end.round,
            "{moment:?}: what the clone cannot place is not sent"
        );
        assert!(!pair.clone.join("old/own").exists(), "{moment:?}");
        assert_all_arrives(&capture, &importer, &pair, applied.round);
    }
}

#[test]
fn a_directory_changes_places_with_its_parent() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| {
        sh(
            root,
            "mkdir -p a/b/c; echo 1 > a/x; echo 2 > a/b/x; echo 3 > a/b/c/x",
        )
    });
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "mv a/b t; mv t/c a/b; mv a t/b; mv t a");
    // The guest was still: it is done in one round.
    let (end, applied) = round(&capture, &importer, 0, true);
    assert_eq!(applied.round, end.round);
    pair.assert_equal();
}

#[test]
fn attributes_are_those_of_the_link_itself() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > target"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "ln -s target link; ln -s nowhere dangling");
    for (name, value) in [("link", b"1"), ("dangling", b"2"), ("target", b"3")] {
        let path = pair.guest.join(name);
        rustix::fs::lsetxattr(path, c"trusted.mark", value, XattrFlags::empty()).unwrap();
    }
    sh(&pair.guest, "touch target");
    assert_all_arrives(&capture, &importer, &pair, 0);
    let mut value = [0; 8];
    let length = rustix::fs::lgetxattr(pair.clone.join("dangling"), c"trusted.mark", &mut value).unwrap();
    assert_eq!(&value[..length], b"2");
}

/// On the clone: `d` with `e` in it.
fn nested() -> (Pair, Importer) {
    let pair = Pair::new(|root| sh(root, "mkdir -p d/e; echo base > d/e/x"));
    let importer = pair.importer();
    (pair, importer)
}

fn directory(path: &str, folder: (i32, Vec<u8>), inode: (i32, Vec<u8>)) -> Entry {
    let meta = Meta {
        mode: libc::S_IFDIR | 0o755,
        nlink: 2,
        handle: inode,
        ..Meta::default()
    };
    Entry {
        path: path.into(),
        filesystem: Vec::new(),
        folder,
        node: Node::Directory { meta },
    }
}

#[test]
fn an_entry_that_does_not_fit_leaves_its_round_unacknowledged_and_fails_only_the_last_one() {
    if !is_root() {
        return;
    }
    let (pair, importer) = nested();
    let (d, e) = (handle(&pair.clone.join("d")), handle(&pair.clone.join("d/e")));
    // Read while it was on the move: d within e, which is within d here. And one that fits.
    let entries = [
        directory("/d/e/d", e, d),
        directory("/new", handle(&pair.clone), (1, vec![7; 8])),
    ];
    let Imported::Applied(applied) = import(&importer, &made(&entries, false)) else {
        panic!("refused")
    };
    assert_eq!((applied.round, applied.entries), (0, 2));
    assert!(pair.clone.join("new").is_dir() && pair.clone.join("d/e/x").is_file());
    let Imported::Refused(refusal) = import(&importer, &made(&entries, true)) else {
        panic!("not refused")
    };
    assert!(refusal.reason.contains("/d/e/d"), "{}", refusal.reason);
    assert!(!refusal.reason.contains("/new"), "{}", refusal.reason);
}

#[test]
fn an_entry_goes_to_the_directory_that_is_meant_and_not_to_the_one_at_its_path() {
    if !is_root() {
        return;
    }
    let (pair, importer) = nested();
    sh(&pair.clone, "mkdir other; echo other > other/x");
    let gone = Entry {
        path: b"/other/x".to_vec(),
        filesystem: Vec::new(),
        folder: handle(&pair.clone.join("d/e")),
        node: Node::Gone,
    };
    let Imported::Applied(applied) = import(&importer, &made(&[gone], true)) else {
        panic!("refused")
    };
    assert_eq!(applied.round, 1);
    assert!(!pair.clone.join("d/e/x").exists() && pair.clone.join("other/x").exists());
}

#[test]
fn a_directory_that_the_clone_removed_comes_back_with_what_the_guest_changed_in_it() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir cache; echo base > cache/x"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.clone, "rm -r cache");
    sh(&pair.guest, "echo guest >> cache/x");
    let (_, first) = round(&capture, &importer, 0, false);
    assert_eq!(first.round, 0, "it might be on the move");
    let (end, second) = round(&capture, &importer, 0, false);
    assert_eq!(second.round, end.round);
    assert_eq!(
        fs::read_to_string(pair.clone.join("cache/x")).unwrap(),
        "base\nguest\n"
    );
}
