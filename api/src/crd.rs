//! The CRDs: schemas from the types, rules from the table, and what neither can say.

use std::sync::LazyLock;

use kube::core::CustomResourceExt;
use serde_json::{Value, json};

use crate::rules::{self, Rule};
use crate::{Guest, Host, HostUpdate, NodeUpdate, SeamlessReboot};

/// A kind of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Guest`].
    Guest,
    /// [`SeamlessReboot`].
    SeamlessReboot,
    /// [`HostUpdate`].
    HostUpdate,
    /// [`NodeUpdate`].
    NodeUpdate,
    /// [`Host`].
    Host,
}

struct Definition {
    rules: Vec<Rule>,
    crd: Value,
}

static GUEST: LazyLock<Definition> = LazyLock::new(|| {
    define(
        rules::guest(),
        &Guest::crd(),
        &[("spec.disks", Some("name")), ("spec.networks", None)],
    )
});
static SEAMLESS_REBOOT: LazyLock<Definition> = LazyLock::new(|| {
    define(
        rules::seamless_reboot(),
        &SeamlessReboot::crd(),
        &[
            ("status.phaseTransitions", None),
            ("spec.cutover.window.days", None),
            ("spec.cutover.readiness", Some("name")),
            ("spec.cutover.readiness[].exec.command", None),
            ("status.result.readiness", Some("name")),
        ],
    )
});
static HOST_UPDATE: LazyLock<Definition> = LazyLock::new(|| {
    define(
        rules::host_update(),
        &HostUpdate::crd(),
        &[
            ("status.nodes", Some("name")),
            ("spec.blockers", Some("name")),
            ("spec.blockers[].alerts.names", None),
            ("spec.window.days", None),
            ("spec.update.command", None),
            ("spec.reboot.command", None),
        ],
    )
});
static NODE_UPDATE: LazyLock<Definition> = LazyLock::new(|| {
    define(
        rules::node_update(),
        &NodeUpdate::crd(),
        &[
            ("status.phaseTransitions", None),
            ("status.result.guests", None),
            ("spec.update.command", None),
            ("spec.reboot.command", None),
        ],
    )
});
static HOST: LazyLock<Definition> = LazyLock::new(|| {
    define(
        rules::host(),
        &Host::crd(),
        &[("status.credentialProviders", Some("name"))],
    )
});

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 5] = [
        Kind::Guest,
        Kind::SeamlessReboot,
        Kind::HostUpdate,
        Kind::NodeUpdate,
        Kind::Host,
    ];

    /// As in `kind:`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Guest => "Guest",
            Kind::SeamlessReboot => "SeamlessReboot",
            Kind::HostUpdate => "HostUpdate",
            Kind::NodeUpdate => "NodeUpdate",
            Kind::Host => "Host",
        }
    }

    /// The kind of this name.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether objects of this kind lie in a namespace; the others belong to the cluster.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Kind::Guest | Kind::SeamlessReboot)
    }

    fn definition(self) -> &'static Definition {
        match self {
            Kind::Guest => &GUEST,
            Kind::SeamlessReboot => &SEAMLESS_REBOOT,
            Kind::HostUpdate => &HOST_UPDATE,
            Kind::NodeUpdate => &NODE_UPDATE,
            Kind::Host => &HOST,
        }
    }

    /// The rules of this kind.
    pub fn rules(self) -> &'static [Rule] {
        &self.definition().rules
    }

    /// The CustomResourceDefinition of this kind.
    pub fn crd(self) -> &'static Value {
        &self.definition().crd
    }

    /// The structural schema of this kind.
    pub fn schema(self) -> &'static Value {
        &self.crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    }

    /// Name of the file in `crds/`: the CRD's own name.
    pub fn file_name(self) -> String {
        format!(
            "{}.yaml",
            self.crd()["metadata"]["name"].as_str().unwrap_or_default()
        )
    }

    /// Content of the file in `crds/`.
    pub fn yaml(self) -> Result<String, serde_saphyr::ser::Error> {
        let body = serde_saphyr::to_string(self.crd())?;
        Ok(format!(
            "# Generated from the types in api/ by `cargo run -p understudy-api --bin crdgen`. Do not edit.\n{body}"
        ))
    }
}

/// Adds to a derived CRD the rules, the bounds, how lists merge, and the status of what nobody has seen.
fn define(rules: Vec<Rule>, derived: &impl serde::Serialize, lists: &[(&str, Option<&str>)]) -> Definition {
    let mut crd = serde_json::to_value(derived).unwrap_or_default();
    let schema = &mut crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    refuse_nulls(schema);
    for rule in &rules {
        let Some(node) = node(schema, rule.path) else {
            continue;
        };
        if let Some(max_length) = rule.max_length {
            node["maxLength"] = json!(max_length);
        }
        let validation = json!({"rule": rule.cel, "message": rule.message});
        match node["x-kubernetes-validations"].as_array_mut() {
            Some(list) => list.push(validation),
            None => node["x-kubernetes-validations"] = json!([validation]),
        }
    }
    for (path, key) in lists.iter().chain(&[("status.conditions", Some("type"))]) {
        let Some(node) = node(schema, path) else {
            continue;
        };
        match key {
            Some(key) => {
                node["x-kubernetes-list-type"] = json!("map");
                node["x-kubernetes-list-map-keys"] = json!([key]);
            }
            None => node["x-kubernetes-list-type"] = json!("atomic"),
        }
    }
    // So that tools that wait read "not seen yet" before the first write of a status.
    if let Some(status) = node(schema, "status") {
        status["default"] = json!({"observedGeneration": -1});
    }
    Definition { rules, crd }
}

/// A field without a value is absent: the API server drops nulls where they are not allowed, and rules
/// need not think of them.
fn refuse_nulls(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            // Our types have no field of this name, so it is the schema's own word wherever it appears.
            fields.remove("nullable");
            fields.values_mut().for_each(refuse_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(refuse_nulls),
        _ => {}
    }
}

/// The schema at a path of a rule.
fn node<'a>(schema: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    let mut node = schema;
    for part in path.split('.').filter(|part| !part.is_empty()) {
        node = node.get_mut("properties")?.get_mut(part.trim_end_matches("[]"))?;
        if part.ends_with("[]") {
            node = node.get_mut("items")?;
        }
    }
    Some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_of_the_table_is_in_its_crd() {
        for kind in Kind::ALL {
            let mut schema = kind.schema().clone();
            for rule in kind.rules() {
                let node = node(&mut schema, rule.path)
                    .unwrap_or_else(|| panic!("{}: no field at {}", kind.name(), rule.path));
                let rules = node["x-kubernetes-validations"].as_array().unwrap();
                assert!(
                    rules.iter().any(|there| there["rule"] == rule.cel.as_str()),
                    "{} at {}",
                    rule.cel,
                    rule.path
                );
            }
        }
    }

    #[test]
    fn every_string_and_list_of_a_spec_is_bounded() {
        fn unbounded(node: &Value, path: &str, found: &mut Vec<String>) {
            match node["type"].as_str() {
                Some("string")
                    if node["enum"].is_null() && node["format"].is_null() && node["maxLength"].is_null() =>
                {
                    found.push(path.to_owned());
                }
                Some("array") => {
                    if node["maxItems"].is_null() {
                        found.push(path.to_owned());
                    }
                    unbounded(&node["items"], &format!("{path}[]"), found);
                }
                _ => {}
            }
            for (name, property) in node["properties"].as_object().into_iter().flatten() {
                unbounded(property, &format!("{path}.{name}"), found);
            }
        }
        for kind in Kind::ALL {
            let mut found = Vec::new();
            unbounded(&kind.schema()["properties"]["spec"], "spec", &mut found);
            assert_eq!(found, Vec::<String>::new(), "{}", kind.name());
        }
    }

    #[test]
    fn crds_in_the_repository_agree_with_the_types() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
        for kind in Kind::ALL {
            let path = folder.join(kind.file_name());
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                there == kind.yaml().unwrap(),
                "{} has drifted from the types: run `cargo run -p understudy-api --bin crdgen`",
                path.display()
            );
        }
    }
}
