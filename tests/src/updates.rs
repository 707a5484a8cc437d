//! Reboots of the host, as tests and demo ask for them and watch them through the agent's status.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bed::wait_until;
use crate::machine::{Machine, all, condition_message, find};

/// How often a host that reboots is asked.
const POLL: Duration = Duration::from_millis(500);

/// A manifest of a HostUpdate. `command` runs on the host before, `expect` is YAML of the field, such as
/// `kernelRelease: 6.1.0-50-amd64`; where it holds already the host is left alone.
pub fn manifest(name: &str, command: Option<&[&str]>, expect: Option<&str>) -> String {
    let mut text = format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: HostUpdate\nmetadata:\n  name: {name}\nspec:\n  reboot:\n    timeout: 10m\n"
    );
    if let Some(command) = command {
        text.push_str("  update:\n    command:\n");
        for word in command {
            // JSON strings are YAML strings.
            text.push_str(&format!("      - {}\n", Value::from(*word)));
        }
    }
    if let Some(expect) = expect {
        text.push_str(&format!("  expect:\n    {expect}\n"));
    }
    text
}

/// The NodeUpdate of a HostUpdate in what the agent says, the last one that was made.
pub fn of_host_update(status: &Value, name: &str) -> Option<Value> {
    newest(all(status, "NodeUpdate").filter(|object| object["spec"]["hostUpdate"]["name"] == name))
}

/// The NodeUpdate that the host itself began in the boot `boot_id`.
pub fn of_host(status: &Value, boot_id: &str) -> Option<Value> {
    newest(all(status, "NodeUpdate").filter(|object| {
        object["spec"]["origin"] == "Host" && object["status"]["result"]["before"]["bootID"] == boot_id
    }))
}

fn newest<'a>(objects: impl Iterator<Item = &'a Value>) -> Option<Value> {
    objects
        .max_by_key(|object| {
            let created = &object["metadata"]["creationTimestamp"];
            created.as_str().unwrap_or_default().to_owned()
        })
        .cloned()
}

/// Whether nothing follows the phase of a NodeUpdate.
pub fn is_over(update: &Value) -> bool {
    ["Resumed", "Failed", "Aborted"]
        .iter()
        .any(|phase| update["status"]["phase"] == *phase)
}

/// Waits until the NodeUpdate that `of` finds has ended, over reboots; shows each status to `seen`.
pub fn ended(
    machine: &Machine,
    limit: Duration,
    of: impl Fn(&Value) -> Option<Value>,
    mut seen: impl FnMut(&Value),
) -> Result<Value> {
    until(machine, "the NodeUpdate to end", limit, of, |update| {
        seen(&update["status"]);
        is_over(update)
    })
}

/// Waits until the NodeUpdate that `of` finds is as `is_so` asks, over reboots.
pub fn until(
    machine: &Machine,
    what: &str,
    limit: Duration,
    of: impl Fn(&Value) -> Option<Value>,
    mut is_so: impl FnMut(&Value) -> bool,
) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(what, limit, POLL, || {
        let Some(status) = machine.status_if_up()? else {
            return Ok(None);
        };
        if let Some(update) = of(&status) {
            last = update;
            return Ok(is_so(&last).then(|| last.clone()));
        }
        // What the agent did not understand will never begin.
        match status["problems"].as_array().filter(|list| !list.is_empty()) {
            Some(problems) => bail!("the agent refuses a manifest: {}", Value::from(problems.clone())),
            None => Ok(None),
        }
    })
    .with_context(|| format!("it was last {}: {}", explain(&last), last["status"]["result"]))
}

/// The ended update, where every session goes on.
pub fn resumed(update: Value) -> Result<Value> {
    let result = &update["status"]["result"];
    let all_resumed = result["sessions"] == result["resumed"];
    if update["status"]["phase"] != "Resumed" || !all_resumed {
        bail!("the host update is {}: {}", explain(&update), result["guests"]);
    }
    Ok(update)
}

/// Phase, reason and message of an update, for people.
pub fn explain(update: &Value) -> String {
    let text = |field: &str| update["status"][field].as_str().unwrap_or("?").to_owned();
    format!("{}: {}: {}", text("phase"), text("reason"), text("message"))
}

/// What an update says of the session of a guest of the namespace `default`.
pub fn session<'a>(update: &'a Value, guest: &str) -> Result<&'a Value> {
    update["status"]["result"]["guests"]
        .as_array()
        .and_then(|guests| guests.iter().find(|session| session["name"] == guest))
        .with_context(|| format!("the NodeUpdate says nothing of guest {guest}"))
}

/// Waits until a guest is in a phase, over reboots; the object.
pub fn guest_is(machine: &Machine, name: &str, phase: &str, limit: Duration) -> Result<Value> {
    let mut last = String::new();
    wait_until(&format!("guest {name} to be {phase}"), limit, POLL, || {
        let Some(guest) = machine
            .status_if_up()?
            .and_then(|status| find(&status, "Guest", name))
        else {
            return Ok(None);
        };
        let now = &guest["status"]["phase"];
        last = format!("{now}: {}", condition_message(&guest, "Ready"));
        Ok((now == phase).then_some(guest))
    })
    .with_context(|| format!("it was {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status() -> Value {
        let update = |name: &str, origin: &str, created: &str, of: &str, boot: &str| {
            json!({
                "kind": "NodeUpdate",
                "metadata": {"name": name, "creationTimestamp": created},
                "spec": {"origin": origin, "hostUpdate": {"name": of}},
                "status": {"phase": "Resumed", "result": {
                    "before": {"bootID": boot}, "sessions": 1, "resumed": 1, "guests": [{"name": "web"}],
                }},
            })
        };
        json!({"items": [
            update("b", "HostUpdate", "2026-11-22T18:00:02Z", "kernel", "2"),
            update("a", "HostUpdate", "2026-11-22T18:00:01Z", "kernel", "1"),
            update("c", "Host", "2026-11-22T18:00:03Z", "", "3"),
        ]})
    }

    #[test]
    fn the_update_that_is_asked_for_is_found() {
        let name = |update: Option<Value>| update.map(|update| update["metadata"]["name"].clone());
        assert_eq!(name(of_host_update(&status(), "kernel")), Some(json!("b")));
        assert_eq!(name(of_host(&status(), "3")), Some(json!("c")));
        assert_eq!(name(of_host(&status(), "2")), None);
    }

    #[test]
    fn an_update_that_lost_a_session_is_no_success() {
        let mut update = of_host(&status(), "3").unwrap();
        resumed(update.clone()).unwrap();
        assert_eq!(session(&update, "web").unwrap()["name"], "web");
        update["status"]["result"]["resumed"] = json!(0);
        let error = resumed(update).unwrap_err().to_string();
        assert!(error.contains("web"), "{error}");
    }

    #[test]
    fn a_manifest_quotes_what_the_command_needs() {
        let text = manifest(
            "kernel",
            Some(&["sh", "-c", "echo \"a: b\""]),
            Some("kernelRelease: 6.1.0-1"),
        );
        assert!(text.contains("      - \"echo \\\"a: b\\\"\"\n"), "{text}");
        assert!(
            text.ends_with("  expect:\n    kernelRelease: 6.1.0-1\n"),
            "{text}"
        );
    }
}
