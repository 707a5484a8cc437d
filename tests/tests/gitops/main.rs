//! Three readers of a status must agree: kstatus (`kubectl wait`, Flux by itself), Argo CD's Lua, and Flux's CEL. Every
//! phase of every kind is put before all of them, written as operator and agent write it.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod argo;
mod examples;
mod flux;
mod kstatus;
mod objects;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use understudy_api::crd::Kind;

use objects::Recorded;

/// What a reader says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As declared, or at its good end.
    Current,
    /// Work is under way.
    InProgress,
    /// It waits for somebody. Only Argo CD has a word for it; to the others it is in progress.
    Suspended,
    /// It will not get further by itself.
    Failed,
}

impl Verdict {
    /// In the words of those who know no `Suspended`.
    fn plain(self) -> Verdict {
        match self {
            Verdict::Suspended => Verdict::InProgress,
            other => other,
        }
    }
}

fn gitops() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/understudy/gitops")
}

fn agree(what: &str, object: &Value, expected: Verdict) {
    assert_eq!(
        kstatus::read(object),
        expected.plain(),
        "kstatus, {what}: {object:#}"
    );
    assert_eq!(argo::read(object), expected, "Argo CD, {what}: {object:#}");
    assert_eq!(flux::read(object), expected.plain(), "Flux, {what}: {object:#}");
}

#[test]
fn every_phase_of_every_kind_is_read_alike_by_all_three() {
    for kind in Kind::ALL {
        let recorded = objects::of(kind);
        for verdict in [Verdict::Current, Verdict::Failed] {
            assert!(
                recorded.iter().any(|object| object.expected == verdict),
                "{}: no object is {verdict:?}",
                kind.name()
            );
        }
        for Recorded {
            what,
            object,
            expected,
        } in recorded
        {
            agree(&format!("{} {what}", kind.name()), &object, expected);
        }
    }
}

#[test]
fn an_object_that_nobody_has_seen_is_in_progress() {
    for kind in Kind::ALL {
        // As the API server stores it: with the default of the CRD.
        let default = kind.schema()["properties"]["status"]["default"].clone();
        let mut object = objects::bare(kind);
        object["status"] = default;
        agree(&format!("a new {}", kind.name()), &object, Verdict::InProgress);
    }
}

#[test]
fn a_status_for_an_older_generation_says_nothing_about_the_new_one() {
    for kind in Kind::ALL {
        for Recorded { what, mut object, .. } in objects::of(kind) {
            object["metadata"]["generation"] = json!(objects::GENERATION + 1);
            agree(
                &format!("{} {what}, changed", kind.name()),
                &object,
                Verdict::InProgress,
            );
        }
    }
}

#[test]
fn what_is_being_deleted_is_in_progress_whatever_it_was() {
    for kind in Kind::ALL {
        for Recorded { what, mut object, .. } in objects::of(kind) {
            object["metadata"]["deletionTimestamp"] = json!("2026-11-27T14:00:00Z");
            // Argo CD does not ask its Lua about an object that is being deleted.
            assert_eq!(
                kstatus::read(&object),
                Verdict::InProgress,
                "{} {what}",
                kind.name()
            );
            assert_eq!(flux::read(&object), Verdict::InProgress, "{} {what}", kind.name());
        }
    }
}

#[test]
fn argo_cd_tells_phase_and_message() {
    let recorded = objects::of(Kind::SeamlessReboot);
    let failed = recorded
        .iter()
        .find(|object| object.what == "Failed")
        .expect("a failed one");
    assert_eq!(argo::message(&failed.object), "Failed: what happened");
    let cloning = recorded
        .iter()
        .find(|object| object.what == "Cloning")
        .expect("one that clones");
    assert_eq!(argo::message(&cloning.object), "Cloning: what happened");
}
