//! Our CRDs at a real API server: columns, explanations, selectors, waiting.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use understudy_api::crd::Kind;

use understudy_tests::bed::{repository, wait_until};
use understudy_tests::cluster::Context;

use crate::samples::{full_status, good};

/// `guests`, as kubectl's user says it.
fn plural(kind: Kind) -> &'static str {
    kind.crd()["spec"]["names"]["plural"].as_str().unwrap_or_default()
}

/// Makes an object of the kind and, where there is one, writes its status.
fn make(context: &Context, kind: Kind, name: &str, status: Option<Value>) -> Result<Value> {
    let mut object = good(kind, name);
    context.kubectl_with(&["apply", "--server-side", "-f", "-"], &object.to_string())?;
    if let Some(status) = status {
        object["status"] = status;
        context.kubectl_with(
            &["apply", "--server-side", "--subresource=status", "-f", "-"],
            &object.to_string(),
        )?;
    }
    let text = context.kubectl(&["get", plural(kind), name, "--output=json"])?;
    serde_json::from_str(&text).context("kubectl printed no JSON")
}

pub fn our_crds_are_established(context: &Context) -> Result<()> {
    for kind in Kind::ALL {
        let name = kind.file_name().replace(".yaml", "");
        let crd = context.plane.get(&["crd", &name])?;
        let conditions = crd["status"]["conditions"].as_array().context("no conditions")?;
        let holds = |wanted: &str| {
            conditions
                .iter()
                .any(|c| c["type"] == wanted && c["status"] == "True")
        };
        ensure!(
            holds("Established") && holds("NamesAccepted"),
            "{name}: {conditions:?}"
        );
        // What is not structural is served, and neither pruned nor explained.
        ensure!(!holds("NonStructuralSchema"), "{name}: {conditions:?}");
    }
    let listed = context
        .plane
        .kubectl(&["api-resources", "--categories=understudy", "--output=name"])?;
    ensure!(
        listed.lines().count() == Kind::ALL.len(),
        "the category lists\n{listed}"
    );
    // Applying them again, as every upgrade of the chart does, is a matter of no change.
    context.plane.apply_crds()
}

pub fn the_examples_apply(context: &Context) -> Result<()> {
    let folder = repository().join("examples").display().to_string();
    for attempt in ["first", "second"] {
        let said = context.kubectl(&["apply", "--server-side", "-f", &folder])?;
        ensure!(said.lines().count() >= 3, "the {attempt} time:\n{said}");
    }
    context.kubectl(&["delete", "--wait=true", "-f", &folder])?;
    Ok(())
}

pub fn every_column_shows_what_the_status_says(context: &Context) -> Result<()> {
    for kind in Kind::ALL {
        let columns = kind.crd()["spec"]["versions"][0]["additionalPrinterColumns"]
            .as_array()
            .with_context(|| format!("{} has no columns", kind.name()))?;
        let path = |column: &Value| column["jsonPath"].as_str().unwrap_or_default().to_owned();
        let mut conditions: Vec<String> = columns.iter().filter_map(|c| condition_of(&path(c))).collect();
        conditions.dedup();
        let object = make(context, kind, "columns", Some(full_status(kind, &conditions)))?;
        for wide in [false, true] {
            let mut arguments = vec!["get", plural(kind), "columns"];
            arguments.extend(wide.then_some("--output=wide"));
            let table = context.kubectl(&arguments)?;
            let shown = columns
                .iter()
                .filter(|c| wide || c["priority"].as_u64().unwrap_or(0) == 0);
            let expected: Vec<(String, String)> = shown
                .map(|column| {
                    let name = column["name"].as_str().unwrap_or_default().to_uppercase();
                    (name, value_at(&object, &path(column)))
                })
                .collect();
            check_table(&table, &expected).with_context(|| format!("{}\n{table}", kind.name()))?;
        }
    }
    Ok(())
}

/// The type of the condition that a column shows.
fn condition_of(path: &str) -> Option<String> {
    let (_, rest) = path.split_once("[?(@.type==\"")?;
    Some(rest.split_once('"')?.0.to_owned())
}

/// What a column with this path shows of an object: fields, and one condition by its type.
fn value_at(object: &Value, path: &str) -> String {
    let field = |value: &Value, path: &str| {
        let pointer = path.replace('.', "/");
        value.pointer(&pointer).cloned().unwrap_or_default()
    };
    let value = match (condition_of(path), path.split_once(")]")) {
        (Some(wanted), Some((_, rest))) => {
            let conditions = object["status"]["conditions"].as_array();
            let condition = conditions
                .into_iter()
                .flatten()
                .find(|c| c["type"] == wanted.as_str());
            field(condition.unwrap_or(&Value::Null), rest)
        }
        _ => field(object, path),
    };
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

/// One line of headers, one of values; an age is any, the others are what is expected.
fn check_table(table: &str, expected: &[(String, String)]) -> Result<()> {
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let [headers, values] = lines.as_slice() else {
        bail!("not two lines");
    };
    let names: Vec<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(
        headers[0] == "NAME" && headers[1..] == names,
        "the headers are not {names:?}"
    );
    ensure!(values.len() == headers.len(), "a value is missing");
    for ((name, value), shown) in expected.iter().zip(&values[1..]) {
        if name == "AGE" {
            ensure!(shown.ends_with('s') || shown.ends_with('m'), "{name} is {shown}");
        } else {
            ensure!(
                value == shown && value != "null",
                "{name} is {shown}, not {value}"
            );
        }
    }
    Ok(())
}

pub fn objects_are_found_by_their_node(context: &Context) -> Result<()> {
    for (kind, field) in [
        (Kind::Guest, "status.nodeName"),
        (Kind::SeamlessReboot, "status.nodeName"),
        (Kind::NodeUpdate, "spec.nodeName"),
    ] {
        for node in ["selected-a", "selected-b"] {
            let mut object = good(kind, &format!("on-{node}"));
            object["spec"]["nodeName"] = json!(node);
            if kind == Kind::SeamlessReboot {
                object["spec"] = json!({"guestName": "web"});
            }
            context.kubectl_with(&["create", "-f", "-"], &object.to_string())?;
            if field.starts_with("status") {
                let patch = json!({"status": {"nodeName": node}}).to_string();
                let name = format!("on-{node}");
                context.kubectl(&[
                    "patch",
                    plural(kind),
                    &name,
                    "--type=merge",
                    "--subresource=status",
                    "-p",
                    &patch,
                ])?;
            }
        }
        let selector = format!("--field-selector={field}=selected-b");
        let found = context.kubectl(&["get", plural(kind), &selector, "--output=name"])?;
        let names: Vec<&str> = found
            .lines()
            .filter_map(|line| Some(line.split_once('/')?.1))
            .collect();
        ensure!(
            names == ["on-selected-b"],
            "{} by {field}: {names:?}",
            kind.name()
        );
    }
    Ok(())
}

pub fn wait_returns_when_the_reboot_is_complete(context: &Context) -> Result<()> {
    let kind = Kind::SeamlessReboot;
    make(
        context,
        kind,
        "waited-for",
        Some(json!({"observedGeneration": 1, "phase": "Cloning"})),
    )?;
    let resource = format!("{}/waited-for", plural(kind));
    let mut wait = context.plane.kubectl_command()?;
    wait.args([
        "--namespace",
        &context.namespace,
        "wait",
        "--for=condition=Complete",
        "--timeout=60s",
        &resource,
    ]);
    let mut waiting = wait
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run kubectl wait")?;
    let early = context.kubectl(&["wait", "--for=condition=Complete", "--timeout=1s", &resource]);
    ensure!(early.is_err(), "it is not complete yet");
    ensure!(waiting.try_wait()?.is_none(), "kubectl wait has not waited");
    let status = json!({
        "observedGeneration": 1, "phase": "Succeeded",
        "conditions": [{
            "type": "Complete", "status": "True", "reason": "Succeeded", "message": "done",
            "lastTransitionTime": "2026-11-22T18:00:00Z", "observedGeneration": 1,
        }],
    });
    make(context, kind, "waited-for", Some(status))?;
    let ended = wait_until(
        "kubectl wait to return",
        Duration::from_secs(30),
        Duration::from_millis(50),
        || Ok(waiting.try_wait()?),
    );
    if ended.is_err() {
        waiting.kill()?;
        waiting.wait()?;
    }
    ensure!(ended?.success(), "kubectl wait failed");
    Ok(())
}

pub fn explain_describes_every_field(context: &Context) -> Result<()> {
    let mut told = 0;
    for kind in Kind::ALL {
        let mut objects = Vec::new();
        for part in ["spec", "status"] {
            let path = format!("{}.{part}", plural(kind));
            collect(&kind.schema()["properties"][part], &path, &mut objects);
        }
        for (path, fields) in objects {
            let text = context.plane.kubectl(&["explain", &path])?;
            let bare: Vec<&String> = fields.iter().filter(|name| !is_described(&text, name)).collect();
            ensure!(bare.is_empty(), "{path}: nothing is said of {bare:?}\n{text}");
            told += fields.len();
        }
    }
    context.say(&format!("{told} fields"));
    Ok(())
}

/// Every object within a schema that has fields, with their names.
fn collect(schema: &Value, path: &str, found: &mut Vec<(String, Vec<String>)>) {
    if schema["type"] == "array" {
        return collect(&schema["items"], path, found);
    }
    let Some(properties) = schema["properties"].as_object().filter(|p| !p.is_empty()) else {
        return;
    };
    found.push((path.to_owned(), properties.keys().cloned().collect()));
    for (name, field) in properties {
        collect(field, &format!("{path}.{name}"), found);
    }
}

/// A field is a line `  name<TAB><type>`, and what is said of it are the indented lines that follow.
fn is_described(text: &str, field: &str) -> bool {
    let mut lines = text.lines();
    let found = lines.any(|line| {
        line.strip_prefix("  ")
            .and_then(|line| line.split_once('\t'))
            .is_some_and(|(name, _)| name == field)
    });
    let said = lines
        .take_while(|line| line.starts_with("    "))
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("enum:") && !line.starts_with("Possible enum"));
    found && said.is_some_and(|said| said != "<no description>")
}
