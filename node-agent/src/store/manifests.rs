//! The directory of manifests: read again when a file changes. A manifest that vanishes changes nothing;
//! a malformed one is reported and harms nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use understudy_api::manifest::{MAX_MANIFEST, Manifest, parse};

use super::objects::{Applied, Key, Object, Store, StoreError};
use crate::durable::{self, DurableError};

/// What is wrong with a manifest; shown by `understudy-node status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// Which document of it, which field, what is wrong and what would do.
    pub message: String,
}

/// Reads manifests into a [`Store`].
#[derive(Debug)]
pub struct Scanner {
    directory: PathBuf,
    problems_file: PathBuf,
    files: BTreeMap<PathBuf, Seen>,
}

/// A file as it was read last.
#[derive(Debug)]
struct Seen {
    stamp: Stamp,
    declares: Vec<(&'static str, Key)>,
    problems: Vec<String>,
    /// A problem of ours (an I/O error, say) that may pass by itself.
    again: bool,
}

/// Tells a file from what it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// File in the state directory that holds the [`Problem`]s of the last scan.
pub fn problems_file(state_dir: &Path) -> PathBuf {
    state_dir.join("problems.json")
}

impl Scanner {
    /// A scanner of `directory`, which need not exist yet.
    pub fn new(directory: &Path, state_dir: &Path) -> Scanner {
        Scanner {
            directory: directory.to_owned(),
            problems_file: problems_file(state_dir),
            files: BTreeMap::new(),
        }
    }

    /// Reads what is new or has changed. Returns whether anything was applied or went wrong differently
    /// than before.
    pub fn scan(&mut self, store: &Store) -> Result<bool, DurableError> {
        let present = self.present();
        let mut changed = false;
        let gone = self.files.len();
        self.files.retain(|path, _| present.contains_key(path));
        changed |= gone != self.files.len();
        for (path, stamp) in present {
            let seen = self.files.get(&path);
            if seen.is_some_and(|seen| seen.stamp == stamp && !seen.again) {
                continue;
            }
            let before = seen.map(|seen| seen.problems.clone()).unwrap_or_default();
            let read = self.read(&path, stamp, store);
            if read.problems != before {
                for problem in &read.problems {
                    tracing::error!(file = %path.display(), "manifest: {problem}");
                }
            }
            changed |= read.problems != before || !read.again;
            self.files.insert(path, read);
        }
        if changed {
            durable::write_json_relaxed(&self.problems_file, &self.problems())?;
        }
        Ok(changed)
    }

    /// What is wrong now.
    pub fn problems(&self) -> Vec<Problem> {
        self.files
            .iter()
            .flat_map(|(file, seen)| {
                seen.problems.iter().map(|message| Problem {
                    file: file.clone(),
                    message: message.clone(),
                })
            })
            .collect()
    }

    fn present(&self) -> BTreeMap<PathBuf, Stamp> {
        let mut present = BTreeMap::new();
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return present;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let known = [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
            if !known || name.starts_with('.') {
                continue;
            }
            if let Ok(metadata) = fs::metadata(&path)
                && metadata.is_file()
            {
                let stamp = Stamp {
                    inode: metadata.ino(),
                    size: metadata.size(),
                    modified: (metadata.mtime(), metadata.mtime_nsec()),
                };
                present.insert(path, stamp);
            }
        }
        present
    }

    fn read(&self, path: &Path, stamp: Stamp, store: &Store) -> Seen {
        let mut seen = Seen {
            stamp,
            declares: Vec::new(),
            problems: Vec::new(),
            again: false,
        };
        if stamp.size > MAX_MANIFEST as u64 {
            let problem = format!("it has {} bytes; at most {MAX_MANIFEST} are read", stamp.size);
            seen.problems.push(problem);
            return seen;
        }
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                seen.problems.push(format!("it could not be read: {error}"));
                seen.again = error.kind() != std::io::ErrorKind::InvalidData;
                return seen;
            }
        };
        let documents = match parse(&text) {
            Ok(documents) => documents,
            Err(error) => {
                seen.problems.push(error.to_string());
                return seen;
            }
        };
        let written = modified(path);
        for document in documents {
            match document {
                Ok(Manifest::Guest(object)) => self.apply(&*object, written, path, store, &mut seen),
                Ok(Manifest::SeamlessReboot(object)) => {
                    self.apply(&*object, written, path, store, &mut seen);
                }
                Ok(Manifest::HostUpdate(object)) => self.apply(&*object, written, path, store, &mut seen),
                Err(error) => seen.problems.push(error.to_string()),
            }
        }
        seen
    }

    fn apply<O: Object>(&self, object: &O, written: Timestamp, path: &Path, store: &Store, seen: &mut Seen) {
        let id = (O::PLURAL, object.key());
        let elsewhere = self
            .files
            .iter()
            .find(|(other, there)| other.as_path() != path && there.declares.contains(&id));
        if let Some((other, _)) = elsewhere {
            seen.problems.push(format!(
                "{} {} is declared in {} as well, which counts; remove one of them",
                O::KIND.name(),
                id.1,
                other.display()
            ));
            return;
        }
        seen.declares.push(id.clone());
        match store.apply(object, written) {
            Ok(Applied::Unchanged) => {}
            Ok(Applied::Deleted) => tracing::info!(
                file = %path.display(),
                "{} {} was deleted after the manifest was written: it stays away", O::KIND.name(), id.1
            ),
            Ok(applied) => {
                let verb = if applied == Applied::Created {
                    "created"
                } else {
                    "configured"
                };
                tracing::info!(file = %path.display(), "{} {} {verb}", O::KIND.name(), id.1);
            }
            Err(error) => {
                seen.again |= !matches!(error, StoreError::Immutable { .. });
                seen.problems.push(error.to_string());
            }
        }
    }
}

fn modified(path: &Path) -> Timestamp {
    let time = fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH);
    Timestamp::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_api::{Guest, SeamlessReboot};

    const GUEST: &str = "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata: {name: web}\nspec:\n  memory: 512Mi\n  disks: [{name: root, role: Root, source: web.img}]\n";
    const REBOOT: &str = "apiVersion: understudy.dev/v1alpha1\nkind: SeamlessReboot\nmetadata: {name: kernel}\nspec: {guestName: web}\n";

    struct Bed {
        dir: tempfile::TempDir,
        store: Store,
        scanner: Scanner,
    }

    fn bed() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("manifests")).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let scanner = Scanner::new(&dir.path().join("manifests"), dir.path());
        Bed { dir, store, scanner }
    }

    impl Bed {
        fn put(&self, name: &str, text: &str) {
            fs::write(self.dir.path().join("manifests").join(name), text).unwrap();
        }
        fn scan(&mut self) -> Vec<Problem> {
            self.scanner.scan(&self.store).unwrap();
            self.scanner.problems()
        }
    }

    #[test]
    fn a_malformed_document_is_named_with_file_document_and_field_and_harms_no_other() {
        let mut bed = bed();
        let bad = GUEST.replace("512Mi", "much").replace("web}", "bad}");
        bed.put("all.yaml", &format!("{GUEST}---\n{bad}---\n{REBOOT}"));
        bed.put("broken.yaml", "a: [1,\n");
        let problems = bed.scan();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].file.ends_with("all.yaml"));
        for part in ["document 2", "\"bad\"", "spec.memory", "much"] {
            assert!(problems[0].message.contains(part), "{}", problems[0].message);
        }
        assert!(problems[1].file.ends_with("broken.yaml"));
        assert_eq!(bed.store.list::<Guest>().len(), 1);
        assert_eq!(bed.store.list::<SeamlessReboot>().len(), 1);
        let shown: Vec<Problem> = durable::read_json(&problems_file(bed.dir.path()))
            .unwrap()
            .unwrap();
        assert_eq!(shown, problems);

        bed.put("all.yaml", &format!("{GUEST}---\n{REBOOT}"));
        assert_eq!(bed.scan().len(), 1);
    }

    #[test]
    fn a_manifest_that_vanishes_changes_nothing() {
        let mut bed = bed();
        bed.put("web.yaml", GUEST);
        bed.scan();
        fs::remove_file(bed.dir.path().join("manifests/web.yaml")).unwrap();
        bed.scan();
        let guests = bed.store.list::<Guest>();
        assert_eq!(guests.len(), 1);
        assert!(!guests[0].is_deleting());
    }

    #[test]
    fn an_object_that_two_files_declare_is_taken_from_the_first() {
        let mut bed = bed();
        bed.put("a.yaml", GUEST);
        bed.scan();
        bed.put("b.yaml", &GUEST.replace("512Mi", "1Gi"));
        let problems = bed.scan();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].message.contains("a.yaml"), "{}", problems[0].message);
        assert_eq!(bed.store.list::<Guest>()[0].spec.memory, "512Mi");
    }
}
