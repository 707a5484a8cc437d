//! Objects that satisfy every rule, and statuses with every field.

use serde_json::{Map, Value, json};
use understudy_api::API_VERSION;
use understudy_api::crd::Kind;

/// An object of a kind with every field set that a rule speaks of. A finished one, where the kind has phases: what may
/// not change any more is part of the rules.
pub fn good(kind: Kind, name: &str) -> Value {
    let (spec, status) = match kind {
        Kind::Guest => (
            json!({
                "nodeName": "node-a.example", "cpus": 2, "memory": "512Mi",
                "boot": {"kernel": "vmlinuz", "initrd": "boot/initrd.img", "cmdline": "root=/dev/vda ro"},
                "disks": [
                    {"name": "root", "role": "Root", "source": "web.img", "readOnly": false},
                    {"name": "data", "role": "Data", "source": "/srv/data.img", "readOnly": true},
                ],
                "networks": [{"bridge": "br0", "mac": "52:54:00:12:34:56"}],
            }),
            json!({}),
        ),
        Kind::SeamlessReboot => (
            json!({
                "guestName": "web", "reason": "a newer kernel",
                "expect": {"kernelRelease": "6.1.0-50-cloud-amd64"},
                "services": {"hold": ["cron.service"], "stop": ["db@1.service"]},
                "cutover": {
                    "mode": "Manual", "maxPause": "10s",
                    "window": {"timeZone": "Europe/Berlin", "days": ["Sunday"], "start": "22:00", "end": "04:00"},
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
            }),
            json!({"phase": "Failed"}),
        ),
        Kind::HostUpdate => (
            how_to_update(json!({
                "nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "node-a"}},
                "maxUnavailable": "50%", "maxFailures": 2, "returnTimeout": "30m",
                "window": {"timeZone": "Europe/Berlin", "days": ["Sunday"], "start": "22:00", "end": "04:00"},
                "blockers": [{"name": "backups", "pods": {"namespace": "backup", "matchLabels": {"app": "backup"}}},
                    {"name": "storage", "alerts": {"server": "http://prometheus:9090/p", "names": ["Ceph*"]}}],
                "historyLimit": 5,
            })),
            json!({}),
        ),
        Kind::NodeUpdate => (
            how_to_update(json!({
                "nodeName": "node-a", "origin": "HostUpdate", "reason": "a newer kernel",
                "hostUpdate": {"name": "kernel", "uid": "6f2c", "generation": 1},
            })),
            json!({"phase": "Failed", "credential": {"publicKey": "k",
                "release": {"bootID": "b", "publicKey": "p", "sealedCredential": "s", "count": 1}}}),
        ),
        Kind::Host => (json!({}), json!({})),
    };
    let mut status = status;
    status["observedGeneration"] = json!(1);
    json!({"apiVersion": API_VERSION, "kind": kind.name(), "metadata": {"name": name}, "spec": spec, "status": status})
}

fn how_to_update(mut spec: Value) -> Value {
    spec["update"] = json!({"command": ["/usr/bin/true", ""], "timeout": "30m"});
    spec["expect"] = json!({"kernelRelease": "6.1.0-50-amd64"});
    spec["drain"] = json!({"timeout": "10m"});
    spec["reboot"] = json!({"method": "Command", "command": ["/sbin/reboot"], "timeout": "10m"});
    spec["sessions"] = json!({"store": "Disk", "credentialProvider": "file", "timeout": "1h"});
    spec
}

/// A status with a value in every field that the schema of the kind names, and a condition of each of these types.
pub fn full_status(kind: Kind, conditions: &[String]) -> Value {
    let mut status = any(&kind.schema()["properties"]["status"], "status");
    let condition = status["conditions"][0].clone();
    let all = conditions.iter().map(|name| {
        let mut condition = condition.clone();
        condition["type"] = json!(name);
        condition["status"] = json!("True");
        condition["reason"] = json!(format!("{name}Reason"));
        condition["message"] = json!(format!("{name}-is-so"));
        condition
    });
    status["conditions"] = all.collect();
    status
}

/// Some value that a schema allows.
fn any(schema: &Value, name: &str) -> Value {
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    match schema["type"].as_str() {
        Some("object") => {
            let properties = schema["properties"].as_object();
            let fields = properties.into_iter().flatten();
            Value::Object(
                fields
                    .map(|(name, field)| (name.clone(), any(field, name)))
                    .collect::<Map<_, _>>(),
            )
        }
        Some("array") => json!([any(&schema["items"], name)]),
        Some("integer" | "number") => json!(7),
        Some("boolean") => json!(true),
        _ if schema["format"] == "date-time" => json!("2026-11-22T18:00:00Z"),
        _ => json!(format!("{name}-7")),
    }
}
