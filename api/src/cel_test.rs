//! Each rule is written twice, as CEL and in Rust. Here both judge the same objects.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::crd::Kind;
use crate::validation::{validate, validate_change};

/// Objects that satisfy every rule, with every field set that a rule speaks of.
fn good(kind: Kind) -> Value {
    match kind {
        Kind::Guest => json!({
            "metadata": {"name": "web"},
            "spec": {
                "nodeName": "node-a.example", "cpus": 2, "memory": "512Mi",
                "boot": {"kernel": "vmlinuz", "initrd": "boot/initrd.img", "cmdline": "root=/dev/vda ro"},
                "disks": [
                    {"name": "root", "role": "Root", "source": "web.img", "readOnly": false},
                    {"name": "data", "role": "Data", "source": "/srv/data.img", "readOnly": true},
                ],
                "networks": [{"bridge": "br0", "mac": "52:54:00:12:34:56"}],
            }
        }),
        Kind::SeamlessReboot => json!({
            "metadata": {"name": "web-1"},
            "spec": {
                "guestName": "web", "reason": "a newer kernel",
                "expect": {"kernelRelease": "6.1.0-50-cloud-amd64"},
                "services": {"hold": ["cron.service"], "stop": ["db@1.service"]},
                "cutover": {
                    "mode": "Manual", "maxPause": "10s",
                    "window": {"timeZone": "Europe/Berlin", "days": ["Friday"], "start": "22:00", "end": "04:00"},
                    "readiness": [
                        {"name": "page", "httpGet": {"path": "/healthz", "port": 80}},
                        {"name": "socket", "tcpSocket": {"port": 7000}, "periodSeconds": 2},
                        {"name": "database", "exec": {"command": ["/usr/bin/pg_isready", ""]}},
                    ],
                },
                "retainDormantFor": "10m", "action": {"type": "Rollback", "changes": "Discard"},
                "timeouts": {
                    "pending": "1m", "cloning": "1m", "rebooting": "1m30s", "integrating": "1h",
                    "awaitingCutover": "8h",
                },
            },
            "status": {"observedGeneration": 1, "phase": "Integrating"},
        }),
        Kind::HostUpdate => json!({
            "metadata": {"name": "kernel"},
            "spec": how_to_update(json!({
                "nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "node-a"}},
                "maxUnavailable": "20%", "returnTimeout": "15m",
                "window": {"timeZone": "Europe/Berlin", "days": ["Friday"], "start": "22:00", "end": "04:00"},
                "blockers": [{"name": "backups", "pods": {"namespace": "backup", "matchLabels": {"app": "backup"}}},
                    {"name": "storage", "alerts": {"server": "http://prometheus:9090", "names": ["Ceph*"]}}],
            })),
        }),
        Kind::NodeUpdate => json!({
            "metadata": {"name": "kernel-5d3a"},
            "spec": how_to_update(json!({
                "nodeName": "node-a", "origin": "HostUpdate", "reason": "a newer kernel",
                "hostUpdate": {"name": "kernel", "uid": "6f2c", "generation": 1},
            })),
            "status": {"observedGeneration": 1, "phase": "Saving", "credential": {"publicKey": "k",
                "release": {"bootID": "b", "publicKey": "p", "sealedCredential": "s", "count": 1}}},
        }),
        Kind::Host => json!({"metadata": {"name": "node-a"}, "spec": {}}),
    }
}

/// A spec with everything that says how a node is updated.
fn how_to_update(mut spec: Value) -> Value {
    spec["update"] = json!({"command": ["/usr/bin/true", ""], "timeout": "30m"});
    spec["expect"] = json!({"kernelRelease": "6.1.0-50-amd64"});
    spec["reboot"] = json!({"method": "Command", "command": ["/sbin/reboot"], "timeout": "10m"});
    spec["drain"] = json!({"mode": "Evict", "timeout": "1h"});
    spec["sessions"] = json!({"store": "Disk", "credentialProvider": "file", "timeout": "1h"});
    spec
}

/// Fields of text that say how a node is updated.
const HOW_TO_UPDATE: [&str; 8] = [
    "/spec/drain/timeout",
    "/spec/update/command/0",
    "/spec/update/timeout",
    "/spec/expect/kernelRelease",
    "/spec/reboot/command/0",
    "/spec/reboot/timeout",
    "/spec/sessions/credentialProvider",
    "/spec/sessions/timeout",
];

/// Values that some rule or other refuses, by JSON pointer.
fn changes(kind: Kind) -> Vec<(&'static str, Value)> {
    let words = [
        "",
        "a",
        "A",
        "a b",
        "-a",
        "a.b",
        "a..b",
        "../a",
        "/etc/passwd",
        "a/./b",
        "a//b",
        "br0",
        "two\nlines",
        "10s",
        "0s",
        "99ms",
        "100ms",
        "2m",
        "2m1s",
        "24h",
        "25h",
        "10",
        "-1s",
        "1.5s",
        "5d",
        "512Mi",
        "63Mi",
        "64Mi",
        "1Ti",
        "2Ti",
        "1024Gi",
        "1025Gi",
        "0512Mi",
        "52:54:00:12:34:56",
        "53:54:00:12:34:56",
        "52:54:00:12:34:5G",
        "cron.service",
        "cron",
        "a.mount",
        "6.1.0-50",
        "22:00",
        "24:00",
        "7:00",
        "ü",
    ];
    let pointers: &[&str] = match kind {
        Kind::Guest => &[
            "/spec/nodeName",
            "/spec/memory",
            "/spec/boot/kernel",
            "/spec/boot/initrd",
            "/spec/boot/cmdline",
            "/spec/disks/0/name",
            "/spec/disks/0/source",
            "/spec/networks/0/bridge",
            "/spec/networks/0/mac",
        ],
        Kind::SeamlessReboot => &[
            "/spec/guestName",
            "/spec/reason",
            "/spec/expect/kernelRelease",
            "/spec/services/hold/0",
            "/spec/services/stop/0",
            "/spec/cutover/maxPause",
            "/spec/retainDormantFor",
            "/spec/timeouts/pending",
            "/spec/timeouts/cloning",
            "/spec/timeouts/rebooting",
            "/spec/timeouts/integrating",
            "/spec/timeouts/awaitingCutover",
            "/spec/cutover/window/timeZone",
            "/spec/cutover/window/start",
            "/spec/cutover/window/end",
            "/spec/cutover/readiness/0/name",
            "/spec/cutover/readiness/0/httpGet/path",
            "/spec/cutover/readiness/2/exec/command/0",
        ],
        Kind::HostUpdate => &[
            "/spec/returnTimeout",
            "/spec/maxUnavailable",
            "/spec/window/timeZone",
            "/spec/window/start",
            "/spec/window/end",
            "/spec/blockers/0/name",
            "/spec/blockers/0/pods/namespace",
            "/spec/blockers/1/alerts/server",
        ],
        Kind::Host => &[],
        Kind::NodeUpdate => &[
            "/spec/nodeName",
            "/spec/reason",
            "/spec/hostUpdate/name",
            "/spec/hostUpdate/uid",
        ],
    };
    let shared: &[&str] = match kind {
        Kind::HostUpdate | Kind::NodeUpdate => &HOW_TO_UPDATE,
        _ => &[],
    };
    let mut changes: Vec<(&str, Value)> = pointers
        .iter()
        .chain(shared)
        .flat_map(|pointer| words.iter().map(|word| (*pointer, json!(word))))
        .collect();
    changes.push(("/metadata/name", json!("a".repeat(64))));
    match kind {
        Kind::Guest => changes.extend([
            ("/spec/boot", json!({})),
            ("/spec/boot", json!({"fromDisk": {}})),
            ("/spec/boot", json!({"fromDisk": {}, "kernel": "k"})),
            ("/spec/boot", json!({"fromDisk": {}, "cmdline": "quiet"})),
            ("/spec/disks/0/role", json!("Data")),
            ("/spec/disks/1/role", json!("Root")),
            ("/spec/disks/0/readOnly", json!(true)),
            ("/spec/disks/1/source", json!("web.img")),
            ("/spec/networks", json!([])),
            ("/spec", {
                let mut spec = good(kind)["spec"].clone();
                spec.as_object_mut().unwrap().remove("nodeName");
                spec
            }),
        ]),
        Kind::SeamlessReboot => changes.extend([
            ("/spec/expect", json!({})),
            ("/spec/expect", json!({"bootedAfter": "2026-11-22T18:00:00Z"})),
            ("/status/phase", json!("Failed")),
            ("/status/phase", json!("Succeeded")),
            ("/status/phase", json!("RolledBack")),
            ("/spec/action", json!({"type": "Proceed"})),
            ("/spec/action", json!({"type": "Rollback"})),
            ("/spec/action", json!({"type": "Abort", "changes": "Discard"})),
            ("/spec/cutover/mode", json!("Rehearse")),
            ("/spec/cutover/readiness/0", json!({"name": "nothing"})),
            (
                "/spec/cutover/readiness/0",
                json!({"name": "both", "tcpSocket": {"port": 1}, "exec": {"command": ["true"]}}),
            ),
            ("/spec/cutover/mode", json!("Automatic")),
            ("/spec/cutover", json!({})),
        ]),
        Kind::HostUpdate => {
            for value in [json!(0), json!(1), json!(9999), json!(10_000), json!(-1)] {
                changes.push(("/spec/maxUnavailable", value));
            }
            for text in ["0%", "1%", "99%", "100%", "101%", "020%", "%", "1 %", "5"] {
                changes.push(("/spec/maxUnavailable", json!(text)));
            }
            let (pods, alerts) = (
                json!({"matchLabels": {"app": "backup"}}),
                json!({"server": "http://prometheus:9090", "names": ["Ceph*"]}),
            );
            changes.push(("/spec/blockers/0", json!({"name": "neither"})));
            changes.push((
                "/spec/blockers/0",
                json!({"name": "both", "pods": pods, "alerts": alerts}),
            ));
        }
        Kind::NodeUpdate => changes.extend([
            ("/status/credential/release/publicKey", json!("another")),
            ("/status/credential/release/bootID", json!("another")),
            ("/status/credential", json!({"publicKey": "k"})),
            ("/spec/origin", json!("Host")),
            ("/status/phase", json!("Failed")),
        ]),
        Kind::Host => {}
    }
    if !shared.is_empty() {
        changes.extend([
            ("/spec/expect", json!({})),
            ("/spec/reboot", json!({})),
            ("/spec/reboot", json!({"method": "Command"})),
            ("/spec/reboot", json!({"command": ["/sbin/reboot"]})),
            ("/spec/reboot/method", json!("Systemd")),
        ]);
    }
    changes
}

/// Messages of the rules that CEL finds broken.
fn by_cel(kind: Kind, new: &Value, old: Option<&Value>) -> BTreeSet<String> {
    kube_cel::validate(kind.schema(), new, old)
        .map_or_else(|errors| errors.into_vec(), |()| Vec::new())
        .iter()
        .map(|error| {
            let kind = &error.kind;
            assert!(
                matches!(kind, kube_cel::ErrorKind::ValidationFailure),
                "{kind:?} at {}: {}: {}",
                error.field_path,
                error.rule,
                error.message
            );
            error.message.clone()
        })
        .collect()
}

/// Messages of the rules that our functions find broken; `None` where the schema alone refuses.
fn by_function(kind: Kind, new: &Value, old: Option<&Value>) -> Option<BTreeSet<String>> {
    let errors = match old {
        Some(old) => validate_change(kind, old, new),
        None => validate(kind, new),
    };
    let rules: BTreeSet<&str> = kind.rules().iter().map(|rule| rule.message.as_str()).collect();
    errors
        .iter()
        .map(|error| {
            rules
                .contains(error.message.as_str())
                .then(|| error.message.clone())
        })
        .collect()
}

#[test]
fn cel_and_rust_refuse_the_same_objects_in_the_same_words() {
    for kind in Kind::ALL {
        let base = good(kind);
        assert_eq!(by_cel(kind, &base, None), BTreeSet::new());
        assert_eq!(by_function(kind, &base, Some(&base)), Some(BTreeSet::new()));
        let mut broken = BTreeSet::new();
        for (pointer, value) in changes(kind) {
            let mut object = base.clone();
            *object.pointer_mut(pointer).unwrap() = value.clone();
            for (new, old) in [(&object, None), (&object, Some(&base)), (&base, Some(&object))] {
                let Some(ours) = by_function(kind, new, old) else {
                    continue;
                };
                let theirs = by_cel(kind, new, old);
                assert_eq!(
                    ours,
                    theirs,
                    "{pointer} = {value}, {}",
                    if old.is_some() { "changed" } else { "new" }
                );
                broken.extend(ours);
            }
        }
        for rule in kind.rules() {
            assert!(
                broken.contains(&rule.message),
                "nothing breaks {:?} at {}",
                rule.message,
                rule.path
            );
        }
    }
}
