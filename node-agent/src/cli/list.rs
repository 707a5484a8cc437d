//! What the state directory holds, read without the agent.

use serde_json::{Value, json};
use understudy_api::{Guest, Host, HostUpdate, NodeUpdate, SeamlessReboot};

use super::Kind;
use crate::config::Config;
use crate::durable;
use crate::store::manifests::problems_file;
use crate::store::{Object, Problem, Store, StoreError};

/// Objects and problems at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct List {
    pub(super) hosts: Vec<Host>,
    pub(super) guests: Vec<Guest>,
    pub(super) reboots: Vec<SeamlessReboot>,
    pub(super) host_updates: Vec<HostUpdate>,
    pub(super) node_updates: Vec<NodeUpdate>,
    pub(super) problems: Vec<Problem>,
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) namespace: Option<String>,
    pub(super) kind: Option<Kind>,
    pub(super) name: Option<String>,
}

impl List {
    pub(super) fn read(config: &Config, selection: &Selection) -> Result<List, StoreError> {
        let mut list = List::default();
        // Nothing is made by looking: without state there is nothing to show.
        if !config.state_dir.join("objects").is_dir() {
            return Ok(list);
        }
        let store = Store::open(&config.state_dir)?;
        list.hosts = selection.of(&store, Kind::Host);
        list.guests = selection.of(&store, Kind::Guest);
        list.reboots = selection.of(&store, Kind::Reboot);
        list.host_updates = selection.of(&store, Kind::HostUpdate);
        list.node_updates = selection.of(&store, Kind::NodeUpdate);
        if selection.kind.is_none() {
            list.problems = durable::read_json(&problems_file(&config.state_dir))?.unwrap_or_default();
        }
        Ok(list)
    }

    /// As `kubectl get -o json` prints a list, and our problems beside.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "List",
            "items": self.items().collect::<Vec<_>>(),
            "problems": self.problems,
        })
    }

    fn items(&self) -> impl Iterator<Item = Value> {
        let hosts = self.hosts.iter().map(|object| json!(object));
        let guests = self.guests.iter().map(|object| json!(object));
        let reboots = self.reboots.iter().map(|object| json!(object));
        let host_updates = self.host_updates.iter().map(|object| json!(object));
        let node_updates = self.node_updates.iter().map(|object| json!(object));
        hosts
            .chain(guests)
            .chain(reboots)
            .chain(host_updates)
            .chain(node_updates)
    }

    /// The one object that was asked for by name.
    pub(super) fn only(&self) -> Option<Value> {
        self.items().next()
    }
}

impl Selection {
    /// The objects of a kind that are asked for.
    fn of<O: Object>(&self, store: &Store, kind: Kind) -> Vec<O> {
        if self.kind.is_some_and(|wanted| wanted != kind) {
            return Vec::new();
        }
        let mut objects = store.list::<O>();
        objects.retain(|object| self.takes(object));
        objects
    }

    fn takes<O: Object>(&self, object: &O) -> bool {
        let key = object.key();
        self.namespace
            .as_ref()
            .is_none_or(|there| *there == key.namespace || !O::KIND.is_namespaced())
            && self.name.as_ref().is_none_or(|there| *there == key.name)
    }
}
