use super::*;
use crate::guest::{DiskRole, RunStrategy};

fn one(text: &str) -> Result<Manifest, ManifestError> {
    let mut all = parse(text).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn example(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

/// The example with one line replaced must be refused with these words.
fn refused(name: &str, line: &str, by: &str, words: &[&str]) {
    let text = example(name);
    assert!(text.contains(line), "{line:?} is not in {name}");
    let error = one(&text.replacen(line, by, 1)).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{by:?}: {error:?} lacks {word:?}");
    }
}

#[test]
fn every_example_is_a_valid_manifest() {
    let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            // Beside ours there are those of Argo CD and Flux.
            if !text.contains("apiVersion: understudy.dev/") {
                continue;
            }
            for manifest in parse(&text).unwrap() {
                manifest.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                seen += 1;
            }
        }
    }
    assert!(seen >= 8, "only {seen}");
}

#[test]
fn a_manifest_gets_the_defaults_that_the_crd_names() {
    let Manifest::Guest(guest) = one(&example("guest.yaml")).unwrap() else {
        panic!("not a guest");
    };
    assert_eq!(guest.metadata.namespace.as_deref(), Some("default"));
    assert_eq!(guest.spec.run_strategy, RunStrategy::Always);
    assert_eq!(guest.spec.disks[0].role, DiskRole::Root);
    assert!(!guest.spec.disks[0].read_only);
    let Manifest::SeamlessReboot(reboot) = one(&example("seamlessreboot.yaml")).unwrap() else {
        panic!("not a reboot");
    };
    let Manifest::HostUpdate(update) = one(&example("hostupdate.yaml")).unwrap() else {
        panic!("not an update of hosts");
    };
    assert_eq!(update.metadata.namespace, None);
    for kind in Kind::ALL {
        let spec = &kind.schema()["properties"]["spec"]["properties"];
        let there = match kind {
            Kind::Guest => serde_json::to_value(&guest.spec).unwrap(),
            Kind::SeamlessReboot => serde_json::to_value(&reboot.spec).unwrap(),
            Kind::HostUpdate => serde_json::to_value(&update.spec).unwrap(),
            Kind::NodeUpdate | Kind::Host => continue,
        };
        for (name, property) in spec.as_object().unwrap() {
            if !property["default"].is_null() && !example_names(kind).contains(&name.as_str()) {
                assert_eq!(there[name], property["default"], "{name}");
            }
        }
    }
}

/// Fields that the examples set to something else than the default.
fn example_names(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Guest => &["cpus", "networks"],
        Kind::SeamlessReboot => &["services"],
        _ => &["nodeSelector", "reboot", "sessions"],
    }
}

#[test]
fn what_is_wrong_with_a_guest_is_told_by_field() {
    let refused = |line, by, words: &[&str]| refused("guest.yaml", line, by, words);
    refused("name: web", "name: Web", &["metadata.name", "lower-case"]);
    refused("cpus: 2", "cpus: 0", &["spec.cpus", "0", "between 1 and 64"]);
    refused("cpus: 2", "cpus: two", &["spec.cpus", "whole number"]);
    refused(
        "memory: 512Mi",
        "memory: 512MB",
        &["spec.memory", "512MB", "512Mi"],
    );
    refused(
        "memory: 512Mi",
        "memory: 32Mi",
        &["spec.memory", "between 64Mi and 1Ti"],
    );
    refused("memory: 512Mi", "memory: 512", &["spec.memory", "string"]);
    refused("  memory: 512Mi\n", "", &["spec.memory", "required"]);
    refused("  memory: 512Mi\n", "  memory:\n", &["spec.memory", "required"]);
    refused(
        "memory: 512Mi",
        "memroy: 512Mi",
        &["spec.memroy", "not a field", "memory"],
    );
    refused(
        "fromDisk: {}",
        "cmdline: quiet",
        &["spec.boot", "fromDisk: {}", "kernel"],
    );
    refused(
        "fromDisk: {}",
        "fromDisk: {}\n    cmdline: quiet",
        &["spec.boot", "need kernel"],
    );
    refused("role: Root", "role: Data", &["spec.disks", "exactly one", "Root"]);
    refused(
        "role: Root",
        "role: root",
        &["spec.disks[0].role", "one of Root, Data"],
    );
    refused(
        "role: Root",
        "role: Root\n      readOnly: true",
        &["spec.disks[0]", "readOnly"],
    );
    refused(
        "source: web.img",
        "source: ../other/web.img",
        &["spec.disks[0].source", "'..'"],
    );
    refused(
        "source: web.img",
        "source: \"we b\"",
        &["spec.disks[0].source", "web/root.img"],
    );
    refused(
        "source: web.img",
        "source: web.img\n    - name: root\n      role: Data\n      source: b.img",
        &["spec.disks[1].name", "twice"],
    );
    refused(
        "source: web.img",
        "source: web.img\n    - name: data\n      role: Data\n      source: web.img",
        &["spec.disks", "source of its own"],
    );
    refused(
        "bridge: br0",
        "bridge: a-name-that-is-too-long",
        &["spec.networks[0].bridge"],
    );
    refused("mac: 52", "mac: 53", &["spec.networks[0].mac", "unicast"]);
}

#[test]
fn what_is_wrong_with_a_reboot_is_told_by_field() {
    let refused = |line, by, words: &[&str]| refused("seamlessreboot.yaml", line, by, words);
    refused("guestName: web", "guestName: ''", &["spec.guestName"]);
    refused("cron.service", "cron", &["spec.services.hold[0]", "cron.service"]);
    refused(
        "maxPause: 10s",
        "maxPause: 10",
        &["spec.cutover.maxPause", "string"],
    );
    refused(
        "maxPause: 10s",
        "maxPause: ten",
        &["spec.cutover.maxPause", "duration such as"],
    );
    refused(
        "maxPause: 10s",
        "maxPause: 1h",
        &["spec.cutover.maxPause", "between 100ms and 2m"],
    );
    refused(
        "maxPause: 10s",
        "minPause: 10s",
        &["spec.cutover.minPause", "maxPause"],
    );
    refused(
        "retainDormantFor: 10m",
        "retainDormantFor: 10d",
        &["spec.retainDormantFor"],
    );
    refused(
        "retainDormantFor: 10m",
        "expect: {}",
        &["spec.expect", "kernelRelease"],
    );
    refused(
        "retainDormantFor: 10m",
        "expect: {bootedAfter: yesterday}",
        &["spec.expect.bootedAfter", "2026-11-22T18:00:00Z"],
    );
    refused(
        "retainDormantFor: 10m",
        "timeouts: {rebooting: 0s}",
        &["spec.timeouts.rebooting"],
    );
    refused(
        "retainDormantFor: 10m",
        "timeouts: {rebooting: [1s]}",
        &["spec.timeouts.rebooting", "string"],
    );
}

#[test]
fn what_is_wrong_with_an_update_of_hosts_is_told_by_field() {
    let refused = |line, by, words: &[&str]| refused("hostupdate.yaml", line, by, words);
    refused(
        "name: newer-kernel",
        "name: newer-kernel\n  namespace: default",
        &["metadata.namespace", "left out"],
    );
    refused(
        "kubernetes.io/hostname: node-a",
        "kubernetes.io/hostname: 5",
        &[
            "spec.nodeSelector.matchLabels[\"kubernetes.io/hostname\"]",
            "string",
        ],
    );
    refused(
        "matchLabels:",
        "matchLabel:",
        &["spec.nodeSelector.matchLabel", "matchLabels"],
    );
    refused(
        "method: Systemd",
        "method: Kexec",
        &["spec.reboot.method", "one of Systemd, Command"],
    );
    refused(
        "method: Systemd",
        "method: Command",
        &["spec.reboot", "command must be there"],
    );
    refused(
        "timeout: 10m",
        "timeout: 2h",
        &["spec.reboot.timeout", "between 1s and 50m"],
    );
    refused(
        "credentialProvider: systemd-creds",
        "credentialProvider: Key File",
        &["spec.sessions.credentialProvider", "systemd-creds"],
    );
    refused(
        "store: Disk",
        "store: Memory",
        &["spec.sessions.store", "one of Disk"],
    );
    refused(
        "kernelRelease: 6.1.0-50-amd64",
        "kernel: 6.1",
        &["spec.expect.kernel", "kernelRelease"],
    );
}

#[test]
fn what_agents_make_cannot_be_applied() {
    for kind in ["NodeUpdate", "Host"] {
        let text =
            format!("apiVersion: understudy.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{}}\n");
        let error = one(&text).unwrap_err().to_string();
        assert!(
            error.contains(kind) && error.contains("apply a HostUpdate"),
            "{error}"
        );
    }
}

#[test]
fn one_bad_document_does_not_spoil_the_others() {
    let text = format!(
        "{}---\napiVersion: v1\nkind: Pod\n---\n{}",
        example("guest.yaml"),
        example("seamlessreboot.yaml")
    );
    let all = parse(&text).unwrap();
    assert_eq!(all.len(), 3);
    assert!(all[0].is_ok() && all[2].is_ok());
    let error = all[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("document 2") && error.contains("Pod"), "{error}");
}

#[test]
fn text_that_is_no_yaml_is_refused_with_its_place() {
    let error = parse("apiVersion: [").unwrap_err().to_string();
    assert!(error.starts_with("not valid YAML"), "{error}");
    assert!(matches!(
        parse(&" ".repeat(MAX_MANIFEST + 1)),
        Err(ManifestError::TooLarge(_))
    ));
    assert!(parse("").unwrap().is_empty());
}
