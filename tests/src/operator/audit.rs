//! What happened at the API server, from its audit log.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::chart::audit::{Used, used_by};

const LOG: &str = "audit.log";

/// Arguments of an API server that keeps its audit log in `dir`.
pub(super) fn arguments(dir: &Path) -> Result<Vec<String>> {
    let policy = dir.join("audit-policy.json");
    // JSON is YAML too.
    let heartbeats = json!({"group": "understudy.dev", "resources": ["hosts/status"]});
    let text = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [
        // Those of agents that are played would be most of the log.
        {"level": "None", "users": ["admin"], "resources": [heartbeats]},
        {"level": "Metadata"},
    ]});
    fs::write(&policy, text.to_string()).with_context(|| format!("cannot write {}", policy.display()))?;
    Ok(vec![
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", dir.join(LOG).display()),
        // In one file.
        "--audit-log-maxsize=2000".to_owned(),
    ])
}

/// An audit log.
pub struct Audit {
    text: String,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who asked.
    pub user: String,
    /// As RBAC names it.
    pub verb: String,
    /// With its subresource, as RBAC names it.
    pub resource: String,
    /// Of the object; empty where there is none.
    pub name: String,
    /// The status of the answer.
    pub code: u64,
}

impl Audit {
    pub(super) fn read(dir: &Path) -> Result<Audit> {
        let path = dir.join(LOG);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Audit { text })
    }

    /// Rights that a user used, and those that it was not given.
    pub fn used_by(&self, user: &str) -> Used {
        used_by(user, &self.text)
    }

    /// What `user` has written, Leases apart: every renewal writes one.
    pub fn writes_of(&self, user: &str) -> Vec<Event> {
        let writes = ["create", "update", "patch", "delete"];
        // Most lines are somebody else's.
        let lines = self.text.lines().filter(|line| line.contains(user));
        lines
            .filter_map(event)
            .filter(|event| {
                event.user == user && writes.contains(&event.verb.as_str()) && event.resource != "leases"
            })
            .collect()
    }
}

fn event(line: &str) -> Option<Event> {
    // The last line may be half written.
    let event: Value = serde_json::from_str(line).ok()?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let object = &event["objectRef"];
    let mut resource = text(&object["resource"]);
    if let Some(subresource) = object["subresource"].as_str() {
        resource = format!("{resource}/{subresource}");
    }
    Some(Event {
        user: text(&event["user"]["username"]),
        verb: text(&event["verb"]),
        resource,
        name: text(&object["name"]),
        code: event["responseStatus"]["code"].as_u64()?,
    })
}
