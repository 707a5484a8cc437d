//! What the state directory holds, read without the agent.

use serde_json::{Value, json};
use understudy_api::{Guest, SeamlessReboot};

use super::Kind;
use crate::config::Config;
use crate::durable;
use crate::store::manifests::problems_file;
use crate::store::{Object, Problem, Store, StoreError};

/// Objects and problems at one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct List {
    pub(super) guests: Vec<Guest>,
    pub(super) reboots: Vec<SeamlessReboot>,
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
        let mut list = List {
            guests: Vec::new(),
            reboots: Vec::new(),
            problems: Vec::new(),
        };
        // Nothing is made by looking: without state there is nothing to show.
        if !config.state_dir.join("objects").is_dir() {
            return Ok(list);
        }
        let store = Store::open(&config.state_dir)?;
        if selection.kind != Some(Kind::Reboot) {
            list.guests = store.list();
            list.guests.retain(|object| selection.takes(object));
        }
        if selection.kind != Some(Kind::Guest) {
            list.reboots = store.list();
            list.reboots.retain(|object| selection.takes(object));
        }
        if selection.kind.is_none() {
            list.problems = durable::read_json(&problems_file(&config.state_dir))?.unwrap_or_default();
        }
        Ok(list)
    }

    /// As `kubectl get -o json` prints a list, and our problems beside.
    pub(super) fn to_json(&self) -> Value {
        let guests = self.guests.iter().map(|object| json!(object));
        let reboots = self.reboots.iter().map(|object| json!(object));
        json!({
            "apiVersion": "v1",
            "kind": "List",
            "items": guests.chain(reboots).collect::<Vec<_>>(),
            "problems": self.problems,
        })
    }

    /// The one object that was asked for by name.
    pub(super) fn only(&self) -> Option<Value> {
        self.guests
            .first()
            .map(|object| json!(object))
            .or_else(|| self.reboots.first().map(|object| json!(object)))
    }
}

impl Selection {
    fn takes<O: Object>(&self, object: &O) -> bool {
        let key = object.key();
        self.namespace
            .as_ref()
            .is_none_or(|there| *there == key.namespace)
            && self.name.as_ref().is_none_or(|there| *there == key.name)
    }
}
