//! All kinds together: the work of one look at both sides. It reads and writes files, so the link has it done
//! apart from its network.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::api::DynamicObject;
use kube::runtime::watcher;
use understudy_api::{Guest, Host, NodeUpdate, SeamlessReboot};

use super::Driven;
use super::desk::{Agenda, Desk, Job, Tag};
use crate::cluster::kinds::Mirrored;
use crate::cluster::objects::Cluster;
use crate::cluster::reports::{self, Answer, Attempts, HEARTBEAT, Target};
use crate::store::{Key, Object, Objects};

/// The desks of all kinds.
pub struct Desks {
    cluster: Arc<Cluster>,
    driven: Driven,
    guests: Desk<Guest>,
    reboots: Desk<SeamlessReboot>,
    node_updates: Desk<NodeUpdate>,
    host: HostDesk,
}

/// The node's own Host.
#[derive(Debug, Default)]
struct HostDesk {
    there: Option<Host>,
    attempts: Attempts,
    writing: bool,
}

impl Desks {
    /// Of these objects; `driven`: whether a driver runs, or a record waits for one, for a UID.
    pub fn new(cluster: Arc<Cluster>, driven: Driven) -> Desks {
        Desks {
            cluster,
            driven,
            guests: Desk::new(Tag::Guest),
            reboots: Desk::new(Tag::Reboot),
            node_updates: Desk::new(Tag::NodeUpdate),
            host: HostDesk::default(),
        }
    }

    /// A new connection, through which the Host was found.
    pub fn connected(&mut self, host: Host) {
        self.guests.reset();
        self.reboots.reset();
        self.node_updates.reset();
        self.host.there = Some(host);
        self.host.writing = false;
    }

    /// Takes in what a watch tells. Returns whether a list is complete with it.
    pub fn event(&mut self, tag: Tag, event: watcher::Event<DynamicObject>) -> bool {
        match tag {
            Tag::Guest => self.guests.event(event),
            Tag::Reboot => self.reboots.event(event),
            Tag::NodeUpdate => self.node_updates.event(event),
            Tag::Host => false,
        }
    }

    /// One look at both sides: the store follows the API server, and what the API server lacks is returned. `pace`:
    /// how long progress waits, where not as long as always.
    pub fn work(&mut self, pace: Option<Duration>) -> Agenda {
        self.mirror();
        let mut agenda = Agenda::default();
        let now = Instant::now();
        let cluster = self.cluster.clone();
        let released = |guest: &Guest| {
            let all = cluster.released().all();
            all.into_iter().find(|released| released.uid() == guest.uid())
        };
        self.guests.due(&cluster, released, pace, now, &mut agenda);
        self.reboots.due(&cluster, |_| None, pace, now, &mut agenda);
        // One that began here is here before it is there: where it is not, our records are lost.
        let lost = |update: &NodeUpdate| {
            let is_lost = update.is_local() && !update.is_over();
            is_lost.then(|| {
                let mut update = update.clone();
                update.fail_as_lost(Timestamp::now());
                update
            })
        };
        self.node_updates.due(&cluster, lost, pace, now, &mut agenda);
        self.host.due(&cluster, pace, now, &mut agenda);
        agenda
    }

    fn mirror(&mut self) {
        let (cluster, now) = (self.cluster.clone(), Timestamp::now());
        let mut orphans = self.guests.mirror(&cluster, &self.driven, now);
        orphans.append(&mut self.reboots.mirror(&cluster, &self.driven, now));
        orphans.append(&mut self.node_updates.mirror(&cluster, &self.driven, now));
        let is_complete =
            self.guests.is_complete() && self.reboots.is_complete() && self.node_updates.is_complete();
        if is_complete {
            cluster.set_orphans(orphans);
        }
        for guest in cluster.released().all() {
            if self.guests.has(&guest.key(), &guest.uid()) == Some(false)
                && let Err(error) = cluster.released().forget(&guest.uid())
            {
                tracing::error!(guest = %guest.key(), %error, "the record of a deleted guest stays");
            }
        }
    }

    /// Takes in what became of a write.
    pub fn settle(&mut self, tag: Tag, key: &Key, answer: &Answer, object: Option<DynamicObject>) {
        let trouble = match tag {
            Tag::Guest => self.guests.settle(key, answer, object),
            Tag::Reboot => self.reboots.settle(key, answer, object),
            Tag::NodeUpdate => self.node_updates.settle(key, answer, object),
            Tag::Host => self.host.settle(answer, object),
        };
        if let Some(trouble) = trouble {
            tracing::error!(kind = ?tag, %key, "the status could not be reported, it is tried again: {trouble}");
        }
    }

    /// A write was not answered.
    pub fn unanswered(&mut self, tag: Tag, key: &Key) {
        match tag {
            Tag::Guest => self.guests.unanswered(key),
            Tag::Reboot => self.reboots.unanswered(key),
            Tag::NodeUpdate => self.node_updates.unanswered(key),
            Tag::Host => self.host.writing = false,
        }
    }

    /// Forgets what concerns objects that are gone.
    pub fn tidy(&mut self) {
        self.guests.tidy();
        self.reboots.tidy();
        self.node_updates.tidy();
    }

    /// Whether the Host was deleted behind our back: it is made anew.
    pub fn lacks_host(&self) -> bool {
        self.host.there.is_none()
    }
}

impl HostDesk {
    fn due(&mut self, cluster: &Cluster, pace: Option<Duration>, now: Instant, agenda: &mut Agenda) {
        let key = Key::new("", cluster.node_name());
        let Some(there) = self.there.as_ref().filter(|_| !self.writing) else {
            return;
        };
        let local = match cluster.store().get::<Host>(&key) {
            Ok(local) => local,
            Err(error) => {
                tracing::error!(%error, "the Host cannot be reported");
                return;
            }
        };
        let Some(status) = local.and_then(|host| host.status) else {
            return;
        };
        let value = |status| serde_json::to_value(status).unwrap_or_default();
        let (wanted, known) = (value(Some(&status)), value(there.status.as_ref()));
        let claim = reports::claim(&there.metadata, "observedGeneration");
        let due = reports::due(
            &wanted,
            &known,
            claim,
            &self.attempts,
            pace.unwrap_or(HEARTBEAT),
            now,
        );
        if !agenda.is_now(due) {
            return;
        }
        self.writing = true;
        let target = Target {
            api_version: understudy_api::API_VERSION,
            kind: Host::KIND.name(),
            meta: &there.metadata,
        };
        agenda.jobs.push(Job {
            tag: Tag::Host,
            key,
            write: reports::write(target, wanted, claim.forces(), false),
            event: None,
        });
    }

    fn settle(&mut self, answer: &Answer, object: Option<DynamicObject>) -> Option<String> {
        self.writing = false;
        match object.map(|object| object.try_parse::<Host>()) {
            Some(Ok(host)) => self.there = Some(host),
            Some(Err(error)) => tracing::error!(%error, "the Host is not understood"),
            None if *answer == Answer::Gone => self.there = None,
            None => {}
        }
        self.attempts.take(answer, Instant::now())
    }
}
