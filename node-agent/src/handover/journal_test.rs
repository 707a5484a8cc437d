use std::fs::{self, File};
use std::path::Path;

use understudy_api::reboot::SeamlessRebootSpec;
use uuid::Uuid;

use super::super::plan::Plan;
use super::super::record::{Moment, Step};
use super::*;

fn operation(uid: &str) -> Operation {
    let spec: SeamlessRebootSpec = serde_json::from_str(r#"{"guestName":"web"}"#).unwrap();
    Operation::new(
        uid.to_owned(),
        "default/r".to_owned(),
        "default/web".to_owned(),
        Plan::from_spec(&spec).unwrap(),
        (Uuid::from_u128(1), Uuid::from_u128(2)),
        Moment {
            unix_us: 5,
            boot_us: 7,
        },
    )
}

#[test]
fn a_record_is_found_again_as_it_was_written_last() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Directory::open(dir.path().join("journal")).unwrap();
    let mut written = operation("a-1");
    journal.write(&written).unwrap();
    written.step = Step::Split;
    journal.write(&written).unwrap();
    journal.write(&operation("b-2")).unwrap();
    let found: Vec<Operation> = journal.load().unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(found, [written, operation("b-2")]);
    journal.remove("a-1").unwrap();
    journal.remove("a-1").unwrap();
    assert_eq!(journal.load().unwrap().len(), 1);
}

#[test]
fn a_replacement_that_was_cut_short_leaves_the_old_record() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Directory::open(dir.path()).unwrap();
    journal.write(&operation("a")).unwrap();
    let half = &encode(&operation("a")).unwrap()[..100];
    fs::write(dir.path().join("a.new"), half).unwrap();
    let found = journal.load().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(*found[0].as_ref().unwrap(), operation("a"));
    // And the next replacement does not mind it.
    journal.write(&operation("a")).unwrap();
}

#[test]
fn a_damaged_record_is_refused_by_name_and_spoils_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Directory::open(dir.path()).unwrap();
    journal.write(&operation("good")).unwrap();
    let whole = encode(&operation("bad")).unwrap();
    let path = dir.path().join("bad.operation");
    // Every truncation, and a flip of every byte.
    for cut in 0..whole.len() {
        let error = decode::<Operation>(&whole[..cut], &path).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{cut}: {error}");
    }
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        assert!(decode::<Operation>(&flipped, &path).is_err(), "byte {at}");
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let found = journal.load().unwrap();
    let error = found[0].as_ref().unwrap_err().to_string();
    assert!(
        error.contains("bad.operation") && error.contains("checksum"),
        "{error}"
    );
    assert!(found[1].is_ok());
}

#[test]
fn a_record_of_another_version_is_refused_with_what_would_do() {
    let whole = String::from_utf8(encode(&operation("a")).unwrap()).unwrap();
    let newer = whole.replacen(" 1 ", " 2 ", 1);
    let error = decode::<Operation>(newer.as_bytes(), Path::new("a.operation")).unwrap_err();
    assert!(
        matches!(error, JournalError::Version { version: 2, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn a_record_beyond_the_limit_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Directory::open(dir.path()).unwrap();
    let file = File::create(dir.path().join("huge.operation")).unwrap();
    file.set_len(MAX_RECORD * 1000).unwrap();
    let error = journal.load().unwrap().remove(0).unwrap_err().to_string();
    assert!(error.contains("larger than"), "{error}");
}

#[test]
fn a_uid_never_names_a_file_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Directory::open(dir.path().join("journal")).unwrap();
    journal.write(&operation("../../etc/passwd")).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(journal.load().unwrap().len(), 1);
}
