//! The chart's folder: what is generated is up to date, and what is written twice says the same.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use understudy_node::config::Config;
use understudy_tests::chart;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn crds_schema_and_table_are_those_of_their_sources() {
    for (path, content) in chart::generated(&root()).unwrap() {
        let there = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == content,
            "{} has drifted from its source: run `make chart`",
            path.display()
        );
    }
    assert_eq!(
        chart::left_over(&root()).unwrap(),
        Vec::<PathBuf>::new(),
        "run `make chart`"
    );
}

#[test]
fn nothing_in_the_values_is_open_but_what_kubernetes_itself_checks() {
    fn open(schema: &Value, path: &str, found: &mut Vec<String>) {
        if schema["type"] == "object" && schema["additionalProperties"] == true {
            found.push(path.to_owned());
        }
        assert!(
            schema["type"] != "object" || !schema["additionalProperties"].is_null(),
            "{path} does not say what else may be there"
        );
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            };
            open(property, &path, found);
        }
    }
    let schema: Value = serde_json::from_str(&text("charts/understudy/values.schema.json")).unwrap();
    let mut found = Vec::new();
    open(&schema, "", &mut found);
    found.sort();
    assert_eq!(
        found,
        [
            "agent.affinity",
            "agent.resources",
            "global",
            "operator.affinity",
            "operator.resources"
        ]
    );
}

#[test]
fn the_chart_has_the_version_of_what_it_installs() {
    let chart = yaml("charts/understudy/Chart.yaml");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_dockerfile_builds_with_the_toolchain_of_the_workspace() {
    let toolchain = text("rust-toolchain.toml");
    let channel = toolchain
        .lines()
        .find_map(|line| line.strip_prefix("channel = "))
        .unwrap()
        .trim_matches('"');
    let version = channel.rsplit_once('.').map_or(channel, |(minor, _)| minor);
    assert!(
        text("images/Dockerfile").contains(&format!("FROM rust:{version}-")),
        "it is not {version}"
    );
    // That file names components which the base image lacks: rustup would fetch them in the middle of the build.
    assert!(
        text(".dockerignore")
            .lines()
            .any(|line| line == "rust-toolchain.toml")
    );
}

/// What the agent's Pod decides itself: where its binaries are, that there are no manifests, how VMMs are kept.
const THE_PODS_OWN: [&str; 4] = ["manifestsDir", "mode", "supervisor", "vmm"];

#[test]
fn the_nodes_configuration_has_the_agents_fields_and_its_defaults() {
    let mut values = yaml("charts/understudy/values.yaml")["agent"]["config"].take();
    let mut defaults = serde_json::to_value(Config::default()).unwrap();
    for field in THE_PODS_OWN {
        defaults.as_object_mut().unwrap().remove(field);
    }
    // The chart's word for nothing.
    assert_eq!(values["credentials"]["keyFile"], "");
    values["credentials"]["keyFile"] = Value::Null;
    assert_eq!(values, defaults);
    // What a namespace may use is a map of its own.
    let policy = json!({"bridges": ["br0"], "paths": ["/dev/vg0"]});
    let schema: Value = serde_json::from_str(&text("charts/understudy/values.schema.json")).unwrap();
    let documented = &schema["properties"]["agent"]["properties"]["config"]["properties"]["namespaces"];
    let fields = documented["additionalProperties"]["properties"]
        .as_object()
        .unwrap();
    let policy_fields = policy.as_object().unwrap();
    assert!(fields.keys().eq(policy_fields.keys()));
    let parsed: understudy_node::config::NamespacePolicy = serde_json::from_value(policy).unwrap();
    assert_eq!(
        serde_json::to_value(parsed).unwrap().as_object().unwrap().len(),
        fields.len()
    );
}
