//! One kind's objects between the API server and the store: what the watch has told, what is mirrored, and which
//! statuses are to be written.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::events::v1::Event;
use kube::api::DynamicObject;
use kube::runtime::watcher;

use super::{Driven, events};
use crate::cluster::kinds::Mirrored;
use crate::cluster::mirror::{Facts, Step, step};
use crate::cluster::objects::{Cluster, named};
use crate::cluster::reports::{self, Answer, Attempts, Due, PROGRESS, Target, Write};
use crate::store::{self, Key, Objects};

/// Of which kind something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    /// Guests.
    Guest,
    /// SeamlessReboots.
    Reboot,
    /// NodeUpdates.
    NodeUpdate,
    /// The Host.
    Host,
}

/// A status to be written.
#[derive(Debug)]
pub struct Job {
    /// Its kind.
    pub tag: Tag,
    /// Its object.
    pub key: Key,
    /// How.
    pub write: Write,
    /// What is told besides, once it is written.
    pub event: Option<Box<Event>>,
}

/// Jobs, and when to look for more where nothing changes before.
#[derive(Debug, Default)]
pub struct Agenda {
    /// To be done now.
    pub jobs: Vec<Job>,
    /// When the next is due.
    pub next: Option<Instant>,
}

impl Agenda {
    /// Takes in when something is due; whether that is now.
    pub fn is_now(&mut self, due: Due) -> bool {
        match due {
            Due::Never => false,
            Due::Now => true,
            Due::At(then) => {
                self.next = Some(self.next.map_or(then, |next| next.min(then)));
                false
            }
        }
    }
}

/// What the API server has of a kind.
#[derive(Debug)]
struct There<O> {
    objects: BTreeMap<Key, O>,
    /// Objects that we do not understand: they are there, and left alone.
    unreadable: BTreeSet<Key>,
}

impl<O> Default for There<O> {
    fn default() -> There<O> {
        There {
            objects: BTreeMap::new(),
            unreadable: BTreeSet::new(),
        }
    }
}

/// One kind's objects.
#[derive(Debug)]
pub struct Desk<O> {
    tag: Tag,
    there: There<O>,
    /// A list that is being read.
    listing: Option<There<O>>,
    is_complete: bool,
    attempts: HashMap<String, Attempts>,
    writing: HashSet<Key>,
    /// Troubles with the store that were told.
    told: BTreeSet<String>,
}

impl<O: Mirrored> Desk<O> {
    /// Nothing is known yet.
    pub fn new(tag: Tag) -> Desk<O> {
        Desk {
            tag,
            there: There::default(),
            listing: None,
            is_complete: false,
            attempts: HashMap::new(),
            writing: HashSet::new(),
            told: BTreeSet::new(),
        }
    }

    /// Forgets what was seen through a connection that is gone. What was tried stays known.
    pub fn reset(&mut self) {
        self.listing = None;
        self.is_complete = false;
        self.there = There::default();
        self.writing.clear();
    }

    /// Whether a complete list was read.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Takes in what the watch tells. Returns whether a list is complete with it.
    pub fn event(&mut self, event: watcher::Event<DynamicObject>) -> bool {
        match event {
            watcher::Event::Init => self.listing = Some(There::default()),
            watcher::Event::InitApply(object) => {
                let known = &self.there;
                let listing = self.listing.get_or_insert_default();
                put(listing, object, Some(known));
            }
            watcher::Event::InitDone => {
                self.there = self.listing.take().unwrap_or_default();
                self.is_complete = true;
                return true;
            }
            watcher::Event::Apply(object) => put(&mut self.there, object, None),
            watcher::Event::Delete(object) => {
                let key = key_of(&object);
                self.there.unreadable.remove(&key);
                let is_it = |there: &O| object.metadata.uid == there.meta().uid;
                if self.there.objects.get(&key).is_some_and(is_it) {
                    self.there.objects.remove(&key);
                }
            }
        }
        false
    }

    /// Has the store follow. Returns what goes on here and is not assigned to this node.
    pub fn mirror(&mut self, cluster: &Cluster, driven: &Driven, now: Timestamp) -> BTreeSet<String> {
        let locals = list::<O>(cluster);
        let node_uid = cluster.node_uid();
        let mut orphans = BTreeSet::new();
        let keys: BTreeSet<&Key> = locals.keys().chain(self.there.objects.keys()).collect();
        for key in keys {
            if self.there.unreadable.contains(key) {
                continue;
            }
            let remote = self.there.objects.get(key);
            let decide = |local: Option<&O>| {
                let facts = Facts {
                    node_uid: &node_uid,
                    is_complete: self.is_complete,
                    is_driven: local.is_some_and(|local| driven(&local.uid())),
                    is_released: remote.is_some_and(|remote| cluster.released().has(&remote.uid())),
                    now,
                };
                step(local, remote, &facts)
            };
            match decide(locals.get(key)) {
                Step::Keep => continue,
                Step::Orphan => {
                    orphans.insert(named(O::KIND, key));
                    continue;
                }
                Step::Write(_) | Step::Forget => {}
            }
            // Once more, with what is there while nobody else changes it.
            let done = cluster.store().mirror::<O>(key, |local| match decide(local) {
                Step::Keep | Step::Orphan => store::Mirrored::Unchanged,
                Step::Write(object) => store::Mirrored::Object(object),
                Step::Forget => store::Mirrored::Gone,
            });
            if let Err(error) = done {
                let trouble = format!("{} {key}: {error}", O::KIND.name());
                if self.told.insert(trouble) {
                    tracing::error!(kind = O::KIND.name(), %key, %error, "the object could not be mirrored");
                }
            }
        }
        orphans
    }

    /// Whether the API server is known to have an object of this UID, or not to.
    pub fn has(&self, key: &Key, uid: &str) -> Option<bool> {
        let is_there = match self.there.objects.get(key) {
            Some(there) => there.uid() == uid,
            None => self.there.unreadable.contains(key),
        };
        (self.is_complete || is_there).then_some(is_there)
    }

    /// Which statuses are to be written. `stand_in`: what is reported of an object that has no local one.
    pub fn due(
        &mut self,
        cluster: &Cluster,
        stand_in: impl Fn(&O) -> Option<O>,
        pace: Option<Duration>,
        now: Instant,
        agenda: &mut Agenda,
    ) {
        let locals = list::<O>(cluster);
        let (node_name, node_uid) = (cluster.node_name(), cluster.node_uid());
        for (key, remote) in &self.there.objects {
            if self.writing.contains(key) || !remote.is_of_node(&node_uid) {
                continue;
            }
            let local = locals
                .get(key)
                .filter(|local| local.uid() == remote.uid() || (local.is_local() && remote.is_local()));
            let Some(ours) = local.cloned().or_else(|| stand_in(remote)) else {
                continue;
            };
            // Not looked at yet.
            if ours.phase().is_none() {
                continue;
            }
            let (wanted, there) = (part(&ours), part(remote));
            // What is over is claimed by nobody any more.
            if remote.is_over() && wanted == there {
                continue;
            }
            let claim = reports::claim(remote.meta(), "phase");
            let attempts = self.attempts.entry(remote.uid()).or_default();
            let due = reports::due(&wanted, &there, claim, attempts, pace.unwrap_or(PROGRESS), now);
            if !agenda.is_now(due) {
                continue;
            }
            let target = Target {
                api_version: understudy_api::API_VERSION,
                kind: O::KIND.name(),
                meta: remote.meta(),
            };
            let is_end = ours.is_over() || ours.has(understudy_api::conditions::types::RELEASED);
            let mut told = ours.clone();
            *told.meta_mut() = remote.meta().clone();
            let event = (ours.phase() != remote.phase())
                .then(|| events::of_phase(&told, &node_name, Timestamp::now()))
                .flatten()
                .map(Box::new);
            agenda.jobs.push(Job {
                tag: self.tag,
                key: key.clone(),
                write: reports::write(target, wanted, claim.forces(), is_end),
                event,
            });
        }
        for job in agenda.jobs.iter().filter(|job| job.tag == self.tag) {
            self.writing.insert(job.key.clone());
        }
    }

    /// Takes in what became of a write, and the object as it is now where that is known. Returns what is to be
    /// logged.
    pub fn settle(&mut self, key: &Key, answer: &Answer, object: Option<DynamicObject>) -> Option<String> {
        self.writing.remove(key);
        let uid = self.there.objects.get(key).map(|there| there.uid());
        match object {
            Some(object) => put(&mut self.there, object, None),
            None if *answer == Answer::Gone => {
                self.there.objects.remove(key);
            }
            None => {}
        }
        let attempts = self.attempts.entry(uid?).or_default();
        attempts.take(answer, Instant::now())
    }

    /// A write was not answered: it is made again when the API server is back.
    pub fn unanswered(&mut self, key: &Key) {
        self.writing.remove(key);
    }

    /// What was tried for objects that are gone is forgotten.
    pub fn tidy(&mut self) {
        let there: HashSet<String> = self.there.objects.values().map(|there| there.uid()).collect();
        self.attempts.retain(|uid, _| there.contains(uid));
    }
}

fn list<O: Mirrored>(cluster: &Cluster) -> BTreeMap<Key, O> {
    let objects = cluster.store().list::<O>().into_iter();
    objects.map(|object| (object.key(), object)).collect()
}

/// The agent's part of an object's status.
fn part<O: Mirrored>(object: &O) -> serde_json::Value {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    reports::agents_part(value.get_mut("status").map(serde_json::Value::take))
}

fn key_of(object: &DynamicObject) -> Key {
    let meta = &object.metadata;
    Key {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

/// Takes in an object as the API server has it, unless what is known of it is newer.
fn put<O: Mirrored>(there: &mut There<O>, object: DynamicObject, known: Option<&There<O>>) {
    let key = key_of(&object);
    let known = known.unwrap_or(there).objects.get(&key);
    if let Some(known) = known.filter(|known| reports::is_older(&object.metadata, known.meta())) {
        let known = known.clone();
        there.objects.insert(key, known);
        return;
    }
    match serde_json::to_value(&object).and_then(serde_json::from_value::<O>) {
        Ok(object) => {
            there.unreadable.remove(&key);
            there.objects.insert(key, object);
        }
        Err(error) => {
            if there.unreadable.insert(key.clone()) {
                tracing::error!(
                    kind = O::KIND.name(), %key, %error,
                    "the object is not understood and left alone; is the agent older than the CRDs?"
                );
            }
            there.objects.remove(&key);
        }
    }
}
