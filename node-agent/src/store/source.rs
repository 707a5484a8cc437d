//! What the guest manager and the engines need of whoever holds the objects: the stand-alone store, or that
//! which mirrors an API server (`cluster`). They get specs and report status through this and nothing else.

use std::time::Duration;

use jiff::Timestamp;
use understudy_api::{
    Guest, GuestStatus, Host, HostSpec, HostStatus, HostUpdate, HostUpdateStatus, NodeUpdate,
    NodeUpdateStatus, SeamlessReboot, SeamlessRebootStatus,
};

use super::objects::{Key, Object, Store, StoreError};

/// Where specs come from and status goes. Deletion is asked for by a deletion time; an object that is
/// absent asks for nothing.
///
/// All but the first two have defaults for a store that stands alone; an implementor overrides what a cluster's
/// operator does in its place.
pub trait Objects: Send + Sync {
    /// The store that the engines' part lies in.
    fn store(&self) -> &Store;
    /// Whether the objects are nowhere else. Then what an operator does in a cluster is done here: SeamlessReboots
    /// for what guests ask, NodeUpdates for HostUpdates, and the removal of what is over.
    fn stands_alone(&self) -> bool;
    /// Whether a guest that is here is assigned to this node as well. One that is not runs on where it runs, and is
    /// *parked* where it does not: not started by guess, its files untouched.
    fn is_assigned(&self, _guest: &Key) -> bool {
        true
    }

    /// Why whoever assigns objects to this node cannot be asked now; `None` where it can.
    fn away(&self) -> Option<String> {
        None
    }

    /// All guests of this node.
    fn guests(&self) -> Vec<Guest> {
        self.store().list()
    }

    /// One guest.
    fn guest(&self, key: &Key) -> Result<Option<Guest>, StoreError> {
        self.store().get(key)
    }

    /// All reboots of guests of this node.
    fn reboots(&self) -> Vec<SeamlessReboot> {
        self.store().list()
    }

    /// One reboot.
    fn reboot(&self, key: &Key) -> Result<Option<SeamlessReboot>, StoreError> {
        self.store().get(key)
    }

    /// Changes the status of the guest with this UID; `durable` where it must survive a power cut.
    fn report_guest(
        &self,
        key: &Key,
        uid: &str,
        durable: bool,
        change: &mut dyn FnMut(&mut GuestStatus),
    ) -> Result<(), StoreError> {
        self.store().update_status::<Guest>(key, uid, durable, change)
    }

    /// Changes the status of the reboot with this UID.
    fn report_reboot(
        &self,
        key: &Key,
        uid: &str,
        durable: bool,
        change: &mut dyn FnMut(&mut SeamlessRebootStatus),
    ) -> Result<(), StoreError> {
        self.store()
            .update_status::<SeamlessReboot>(key, uid, durable, change)
    }

    /// A guest that was being deleted is gone.
    fn guest_gone(&self, key: &Key, uid: &str) -> Result<(), StoreError> {
        self.store().remove::<Guest>(key, uid)
    }

    /// A reboot that was being deleted, or whose time to live is over, is gone.
    fn reboot_gone(&self, key: &Key, uid: &str) -> Result<(), StoreError> {
        self.store().remove::<SeamlessReboot>(key, uid)
    }

    /// Makes a reboot in a guest's name; nothing where it exists, or where an operator makes it.
    fn make_reboot(&self, reboot: &SeamlessReboot) -> Result<(), StoreError> {
        self.store().apply(reboot, Timestamp::now()).map(drop)
    }

    /// All HostUpdates.
    fn host_updates(&self) -> Vec<HostUpdate> {
        self.store().list()
    }

    /// One HostUpdate.
    fn host_update(&self, name: &str) -> Result<Option<HostUpdate>, StoreError> {
        self.store().get(&Key::new("", name))
    }

    /// All NodeUpdates of this node.
    fn node_updates(&self) -> Vec<NodeUpdate> {
        self.store().list()
    }

    /// One NodeUpdate.
    fn node_update(&self, name: &str) -> Result<Option<NodeUpdate>, StoreError> {
        self.store().get(&Key::new("", name))
    }

    /// Makes a NodeUpdate where there is none of its name; it as it is then.
    fn make_node_update(&self, update: &NodeUpdate) -> Result<Option<NodeUpdate>, StoreError> {
        let key = update.key();
        if self.store().get::<NodeUpdate>(&key)?.is_none() {
            self.store().apply(update, Timestamp::now())?;
        }
        self.store().get(&key)
    }

    /// Changes the status of the HostUpdate with this UID.
    fn report_host_update(
        &self,
        name: &str,
        uid: &str,
        change: &mut dyn FnMut(&mut HostUpdateStatus),
    ) -> Result<(), StoreError> {
        self.store()
            .update_status::<HostUpdate>(&Key::new("", name), uid, true, change)
    }

    /// Changes the status of the NodeUpdate with this UID; `durable` where it must survive a power cut.
    fn report_node_update(
        &self,
        name: &str,
        uid: &str,
        durable: bool,
        change: &mut dyn FnMut(&mut NodeUpdateStatus),
    ) -> Result<(), StoreError> {
        self.store()
            .update_status::<NodeUpdate>(&Key::new("", name), uid, durable, change)
    }

    /// Changes the status of this node's Host, which is made where it is missing.
    fn report_host(&self, name: &str, change: &mut dyn FnMut(&mut HostStatus)) -> Result<(), StoreError> {
        let key = Key::new("", name);
        let host = match self.store().get::<Host>(&key)? {
            Some(host) => host,
            None => {
                self.store()
                    .apply(&Host::new(name, HostSpec {}), Timestamp::now())?;
                match self.store().get::<Host>(&key)? {
                    Some(host) => host,
                    None => return Ok(()),
                }
            }
        };
        self.store()
            .update_status::<Host>(&key, &host.uid(), false, change)
    }

    /// A HostUpdate that was being deleted is gone.
    fn host_update_gone(&self, name: &str, uid: &str) -> Result<(), StoreError> {
        self.store().remove::<HostUpdate>(&Key::new("", name), uid)
    }

    /// A NodeUpdate that was being deleted is gone.
    fn node_update_gone(&self, name: &str, uid: &str) -> Result<(), StoreError> {
        self.store().remove::<NodeUpdate>(&Key::new("", name), uid)
    }

    /// Waits until something may have changed, at most for `limit`; `seen` is what the last call returned.
    fn wait(&self, seen: u64, limit: Duration) -> u64 {
        self.store().wait(seen, limit)
    }

    /// Wakes who waits.
    fn wake(&self) {
        self.store().ring();
    }
}

impl Objects for Store {
    fn store(&self) -> &Store {
        self
    }

    fn stands_alone(&self) -> bool {
        true
    }
}
