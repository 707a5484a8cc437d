//! Objects with metadata, spec and status: one JSON file each, replaced durably.
//!
//! The files are the truth, and every change is made under a lock on the directory: the agent and
//! `understudy-node delete` may run at the same time.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use understudy_api::crd::Kind;
use understudy_api::reboot::SeamlessRebootSpec;
use understudy_api::validation::{FieldError, validate_change};
use understudy_api::{Guest, Host, HostUpdate, NodeUpdate, ObjectMeta, SeamlessReboot, Time};
use uuid::Uuid;

use crate::durable::{self, DurableError};

/// Directory of objects that belong to no namespace; no namespace has this name.
const CLUSTER: &str = "@cluster";

/// Namespace and name of an object; the namespace is empty for kinds that belong to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// The key of `name` in `namespace`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Key {
        Key {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// A kind of object that the store holds.
pub trait Object: Clone + PartialEq + Serialize + DeserializeOwned {
    /// Which kind.
    const KIND: Kind;
    /// Its directory, which is its plural.
    const PLURAL: &'static str;
    /// Its status.
    type Status: Clone + PartialEq + Default;

    /// Metadata.
    fn meta(&self) -> &ObjectMeta;
    /// Metadata, to change it.
    fn meta_mut(&mut self) -> &mut ObjectMeta;
    /// Status.
    fn status(&self) -> Option<&Self::Status>;
    /// Replaces the status.
    fn set_status(&mut self, status: Self::Status);
    /// Takes the spec of another object.
    fn take_spec(&mut self, other: &Self);

    /// Namespace and name.
    fn key(&self) -> Key {
        let meta = self.meta();
        Key {
            namespace: match Self::KIND.is_namespaced() {
                true => meta.namespace.clone().unwrap_or_else(|| "default".to_owned()),
                false => String::new(),
            },
            name: meta.name.clone().unwrap_or_default(),
        }
    }

    /// UID; empty for an object that no store has seen.
    fn uid(&self) -> String {
        self.meta().uid.clone().unwrap_or_default()
    }

    /// Generation of the spec.
    fn generation(&self) -> i64 {
        self.meta().generation.unwrap_or(1)
    }

    /// Whether it is being deleted.
    fn is_deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }
}

/// The other spec, all of it.
fn replace<S: Clone>(ours: &mut S, theirs: &S) {
    *ours = theirs.clone();
}

/// The other spec, and what was asked before where it asks for nothing: once asked, an action is not taken back by
/// taking it out of the manifest, whether anybody has acted on it yet or not.
fn keep_action(ours: &mut SeamlessRebootSpec, theirs: &SeamlessRebootSpec) {
    let asked = ours.action.take();
    replace(ours, theirs);
    ours.action = ours.action.take().or(asked);
}

macro_rules! object {
    ($kind:ident, $plural:literal, $status:ty) => {
        object!($kind, $plural, $status, replace);
    };
    ($kind:ident, $plural:literal, $status:ty, $take_spec:ident) => {
        impl Object for $kind {
            const KIND: Kind = Kind::$kind;
            const PLURAL: &'static str = $plural;
            type Status = $status;

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
            fn status(&self) -> Option<&Self::Status> {
                self.status.as_ref()
            }
            fn set_status(&mut self, status: Self::Status) {
                self.status = Some(status);
            }
            fn take_spec(&mut self, other: &Self) {
                $take_spec(&mut self.spec, &other.spec);
            }
        }
    };
}

object!(Guest, "guests", understudy_api::GuestStatus);
object!(
    SeamlessReboot,
    "seamlessreboots",
    understudy_api::SeamlessRebootStatus,
    keep_action
);
object!(HostUpdate, "hostupdates", understudy_api::HostUpdateStatus);
object!(NodeUpdate, "nodeupdates", understudy_api::NodeUpdateStatus);
object!(Host, "hosts", understudy_api::HostStatus);

/// Why an object could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The lock could not be taken.
    #[error("locking the objects in {path}: {source}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The change breaks a rule.
    #[error("{kind} {key} cannot be changed so: {}; delete it and apply it anew where the change is meant", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Immutable {
        /// Kind.
        kind: &'static str,
        /// Which.
        key: Key,
        /// What is wrong, field by field.
        errors: Vec<FieldError>,
    },
    /// The object is being deleted.
    #[error(
        "{kind} {key} is being deleted; it is made anew when that is done and the manifest is written again"
    )]
    Deleting {
        /// Kind.
        kind: &'static str,
        /// Which.
        key: Key,
    },
    /// There is no such object.
    #[error("{plural} {key:?} not found", key = key.to_string())]
    NotFound {
        /// Plural of the kind.
        plural: &'static str,
        /// Which.
        key: Key,
    },
}

/// What became of an applied object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is new.
    Created,
    /// Its spec or labels changed.
    Configured,
    /// Nothing to do.
    Unchanged,
    /// It was deleted after the manifest was written.
    Deleted,
}

/// What becomes of an object in [`Store::mirror`].
#[derive(Clone, Debug, PartialEq)]
pub enum Mirrored<O> {
    /// It stays.
    Unchanged,
    /// It is this from now on.
    Object(Box<O>),
    /// It is not there any more.
    Gone,
}

/// The objects of a node.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    bell: Arc<Bell>,
}

/// Counts changes made through this process, and wakes who waits for one.
#[derive(Debug, Default)]
struct Bell {
    changes: Mutex<u64>,
    rung: Condvar,
}

impl Store {
    /// Opens the store beneath `state_dir`, making its directories where they are missing.
    pub fn open(state_dir: &Path) -> Result<Store, StoreError> {
        let dir = state_dir.join("objects");
        for plural in [
            Guest::PLURAL,
            SeamlessReboot::PLURAL,
            HostUpdate::PLURAL,
            NodeUpdate::PLURAL,
            Host::PLURAL,
        ] {
            durable::make_dir(&dir.join(plural))?;
        }
        Ok(Store {
            dir,
            bell: Arc::default(),
        })
    }

    /// Reads one object.
    pub fn get<O: Object>(&self, key: &Key) -> Result<Option<O>, StoreError> {
        Ok(durable::read_json(&self.path::<O>(key))?)
    }

    /// Reads all objects of a kind, in the order of their keys. A damaged file is logged and left out.
    pub fn list<O: Object>(&self) -> Vec<O> {
        let mut objects: Vec<O> = Vec::new();
        for namespace in entries(&self.dir.join(O::PLURAL)) {
            for path in entries(&namespace) {
                if path.extension().is_none_or(|extension| extension != "json") {
                    continue;
                }
                match durable::read_json(&path) {
                    Ok(object) => objects.extend(object),
                    Err(error) => tracing::error!(%error, "an object is left alone"),
                }
            }
        }
        objects.sort_by_key(Object::key);
        objects
    }

    /// Creates or changes an object by a manifest that was written at `written`. Metadata but labels and
    /// annotations, and the status, are the store's own.
    pub fn apply<O: Object>(&self, wanted: &O, written: Timestamp) -> Result<Applied, StoreError> {
        let key = wanted.key();
        let _lock = self.lock()?;
        let Some(mut object) = self.get::<O>(&key)? else {
            if self
                .tombstone::<O>(&key)?
                .is_some_and(|deleted| deleted >= written)
            {
                return Ok(Applied::Deleted);
            }
            let mut object = wanted.clone();
            let meta = object.meta_mut();
            *meta = ObjectMeta {
                name: Some(key.name.clone()),
                namespace: O::KIND.is_namespaced().then(|| key.namespace.clone()),
                labels: meta.labels.take(),
                annotations: meta.annotations.take(),
                uid: Some(Uuid::new_v4().to_string()),
                generation: Some(1),
                creation_timestamp: Some(Time(now())),
                ..ObjectMeta::default()
            };
            self.write(&object, true)?;
            durable::remove(&self.tombstone_path::<O>(&key))?;
            return Ok(Applied::Created);
        };
        if object.is_deleting() {
            return Err(StoreError::Deleting {
                kind: O::KIND.name(),
                key,
            });
        }
        let before = object.clone();
        let errors = validate_change(O::KIND, &to_value(&before), &to_value(wanted));
        if !errors.is_empty() {
            return Err(StoreError::Immutable {
                kind: O::KIND.name(),
                key,
                errors,
            });
        }
        object.take_spec(wanted);
        if object != before {
            object.meta_mut().generation = Some(before.generation() + 1);
        }
        object.meta_mut().labels = wanted.meta().labels.clone();
        object.meta_mut().annotations = wanted.meta().annotations.clone();
        if object == before {
            return Ok(Applied::Unchanged);
        }
        self.write(&object, true)?;
        Ok(Applied::Configured)
    }

    /// Changes the status of an object that still has this UID; nothing otherwise. `durable`: the new
    /// status survives a power cut (phases do, progress need not).
    pub fn update_status<O: Object>(
        &self,
        key: &Key,
        uid: &str,
        durable: bool,
        change: impl FnOnce(&mut O::Status),
    ) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let Some(mut object) = self.get::<O>(key)?.filter(|object| object.uid() == uid) else {
            return Ok(());
        };
        let mut status = object.status().cloned().unwrap_or_default();
        change(&mut status);
        if object.status() == Some(&status) {
            return Ok(());
        }
        object.set_status(status);
        self.write(&object, durable)
    }

    /// Asks for an object's deletion: sets its deletion time. What it stands for is ended by whoever owns
    /// it, which then calls [`Store::remove`].
    pub fn delete<O: Object>(&self, key: &Key) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let mut object = self.get::<O>(key)?.ok_or_else(|| StoreError::NotFound {
            plural: O::PLURAL,
            key: key.clone(),
        })?;
        if object.is_deleting() {
            return Ok(());
        }
        object.meta_mut().deletion_timestamp = Some(Time(now()));
        self.write(&object, true)
    }

    /// Removes an object that still has this UID. A manifest that was written before does not bring it
    /// back.
    pub fn remove<O: Object>(&self, key: &Key, uid: &str) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        if self.get::<O>(key)?.is_none_or(|object| object.uid() != uid) {
            return Ok(());
        }
        durable::write_json(&self.tombstone_path::<O>(key), &now())?;
        durable::remove(&self.path::<O>(key))?;
        self.ring();
        Ok(())
    }

    /// Changes, makes or removes the object of a name by what `decide` makes of it, in one step among all
    /// processes. Returns whether there was anything to do. Unlike [`Store::remove`] this leaves no tombstone: who
    /// mirrors objects of somebody else has no manifests that would bring them back.
    pub fn mirror<O: Object>(
        &self,
        key: &Key,
        decide: impl FnOnce(Option<&O>) -> Mirrored<O>,
    ) -> Result<bool, StoreError> {
        let _lock = self.lock()?;
        match decide(self.get::<O>(key)?.as_ref()) {
            Mirrored::Unchanged => return Ok(false),
            Mirrored::Object(object) => self.write(&*object, true)?,
            Mirrored::Gone => {
                durable::remove(&self.path::<O>(key))?;
                self.ring();
            }
        }
        Ok(true)
    }

    /// Waits until something was changed through this store object, at most for `limit`. `seen` is what the
    /// last call returned, 0 at first.
    pub fn wait(&self, seen: u64, limit: Duration) -> u64 {
        let changes = self.bell.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let (changes, _) = self
            .bell
            .rung
            .wait_timeout_while(changes, limit, |changes| *changes == seen)
            .unwrap_or_else(PoisonError::into_inner);
        *changes
    }

    /// Wakes who waits, as a change does.
    pub fn ring(&self) {
        *self.bell.changes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.bell.rung.notify_all();
    }

    fn write<O: Object>(&self, object: &O, durable: bool) -> Result<(), StoreError> {
        let path = self.path::<O>(&object.key());
        if let Some(directory) = path.parent() {
            durable::make_dir(directory)?;
        }
        if durable {
            durable::write_json(&path, object)?;
        } else {
            durable::write_json_relaxed(&path, object)?;
        }
        self.ring();
        Ok(())
    }

    fn tombstone<O: Object>(&self, key: &Key) -> Result<Option<Timestamp>, StoreError> {
        Ok(durable::read_json(&self.tombstone_path::<O>(key))?)
    }

    fn path<O: Object>(&self, key: &Key) -> PathBuf {
        let namespace = match key.namespace.as_str() {
            "" => CLUSTER,
            namespace => namespace,
        };
        self.dir
            .join(O::PLURAL)
            .join(namespace)
            .join(format!("{}.json", key.name))
    }

    fn tombstone_path<O: Object>(&self, key: &Key) -> PathBuf {
        self.path::<O>(key).with_extension("json.deleted")
    }

    /// Held until dropped; one change at a time among all processes.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.dir.join("lock");
        let failed = |source: std::io::Error| StoreError::Lock {
            path: path.clone(),
            source,
        };
        let file = File::create(&path).map_err(failed)?;
        flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        Ok(file)
    }
}

fn to_value<O: Object>(object: &O) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or(Value::Null);
    // The status of the one and its absence from the other are no change of the user's.
    if let Some(fields) = value.as_object_mut() {
        fields.remove("status");
    }
    value
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    }
}

/// Now, in whole seconds as Kubernetes writes metadata.
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
#[path = "objects_test.rs"]
mod tests;
