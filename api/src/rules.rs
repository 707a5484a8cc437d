//! The rules of manifests: one table, from which the CRDs get their CEL expressions and by which the
//! node agent without a cluster checks manifests itself.
//!
//! What a JSON schema can say (types, required fields, enumerations, numeric ranges) is said by the types;
//! the table holds the rest, and the bounds that keep CEL cheap.

use regex_lite::Regex;
use serde_json::Value;

use crate::{duration, quantity};

/// One rule: the same statement as CEL and as a function.
pub struct Rule {
    /// Where it holds: `spec.disks[].name`; empty for the whole object.
    pub path: &'static str,
    /// CEL expression over `self` (and `oldSelf`, for a rule about changes).
    pub cel: String,
    /// What a value must be, written so that it follows the field's path: "must be …".
    pub message: String,
    /// The same in Rust.
    pub check: Check,
    /// Longest string at this path, where it is one.
    pub max_length: Option<u64>,
}

/// A rule as a function.
pub enum Check {
    /// Holds of every value.
    Value(Box<dyn Fn(&Value) -> bool + Send + Sync>),
    /// Holds of every change: old value, new value.
    Change(fn(&Value, &Value) -> bool),
}

const DNS_LABELS: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
const DURATION: &str = "^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$";
const MEMORY: &str = "^[1-9][0-9]{0,6}(Mi|Gi|Ti)$";
const FILE: &str = "^/?[A-Za-z0-9._@+=,:-]+(/[A-Za-z0-9._@+=,:-]+)*$";
const INTERFACE: &str = "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}$";
const MAC: &str = "^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$";
const UNIT: &str = "^[A-Za-z0-9:_.@-]+[.](service|socket|timer|path)$";
const TIME: &str = "^([01][0-9]|2[0-3]):[0-5][0-9]$";
const TIME_ZONE: &str = "^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*$";
const URL: &str = "^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*/?$";
const HTTP_PATH: &str = "^/[!-~]*$";
const RELEASE: &str = "^[A-Za-z0-9][A-Za-z0-9._+~-]*$";

/// Rules of a `Guest`.
pub fn guest() -> Vec<Rule> {
    let mut rules = vec![
        name_of_object(),
        matches(
            "spec.nodeName",
            DNS_LABELS,
            253,
            "must be the name of a node: lower-case letters, digits, '-' and '.'",
        ),
        change(
            "spec",
            "!has(oldSelf.nodeName) || (has(self.nodeName) && self.nodeName == oldSelf.nodeName)",
            |old, new| old.get("nodeName").is_none() || old.get("nodeName") == new.get("nodeName"),
            "nodeName cannot be changed or removed: the guest's disks are on that node",
        ),
        change(
            "spec.disks",
            "self == oldSelf",
            |old, new| old == new,
            "cannot be changed: delete the Guest (its disks are kept unless deletionPolicy is Delete) and apply it anew",
        ),
        change(
            "spec.networks",
            "self == oldSelf",
            |old, new| old == new,
            "cannot be changed: delete the Guest (its disks are kept unless deletionPolicy is Delete) and apply it anew",
        ),
        matches(
            "spec.memory",
            MEMORY,
            10,
            "must be whole mebibytes or more, such as 512Mi or 2Gi",
        ),
        value(
            "spec.memory",
            "!self.matches('^[1-9][0-9]{0,6}(Mi|Gi|Ti)$') || (quantity(self).compareTo(quantity('64Mi')) >= 0 && quantity(self).compareTo(quantity('1Ti')) <= 0)",
            |memory| {
                memory
                    .as_str()
                    .and_then(quantity::mebibytes)
                    .is_none_or(|mib| (64..=1 << 20).contains(&mib))
            },
            "must be between 64Mi and 1Ti",
        ),
        value(
            "spec.boot",
            "has(self.fromDisk) != has(self.kernel)",
            |boot| has(boot, "fromDisk") != has(boot, "kernel"),
            "must have either fromDisk: {} (the kernel that the guest's own disk names) or kernel, with its initrd and cmdline",
        ),
        value(
            "spec.boot",
            "has(self.kernel) || (!has(self.initrd) && !has(self.cmdline))",
            |boot| has(boot, "kernel") || !(has(boot, "initrd") || has(boot, "cmdline")),
            "initrd and cmdline need kernel; with fromDisk both are found on the disk",
        ),
        text("spec.boot.cmdline", 2047),
        value(
            "spec.disks",
            "self.exists_one(d, d.role == 'Root')",
            |disks| list(disks).filter(|d| d["role"] == "Root").count() == 1,
            "must have exactly one disk whose role is Root",
        ),
        value(
            "spec.disks",
            "self.all(a, self.exists_one(b, b.source == a.source))",
            |disks| list(disks).all(|a| list(disks).filter(|b| b["source"] == a["source"]).count() == 1),
            "must have a source of its own for each disk",
        ),
        value(
            "spec.disks[]",
            "self.role != 'Root' || !has(self.readOnly) || !self.readOnly",
            |disk| disk["role"] != "Root" || disk["readOnly"] != true,
            "readOnly must be false for the Root disk",
        ),
        matches(
            "spec.disks[].name",
            DNS_LABEL,
            20,
            "must be lower-case letters, digits and '-', such as root",
        ),
        matches(
            "spec.networks[].bridge",
            INTERFACE,
            15,
            "must be the name of a bridge on the node, such as br0: at most 15 letters, digits, '-', '_' and '.'",
        ),
        matches(
            "spec.networks[].mac",
            MAC,
            17,
            "must be a unicast MAC address in lower case, such as 52:54:00:12:34:56 (the second digit is even)",
        ),
    ];
    for path in ["spec.boot.kernel", "spec.boot.initrd", "spec.disks[].source"] {
        rules.push(matches(
            path,
            FILE,
            1024,
            "must be a file's name beneath the node's directory for the namespace, such as web/root.img, or an absolute path",
        ));
        rules.push(value(
            path,
            "!self.split('/').exists(part, part == '.' || part == '..')",
            |file| !str(file).split('/').any(|part| part == "." || part == ".."),
            "must not lead through '.' or '..'",
        ));
    }
    rules
}

/// Rules of a `SeamlessReboot`.
pub fn seamless_reboot() -> Vec<Rule> {
    let mut rules = vec![
        name_of_object(),
        all_but_action_stays(),
        change(
            "status",
            "!has(oldSelf.phase) || !(oldSelf.phase in ['Succeeded', 'RolledBack', 'Failed', 'Aborted']) || (has(self.phase) && (self.phase == oldSelf.phase || (oldSelf.phase == 'Succeeded' && self.phase == 'RolledBack')))",
            |old, new| {
                !["Succeeded", "RolledBack", "Failed", "Aborted"].contains(&str(&old["phase"]))
                    || old["phase"] == new["phase"]
                    || (old["phase"] == "Succeeded" && new["phase"] == "RolledBack")
            },
            "phase cannot be changed any more: the reboot is finished",
        ),
        value(
            "spec.action",
            "has(self.changes) == (self.type == 'Rollback')",
            |action| has(action, "changes") == (action["type"] == "Rollback"),
            "must say 'changes: Discard' for the type Rollback, and only for it: what the guest has changed since the cutover is lost by it",
        ),
        value(
            "spec.cutover",
            "!has(self.window) || !has(self.mode) || self.mode != 'Rehearse'",
            |cutover| !has(cutover, "window") || cutover["mode"] != "Rehearse",
            "must not have a window in the mode Rehearse, which cuts over never",
        ),
        matches(
            "spec.guestName",
            DNS_LABELS,
            63,
            "must be the name of a Guest in the same namespace",
        ),
        text("spec.reason", 1024),
    ];
    rules.extend(expectation(
        "must be a kernel release as 'uname -r' prints it, such as 6.1.0-50-cloud-amd64",
    ));
    rules.extend(window(
        "spec.cutover.window.start",
        "spec.cutover.window.end",
        "spec.cutover.window.timeZone",
    ));
    rules.extend(readiness());
    for path in ["spec.services.hold[]", "spec.services.stop[]"] {
        rules.push(matches(
            path,
            UNIT,
            255,
            "must be the name of a unit with its type (service, socket, timer or path), such as cron.service",
        ));
    }
    for (path, least, most) in [
        ("spec.cutover.maxPause", "100ms", "2m"),
        ("spec.retainDormantFor", "0s", "24h"),
        ("spec.timeouts.pending", "1s", "24h"),
        ("spec.timeouts.cloning", "1s", "24h"),
        ("spec.timeouts.rebooting", "1s", "24h"),
        ("spec.timeouts.integrating", "1s", "24h"),
        ("spec.timeouts.awaitingCutover", "1s", "24h"),
    ] {
        rules.push(matches(
            path,
            DURATION,
            32,
            "must be a duration such as 500ms, 30s or 1h30m",
        ));
        rules.push(between(path, least, most));
    }
    rules
}

/// Rules of a `HostUpdate`.
pub fn host_update() -> Vec<Rule> {
    let mut rules = vec![value(
        "",
        "self.metadata.name.size() <= 52",
        |object| str(&object["metadata"]["name"]).len() <= 52,
        "metadata.name must have at most 52 characters: NodeUpdates are named after it",
    )];
    rules.push(value(
        "spec.maxUnavailable",
        "string(self).matches('^([1-9][0-9]{0,3}|([1-9][0-9]?|100)%)$')",
        |most| {
            let text = most.as_str().map_or_else(|| most.to_string(), str::to_owned);
            let (digits, limit) = match text.strip_suffix('%') {
                Some(digits) => (digits, 100),
                None => (text.as_str(), 9999),
            };
            let is_number = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
            is_number
                && digits
                    .parse()
                    .is_ok_and(|number: u32| (1..=limit).contains(&number))
        },
        "must be a number from 1 to 9999, or a part of the nodes from '1%' to '100%'",
    ));
    rules.push(matches(
        "spec.returnTimeout",
        DURATION,
        32,
        "must be a duration such as 500ms, 30s or 1h30m",
    ));
    rules.push(between("spec.returnTimeout", "1m", "24h"));
    rules.extend(window(
        "spec.window.start",
        "spec.window.end",
        "spec.window.timeZone",
    ));
    rules.push(matches(
        "spec.blockers[].name",
        DNS_LABEL,
        63,
        "must be lower-case letters, digits and '-', such as backups",
    ));
    rules.push(matches(
        "spec.blockers[].pods.namespace",
        DNS_LABEL,
        63,
        "must be the name of a namespace",
    ));
    rules.push(value(
        "spec.blockers[]",
        "has(self.pods) != has(self.alerts)",
        |blocker| has(blocker, "pods") != has(blocker, "alerts"),
        "must have either pods or alerts",
    ));
    rules.push(matches(
        "spec.blockers[].alerts.server",
        URL,
        253,
        "must be the address of a Prometheus server, such as http://prometheus.monitoring:9090",
    ));
    rules.extend(how_to_update());
    rules
}

/// Rules of a `NodeUpdate`.
pub fn node_update() -> Vec<Rule> {
    let mut rules = vec![
        name_of_object(),
        change(
            "spec",
            "self == oldSelf",
            |old, new| old == new,
            "cannot be changed: a NodeUpdate is one reboot of one host",
        ),
        change(
            "status",
            "!has(oldSelf.phase) || !(oldSelf.phase in ['Resumed', 'Failed', 'Aborted']) || (has(self.phase) && self.phase == oldSelf.phase)",
            |old, new| {
                !["Resumed", "Failed", "Aborted"].contains(&str(&old["phase"]))
                    || old["phase"] == new["phase"]
            },
            "phase cannot be changed any more: the update is finished",
        ),
        change(
            "status",
            "!has(oldSelf.credential) || !has(oldSelf.credential.release) || (has(self.credential) && has(self.credential.release) && (self.credential.release.bootID != oldSelf.credential.release.bootID || self.credential.release.publicKey == oldSelf.credential.release.publicKey))",
            |old, new| {
                let (old, new) = (&old["credential"]["release"], &new["credential"]["release"]);
                old.is_null()
                    || !new.is_null()
                        && (old["bootID"] != new["bootID"] || old["publicKey"] == new["publicKey"])
            },
            "credential.release cannot be removed, or given to another key in the same boot: to each boot the credential is released once",
        ),
        matches(
            "spec.nodeName",
            DNS_LABELS,
            253,
            "must be the name of a node: lower-case letters, digits, '-' and '.'",
        ),
        text("spec.reason", 1024),
        matches(
            "spec.hostUpdate.name",
            DNS_LABELS,
            52,
            "must be the name of a HostUpdate",
        ),
        text("spec.hostUpdate.uid", 64),
        value(
            "spec",
            "has(self.hostUpdate) == (self.origin == 'HostUpdate')",
            |spec| has(spec, "hostUpdate") == (spec["origin"] == "HostUpdate"),
            "hostUpdate must be there for the origin HostUpdate, and only for it",
        ),
    ];
    rules.extend(how_to_update());
    rules
}

/// Rules of a `Host`.
pub fn host() -> Vec<Rule> {
    Vec::new()
}

/// What a HostUpdate says of how a node is updated, and its NodeUpdates repeat.
fn how_to_update() -> Vec<Rule> {
    let mut rules = vec![
        value(
            "spec.reboot",
            "has(self.command) == (has(self.method) && self.method == 'Command')",
            |reboot| has(reboot, "command") == (reboot["method"] == "Command"),
            "command must be there for the method Command, and only for it",
        ),
        matches(
            "spec.sessions.credentialProvider",
            DNS_LABEL,
            63,
            "must be the name of a credential provider of the node, such as systemd-creds",
        ),
    ];
    rules.extend(expectation(
        "must be a kernel release as 'uname -r' prints it, such as 6.1.0-50-amd64",
    ));
    for path in ["spec.update.command", "spec.reboot.command"] {
        rules.push(value(
            path,
            "self[0].size() > 0",
            |command| !str(&command[0]).is_empty(),
            "must begin with the program to run",
        ));
    }
    for (path, most) in [
        ("spec.update.timeout", "24h"),
        ("spec.reboot.timeout", "50m"),
        ("spec.sessions.timeout", "24h"),
        ("spec.drain.timeout", "24h"),
    ] {
        rules.push(matches(
            path,
            DURATION,
            32,
            "must be a duration such as 500ms, 30s or 1h30m",
        ));
        rules.push(between(path, "1s", most));
    }
    rules
}

/// Fields of a SeamlessReboot's spec that stay as they were made: all but `action`.
const FIXED: [&str; 9] = [
    "guestName",
    "reason",
    "expect",
    "services",
    "capture",
    "cutover",
    "timeouts",
    "retainDormantFor",
    "ttlSecondsAfterFinished",
];

/// CEL has no word for an object without one of its fields, so that each of the others is named.
fn all_but_action_stays() -> Rule {
    let stays = FIXED.map(|field| {
        format!(
            "has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
        )
    });
    change(
        "spec",
        &stays.join(" && "),
        |old, new| FIXED.iter().all(|field| old.get(field) == new.get(field)),
        "cannot be changed but for its action: a SeamlessReboot runs once; make another one under another name",
    )
}

/// What the probes of a clone may say.
fn readiness() -> [Rule; 4] {
    const KINDS: [&str; 3] = ["httpGet", "tcpSocket", "exec"];
    [
        matches(
            "spec.cutover.readiness[].name",
            DNS_LABEL,
            63,
            "must be lower-case letters, digits and '-', such as page",
        ),
        value(
            "spec.cutover.readiness[]",
            "(has(self.httpGet) ? 1 : 0) + (has(self.tcpSocket) ? 1 : 0) + (has(self.exec) ? 1 : 0) == 1",
            |probe| KINDS.iter().filter(|kind| has(probe, kind)).count() == 1,
            "must have exactly one of httpGet, tcpSocket and exec; make a probe of its own for each question",
        ),
        matches(
            "spec.cutover.readiness[].httpGet.path",
            HTTP_PATH,
            1024,
            "must be a path such as /healthz: it begins with '/', and what is not printable ASCII is percent-encoded",
        ),
        value(
            "spec.cutover.readiness[].exec.command",
            "self[0].size() > 0",
            |command| !str(&command[0]).is_empty(),
            "must begin with the program to run",
        ),
    ]
}

/// What a window may say.
fn window(start: &'static str, end: &'static str, time_zone: &'static str) -> Vec<Rule> {
    let time = |path| matches(path, TIME, 5, "must be a time of day such as 22:00");
    vec![
        time(start),
        time(end),
        matches(
            time_zone,
            TIME_ZONE,
            64,
            "must be the name of a time zone, such as Europe/Berlin",
        ),
    ]
}

/// What `expect` may say.
fn expectation(release: &str) -> [Rule; 2] {
    [
        value(
            "spec.expect",
            "has(self.kernelRelease) || has(self.bootedAfter)",
            |expect| has(expect, "kernelRelease") || has(expect, "bootedAfter"),
            "must say what holds after the reboot: kernelRelease, bootedAfter or both",
        ),
        matches("spec.expect.kernelRelease", RELEASE, 64, release),
    ]
}

/// Guests and reboots name files, units and sockets after themselves.
fn name_of_object() -> Rule {
    value(
        "",
        "self.metadata.name.size() <= 63",
        |object| str(&object["metadata"]["name"]).len() <= 63,
        "metadata.name must have at most 63 characters",
    )
}

fn matches(path: &'static str, pattern: &'static str, max_length: u64, message: &str) -> Rule {
    // The patterns are constants of this file, and a test compiles each of them.
    let regex = Regex::new(pattern).ok();
    Rule {
        path,
        cel: format!("self.matches('{pattern}')"),
        message: message.to_owned(),
        check: Check::Value(Box::new(move |value| {
            regex.as_ref().is_some_and(|regex| regex.is_match(str(value)))
        })),
        max_length: Some(max_length),
    }
}

/// A bounded text of one line.
fn text(path: &'static str, max_length: u64) -> Rule {
    Rule {
        path,
        cel: "!self.contains('\\n')".to_owned(),
        message: "must be one line".to_owned(),
        check: Check::Value(Box::new(|value| !str(value).contains('\n'))),
        max_length: Some(max_length),
    }
}

fn between(path: &'static str, least: &'static str, most: &'static str) -> Rule {
    let bounds = duration::parse(least).zip(duration::parse(most));
    Rule {
        path,
        cel: format!(
            "!self.matches('{DURATION}') || (duration(self) >= duration('{least}') && duration(self) <= duration('{most}'))"
        ),
        message: format!("must be between {least} and {most}"),
        check: Check::Value(Box::new(move |value| {
            match (duration::parse(str(value)), bounds) {
                (Some(duration), Some((least, most))) => (least..=most).contains(&duration),
                // Not a duration: another rule says so.
                _ => true,
            }
        })),
        max_length: None,
    }
}

fn value(path: &'static str, cel: &str, check: fn(&Value) -> bool, message: &str) -> Rule {
    Rule {
        path,
        cel: cel.to_owned(),
        message: message.to_owned(),
        check: Check::Value(Box::new(check)),
        max_length: None,
    }
}

fn change(path: &'static str, cel: &str, check: fn(&Value, &Value) -> bool, message: &str) -> Rule {
    Rule {
        path,
        cel: cel.to_owned(),
        message: message.to_owned(),
        check: Check::Change(check),
        max_length: None,
    }
}

fn has(object: &Value, field: &str) -> bool {
    object.get(field).is_some_and(|value| !value.is_null())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn str(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_reboot_but_its_action_stays() {
        let schema = crate::crd::Kind::SeamlessReboot.schema();
        let fields = schema["properties"]["spec"]["properties"].as_object().unwrap();
        let mut fields: Vec<&str> = fields.keys().map(String::as_str).collect();
        fields.retain(|field| *field != "action");
        let mut fixed = FIXED;
        fixed.sort_unstable();
        fields.sort_unstable();
        assert_eq!(fields, fixed);
    }

    #[test]
    fn every_pattern_compiles_and_needs_no_escape_in_cel() {
        for pattern in [
            DNS_LABELS, DNS_LABEL, DURATION, MEMORY, FILE, INTERFACE, MAC, UNIT, RELEASE, TIME, TIME_ZONE,
            URL, HTTP_PATH,
        ] {
            assert!(Regex::new(pattern).is_ok(), "{pattern}");
            assert!(!pattern.contains(['\\', '\'']), "{pattern}");
        }
    }
}

#[cfg(test)]
#[path = "cel_test.rs"]
mod cel;
