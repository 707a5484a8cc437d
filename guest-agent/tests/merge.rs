//! The three-way merge: what becomes of paths that guest, clone or both changed since the split.
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
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use root::is_root;
use rounds::{Pair, count, export, import, round, try_round};
use shell::sh;
use understudy_channel::{Imported, OnConflict};

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

#[test]
fn what_only_one_side_changed_is_kept() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| {
        sh(
            root,
            "mkdir etc srv; echo base > etc/a; echo base > etc/b; echo base > etc/c",
        )
    });
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest > etc/a; rm etc/c; echo new > srv/new");
    sh(&pair.clone, "echo clone > etc/b; echo own > srv/own");
    let (_, applied) = round(&capture, &importer, 0, true);
    assert_eq!(read(pair.clone.join("etc/a")), "guest\n");
    assert_eq!(read(pair.clone.join("etc/b")), "clone\n");
    assert_eq!(read(pair.clone.join("srv/new")), "new\n");
    assert_eq!(read(pair.clone.join("srv/own")), "own\n");
    assert!(!pair.clone.join("etc/c").exists());
    assert!(applied.conflicts.is_empty(), "{:?}", applied.conflicts);
}

#[test]
fn where_both_changed_a_file_the_guest_wins_and_the_clones_version_is_kept() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| {
        sh(
            root,
            "mkdir etc; echo base > etc/a; echo base > etc/same; echo base > etc/gone",
        )
    });
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest > etc/a; rm etc/gone");
    sh(&pair.clone, "echo clone > etc/a; echo clone > etc/gone");
    let (_, applied) = round(&capture, &importer, 0, true);
    assert_eq!(read(pair.clone.join("etc/a")), "guest\n");
    assert!(!pair.clone.join("etc/gone").exists());
    let mut paths: Vec<&str> = applied.conflicts.iter().map(|c| c.path.as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["/etc/a", "/etc/gone"]);
    for conflict in &applied.conflicts {
        assert_eq!(conflict.resolution, "guest");
        assert_eq!(read(conflict.kept.as_ref().unwrap()), "clone\n");
    }
}

#[test]
fn where_asked_for_the_clone_wins_and_the_guests_version_is_kept() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir etc; echo base > etc/a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest > etc/a");
    sh(&pair.clone, "echo clone > etc/a");
    let (_, imported) = try_round(&capture, &importer, 0, true, OnConflict::PreferClone);
    let Imported::Applied(applied) = imported else {
        panic!("{imported:?}")
    };
    assert_eq!(read(pair.clone.join("etc/a")), "clone\n");
    assert_eq!(applied.conflicts[0].resolution, "clone");
    assert_eq!(read(applied.conflicts[0].kept.as_ref().unwrap()), "guest\n");
}

#[test]
fn where_asked_for_a_conflict_refuses_the_import_and_names_the_path() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir etc; echo base > etc/a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest > etc/a");
    sh(&pair.clone, "echo clone > etc/a");
    let (_, imported) = try_round(&capture, &importer, 0, true, OnConflict::Fail);
    let Imported::Refused(refusal) = imported else {
        panic!("{imported:?}")
    };
    assert!(refusal.reason.contains("/etc/a"), "{}", refusal.reason);
    assert_eq!(read(pair.clone.join("etc/a")), "clone\n");
}

#[test]
fn logs_that_grew_on_both_sides_are_joined_round_after_round() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir -p var/log; echo base > var/log/app.log"));
    let (capture, importer) = (pair.capture(), pair.importer());
    let log = pair.clone.join("var/log/app.log");
    let inode = fs::metadata(&log).unwrap().ino();
    sh(&pair.guest, "echo guest 1 >> var/log/app.log");
    sh(&pair.clone, "echo clone 1 >> var/log/app.log");
    let (_, applied) = round(&capture, &importer, 0, false);
    assert_eq!(read(&log), "base\nguest 1\nclone 1\n");
    assert_eq!(applied.conflicts[0].resolution, "joined");
    sh(&pair.guest, "echo guest 2 >> var/log/app.log");
    sh(&pair.clone, "echo clone 2 >> var/log/app.log");
    let (_, applied) = round(&capture, &importer, applied.round, false);
    assert_eq!(read(&log), "base\nguest 1\nguest 2\nclone 1\nclone 2\n");
    sh(&pair.guest, "echo guest 3 >> var/log/app.log");
    let (_, applied) = round(&capture, &importer, applied.round, true);
    assert_eq!(read(&log), "base\nguest 1\nguest 2\nguest 3\nclone 1\nclone 2\n");
    assert_eq!(applied.round, 3);
    assert_eq!(
        fs::metadata(&log).unwrap().ino(),
        inode,
        "programs of the clone have it open"
    );
}

#[test]
fn a_log_that_the_guest_rotated_keeps_the_clones_own_lines() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir -p var/log; echo base > var/log/app.log"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(
        &pair.guest,
        "mv var/log/app.log var/log/app.log.1; echo fresh > var/log/app.log",
    );
    sh(&pair.clone, "echo clone >> var/log/app.log");
    round(&capture, &importer, 0, true);
    assert_eq!(read(pair.clone.join("var/log/app.log")), "fresh\nclone\n");
    assert_eq!(read(pair.clone.join("var/log/app.log.1")), "base\n");
}

#[test]
fn what_belongs_to_a_boot_is_left_alone() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| {
        sh(
            root,
            "mkdir -p var/lib/systemd tmp; echo base > var/lib/systemd/random-seed",
        )
    });
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(
        &pair.guest,
        "echo guest > var/lib/systemd/random-seed; echo x > tmp/x",
    );
    sh(&pair.clone, "echo clone > var/lib/systemd/random-seed");
    round(&capture, &importer, 0, true);
    assert_eq!(read(pair.clone.join("var/lib/systemd/random-seed")), "clone\n");
    assert!(!pair.clone.join("tmp/x").exists());
}

#[test]
fn inodes_hard_links_and_moved_trees_are_kept() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| {
        sh(
            root,
            "mkdir -p d/sub; echo x > d/sub/f; ln d/sub/f linked; echo y > plain; echo old > replaced",
        );
    });
    let before = |path: &str| fs::symlink_metadata(pair.clone.join(path)).unwrap().ino();
    let (tree, file, plain) = (before("d"), before("d/sub/f"), before("plain"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(
        &pair.guest,
        "mv d moved; rm moved/sub/f; mkdir d; ln linked d/again; echo more >> plain; mv plain p2",
    );
    sh(
        &pair.guest,
        "echo new > tmp; mv tmp replaced; mkfifo pipe; ln -s nowhere dangling",
    );
    round(&capture, &importer, 0, true);
    pair.assert_equal();
    let after = |path: &str| fs::symlink_metadata(pair.clone.join(path)).unwrap().ino();
    assert_eq!(
        (after("moved"), after("d/again"), after("p2")),
        (tree, file, plain)
    );
}

#[test]
fn a_later_round_sends_only_blocks_that_changed() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "head -c 8388608 /dev/urandom > big"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(
        &pair.guest,
        "printf x | dd of=big bs=1 seek=100 conv=notrunc status=none",
    );
    let (end, applied) = round(&capture, &importer, 0, false);
    assert_eq!(end.bytes, 8 << 20);
    sh(
        &pair.guest,
        "printf y | dd of=big bs=1 seek=5000000 conv=notrunc status=none; echo tail >> big",
    );
    let (end, _) = round(&capture, &importer, applied.round, true);
    assert!(end.bytes <= 2 * 65536, "{} bytes", end.bytes);
    pair.assert_equal();
}

#[test]
fn a_round_whose_answer_was_lost_is_sent_again() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo 1 > a; mkdir d; echo b > d/b");
    round(&capture, &importer, 0, false);
    sh(&pair.guest, "mv d e");
    let (end, _) = round(&capture, &importer, 0, true);
    assert!(end.entries >= 3, "{end:?}");
    pair.assert_equal();
}

#[test]
fn a_file_that_the_clone_spoilt_between_rounds_is_sent_again_whole() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "head -c 300000 /dev/zero > a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo 1 > a; head -c 200000 /dev/urandom >> a");
    let (_, applied) = round(&capture, &importer, 0, false);
    sh(&pair.clone, "echo spoilt > a");
    sh(&pair.guest, "echo 2 >> a");
    let (end, again) = round(&capture, &importer, applied.round, false);
    assert_eq!((end.round, again.round), (2, 1), "the round is not acknowledged");
    let (_, done) = round(&capture, &importer, again.round, true);
    assert_eq!(done.round, 3);
    pair.assert_equal();
    assert_eq!(read(done.conflicts[0].kept.as_ref().unwrap()), "spoilt\n");
}

#[test]
fn a_link_on_the_clone_leads_nobody_out_of_its_file_system() {
    if !is_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let pair = Pair::new(|root| sh(root, "mkdir d; echo base > d/x"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo guest > d/x; echo new > d/y");
    sh(
        &pair.clone,
        &format!("rm -r d; ln -s {} d", outside.path().display()),
    );
    round(&capture, &importer, 0, true);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(read(pair.clone.join("d/x")), "guest\n");
}

#[test]
fn the_guests_active_journal_becomes_an_archived_one_beside_the_clones() {
    if !is_root() {
        return;
    }
    let mut header = vec![0u8; 4096];
    header[..8].copy_from_slice(b"LPKSHHRH");
    header[16] = 1;
    header[72..88].fill(0xcd);
    header[152] = 2;
    header[168] = 1;
    header[184] = 9;
    let folder = "var/log/journal/0123";
    let pair = Pair::new(|root| {
        fs::create_dir_all(root.join(folder)).unwrap();
        fs::write(root.join(folder).join("system.journal"), &header).unwrap();
    });
    let (capture, importer) = (pair.capture(), pair.importer());
    let name = format!("system@{}-{:016x}-{:016x}.journal", "cd".repeat(16), 1, 9);
    sh(&pair.guest, &format!("echo entry >> {folder}/system.journal"));
    // As journald does with a file that was not closed.
    sh(
        &pair.clone,
        &format!("cd {folder}; mv system.journal system@x.journal~; echo own > system.journal"),
    );
    let (_, applied) = round(&capture, &importer, 0, false);
    sh(&pair.guest, &format!("echo another >> {folder}/system.journal"));
    round(&capture, &importer, applied.round, true);
    let kept = fs::read(pair.clone.join(folder).join(&name)).unwrap();
    assert_eq!(kept[16], 2, "archived");
    assert!(kept.ends_with(b"entry\nanother\n"));
    assert_eq!(read(pair.clone.join(folder).join("system.journal")), "own\n");
    assert_eq!(fs::read_dir(pair.clone.join(folder)).unwrap().count(), 2);
}

#[test]
fn once_nothing_changes_any_more_nothing_is_counted_as_dirty() {
    use std::io::{BufRead, BufReader, Read, Write};
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > log"));
    let (capture, importer) = (pair.capture(), pair.importer());
    // A program that has written to an open file just now, and is frozen.
    let script = "exec 3>>log; for i in 1 2 3; do echo line >&3; done; echo written; read go";
    let mut child = Command::new("sh")
        .args(["-c", script])
        .current_dir(&pair.guest)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let (_, applied) = round(&capture, &importer, 0, true);
    assert_eq!(count(&capture, applied.round), 0);
    sh(&pair.guest, "echo late >> log");
    assert_eq!(
        count(&capture, applied.round),
        1,
        "what is written after the last round is seen"
    );
    assert_eq!(count(&capture, applied.round), 1, "and stays dirty");
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    child.stdout.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_session_that_breaks_within_a_joined_log_loses_no_line_of_the_clone() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir -p var/log; echo base > var/log/app.log"));
    let (capture, importer) = (pair.capture(), pair.importer());
    let log = pair.clone.join("var/log/app.log");
    sh(&pair.guest, "echo guest 1 >> var/log/app.log");
    sh(&pair.clone, "echo clone 1 >> var/log/app.log");
    let (_, applied) = round(&capture, &importer, 0, false);
    sh(&pair.guest, "echo guest 2 >> var/log/app.log");
    let mut stream = Vec::new();
    export(&capture, applied.round, false, &mut stream);
    for cut in 1..stream.len() {
        assert!(import(&importer, OnConflict::PreferGuest, &mut &stream[..cut]).is_err());
        let now = read(&log);
        assert!(
            now.ends_with("clone 1\n") && now.matches("clone 1").count() == 1,
            "cut at {cut}: {now}"
        );
    }
    let (_, applied) = round(&capture, &importer, applied.round, true);
    assert_eq!(read(&log), "base\nguest 1\nguest 2\nclone 1\n");
    assert_eq!(applied.round, 3);
}

#[test]
fn a_hole_at_the_end_of_a_file_stays_one() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "head -c 64593 /dev/urandom > a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "truncate -s 61440 a; truncate -s 64593 a");
    round(&capture, &importer, 0, true);
    pair.assert_equal();
}

#[test]
fn a_file_that_the_clone_only_opened_is_not_one_that_it_changed() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "echo base > a"));
    let (capture, importer) = (pair.capture(), pair.importer());
    sh(&pair.guest, "echo 1 > a");
    let (_, first) = round(&capture, &importer, 0, false);
    sh(&pair.clone, ": >> a");
    sh(&pair.guest, "echo 2 > a");
    let (end, second) = round(&capture, &importer, first.round, true);
    assert_eq!(second.round, end.round);
    assert!(second.conflicts.is_empty(), "{:?}", second.conflicts);
    assert_eq!(read(pair.clone.join("a")), "2\n");
}

#[test]
fn what_lies_outside_of_the_part_that_is_mounted_is_not_waited_for() {
    if !is_root() {
        return;
    }
    let pair = Pair::new(|root| sh(root, "mkdir -p part/inner outside; echo base > part/inner/f"));
    let part = tempfile::tempdir().unwrap();
    let at = part.path().to_str().unwrap();
    root::run(
        "mount",
        &["--bind", pair.guest.join("part").to_str().unwrap(), at],
    );
    let mut view = understudy_guest::view::View::open(part.path()).unwrap();
    view.mount_point = "/".into();
    let capture = understudy_guest::export::Capture::begin("operation-1", Some(vec![view])).unwrap();
    sh(
        &pair.guest,
        "echo more > outside/f; mkdir outside/d; mv outside/d outside/e; touch outside",
    );
    let outside = count(&capture, 0);
    sh(part.path(), "echo more >> inner/f");
    let inside = count(&capture, 0);
    drop(capture);
    root::run("umount", &["-l", at]);
    assert_eq!((outside, inside), (0, 1));
}
