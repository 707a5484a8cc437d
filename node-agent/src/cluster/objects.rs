//! Specs and status for the engines of an agent on a cluster. They read and write the store of files as they do
//! stand-alone, so that they go on when the API server is away; what an operator does in a cluster is left to it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use understudy_api::conditions::{self, Wanted, types};
use understudy_api::crd::Kind;
use understudy_api::node_update::Origin;
use understudy_api::{Guest, HostStatus, HostUpdate, HostUpdateStatus, NodeUpdate, SeamlessReboot};

use super::access::Access;
use super::link::{Health, health_path};
use super::released::Released;
use crate::durable::{self, DurableError};
use crate::store::{Key, Mirrored, Object, Objects, Store, StoreError};

/// Most orphans that a message names.
const MAX_NAMED: usize = 10;

/// What runs on a node and is not assigned to it, as `Kind namespace/name`: the agent notes it in its state directory.
pub fn orphans(state_dir: &Path) -> Result<BTreeSet<String>, DurableError> {
    Ok(durable::read_json(&orphans_path(state_dir))?.unwrap_or_default())
}

/// What an object is called among orphans.
pub fn named(kind: Kind, key: &Key) -> String {
    format!("{} {key}", kind.name())
}

fn orphans_path(state_dir: &Path) -> PathBuf {
    state_dir.join("cluster").join("orphans.json")
}

/// The objects of a node of a cluster.
#[derive(Debug)]
pub struct Cluster {
    state_dir: PathBuf,
    store: Store,
    released: Released,
    node: Mutex<(String, String)>,
    orphans: Mutex<BTreeSet<String>>,
}

impl Cluster {
    /// The objects in `store`, which lies beneath `state_dir`, of the node that `access` names.
    pub fn open(store: Store, state_dir: &Path, access: &Access) -> Result<Cluster, StoreError> {
        Ok(Cluster {
            state_dir: state_dir.to_owned(),
            store,
            released: Released::open(state_dir)?,
            node: Mutex::new((access.node_name.clone(), access.node_uid.clone())),
            orphans: Mutex::new(orphans(state_dir)?),
        })
    }

    /// Guests that were deleted here.
    pub fn released(&self) -> &Released {
        &self.released
    }

    /// Name of the node.
    pub fn node_name(&self) -> String {
        lock(&self.node).0.clone()
    }

    /// UID of its Node.
    pub fn node_uid(&self) -> String {
        lock(&self.node).1.clone()
    }

    /// The Node was made anew.
    pub fn set_node_uid(&self, uid: &str) {
        lock(&self.node).1 = uid.to_owned();
        self.store.ring();
    }

    /// What runs here and is not assigned to this node, as `Kind namespace/name`.
    pub fn orphans(&self) -> BTreeSet<String> {
        lock(&self.orphans).clone()
    }

    /// Tells what runs here and is not assigned to this node.
    pub fn set_orphans(&self, orphans: BTreeSet<String>) {
        let mut there = lock(&self.orphans);
        for orphan in orphans.difference(&there) {
            tracing::warn!(
                "{orphan} is not in the API server, or not assigned to this node: it goes on where it runs and is not started where it does not; `understudy-node delete` on this node ends it"
            );
        }
        for orphan in there.difference(&orphans) {
            tracing::info!("{orphan} is no orphan any more");
        }
        if *there != orphans
            && let Err(error) = durable::write_json(&orphans_path(&self.state_dir), &orphans)
        {
            tracing::error!(%error, "what is not assigned to this node could not be noted");
        }
        if *there != orphans {
            *there = orphans;
            // A guest that is assigned again is not parked any more.
            self.store.ring();
        }
    }

    fn write_host(&self, status: &mut HostStatus, now: Timestamp) {
        status.node_uid = Some(self.node_uid());
        let orphans = self.orphans();
        let named: Vec<&str> = orphans.iter().take(MAX_NAMED).map(String::as_str).collect();
        let more = match orphans.len().saturating_sub(MAX_NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = match orphans.is_empty() {
            true => String::new(),
            false => format!(
                "{}{more}: not in the API server, or not assigned to this node; what runs goes on, what does not is not started, until `understudy-node delete` on the node ends it",
                named.join(", ")
            ),
        };
        let wanted = Wanted {
            kind: types::ORPHANS,
            status: Some(!orphans.is_empty()),
            reason: if orphans.is_empty() { "None" } else { "NotAssigned" },
            message: &message,
        };
        conditions::set(&mut status.conditions, 1, now, &[wanted]);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Objects for Cluster {
    fn store(&self) -> &Store {
        &self.store
    }

    fn stands_alone(&self) -> bool {
        false
    }

    fn is_assigned(&self, guest: &Key) -> bool {
        !lock(&self.orphans).contains(&named(Guest::KIND, guest))
    }

    fn away(&self) -> Option<String> {
        let path = health_path(&self.state_dir);
        let health = durable::read_json::<Health>(&path).ok()??;
        let why = health.message.unwrap_or_default();
        (!health.connected).then(|| format!("the API server {} does not answer: {why}", health.server))
    }

    /// The record that it was released is durable before the object goes: in between, the guest is deleted again,
    /// which finds nothing.
    fn guest_gone(&self, key: &Key, uid: &str) -> Result<(), StoreError> {
        if let Some(guest) = self.store.guest(key)?.filter(|guest| guest.uid() == uid) {
            self.released.put(&guest, Timestamp::now())?;
        }
        self.store.mirror::<Guest>(key, |there| match there {
            Some(guest) if guest.uid() == uid => Mirrored::Gone,
            _ => Mirrored::Unchanged,
        })?;
        Ok(())
    }

    /// The operator removes it; the local one goes when it is gone.
    fn reboot_gone(&self, _: &Key, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    /// The operator makes it: the guest's status asks for it.
    fn make_reboot(&self, _: &SeamlessReboot) -> Result<(), StoreError> {
        Ok(())
    }

    /// Roll-outs are the operator's; an agent sees its own NodeUpdates only.
    fn host_updates(&self) -> Vec<HostUpdate> {
        Vec::new()
    }

    fn host_update(&self, _: &str) -> Result<Option<HostUpdate>, StoreError> {
        Ok(None)
    }

    /// Only for a reboot that the host has begun: it waits for nobody.
    fn make_node_update(&self, update: &NodeUpdate) -> Result<Option<NodeUpdate>, StoreError> {
        match update.spec.origin {
            Origin::Host => self.store.make_node_update(update),
            Origin::HostUpdate => Ok(None),
        }
    }

    fn report_host_update(
        &self,
        _: &str,
        _: &str,
        _: &mut dyn FnMut(&mut HostUpdateStatus),
    ) -> Result<(), StoreError> {
        Ok(())
    }

    fn report_host(&self, name: &str, change: &mut dyn FnMut(&mut HostStatus)) -> Result<(), StoreError> {
        self.store.report_host(name, &mut |status| {
            change(status);
            self.write_host(status, Timestamp::now());
        })
    }

    fn host_update_gone(&self, _: &str, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    /// Of those that the host began, the outdated go here, whoever has seen them.
    fn node_update_gone(&self, name: &str, uid: &str) -> Result<(), StoreError> {
        self.store
            .mirror::<NodeUpdate>(&Key::new("", name), |there| match there {
                Some(update) if update.uid() == uid && update.spec.origin == Origin::Host => Mirrored::Gone,
                _ => Mirrored::Unchanged,
            })?;
        Ok(())
    }
}

#[cfg(test)]
#[path = "objects_test.rs"]
mod tests;
