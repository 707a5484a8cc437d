//! Every rule of the table at the real API server. For each rule an object is found that breaks this rule alone, by
//! changing a good one; what the server says of it must be the rule's own message, at the rule's own field.

use std::collections::BTreeMap;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use understudy_api::crd::Kind;
use understudy_api::rules::{Check, Rule};
use understudy_api::validation::{FieldError, validate, validate_change};

use understudy_tests::cluster::Context;

use crate::samples::good;

/// Texts that some rule or other refuses.
const TEXTS: &[&str] = &[
    "",
    "a",
    "A",
    "a b",
    "../a",
    "two\nlines",
    "0s",
    "99ms",
    "25h",
    "3h",
    "ten",
    "63Mi",
    "512MB",
    "5G",
    "-a",
    "53:54:00:12:34:56",
    "cron",
    "web.img",
    "node-b",
    "Pending",
    "Rehearse",
    "Root",
    "Data",
    "Systemd",
    "Host",
];

/// One change of an object.
#[derive(Clone, Debug)]
struct Mutation {
    pointer: String,
    /// Absent: the field is removed.
    value: Option<Value>,
}

impl Mutation {
    fn of(&self, base: &Value) -> Value {
        let mut object = base.clone();
        match &self.value {
            Some(value) => {
                if let Some(place) = object.pointer_mut(&self.pointer) {
                    *place = value.clone();
                }
            }
            None => {
                let (parent, field) = self.pointer.rsplit_once('/').unwrap_or_default();
                match object.pointer_mut(parent) {
                    Some(Value::Object(fields)) => drop(fields.remove(field)),
                    Some(Value::Array(items)) => items.retain({
                        let mut index = 0;
                        move |_| {
                            index += 1;
                            field != (index - 1_usize).to_string()
                        }
                    }),
                    _ => {}
                }
            }
        }
        object
    }

    /// The same as a JSON patch.
    fn patch(&self) -> String {
        match &self.value {
            Some(value) => json!([{"op": "replace", "path": self.pointer, "value": value}]),
            None => json!([{"op": "remove", "path": self.pointer}]),
        }
        .to_string()
    }
}

/// Every text at every field, every field removed, and shapes that rules about whole objects refuse.
fn mutations(base: &Value) -> Vec<Mutation> {
    let mut all = vec![Mutation {
        pointer: "/metadata/name".to_owned(),
        value: Some(json!("a".repeat(64))),
    }];
    // Last: where a field has a default, the server fills in what was removed, and nothing has changed.
    let mut removals = Vec::new();
    for part in ["/spec", "/status"] {
        let mut fields = Vec::new();
        pointers(base.pointer(part).unwrap_or(&Value::Null), part, &mut fields);
        for (pointer, value) in fields {
            removals.push(Mutation {
                pointer: pointer.clone(),
                value: None,
            });
            let others: Vec<Value> = match &value {
                Value::String(_) => TEXTS.iter().map(|text| json!(text)).collect(),
                Value::Bool(set) => vec![json!(!set)],
                Value::Array(items) => vec![json!([]), items.iter().chain(items).cloned().collect()],
                Value::Object(_) => vec![
                    json!({}),
                    json!({"fromDisk": {}, "cmdline": "quiet"}),
                    json!({"fromDisk": {}}),
                ],
                _ => Vec::new(),
            };
            let list = if value.is_object() {
                &mut removals
            } else {
                &mut all
            };
            list.extend(others.into_iter().map(|other| Mutation {
                pointer: pointer.clone(),
                value: Some(other),
            }));
        }
    }
    all.append(&mut removals);
    all
}

fn pointers(value: &Value, at: &str, found: &mut Vec<(String, Value)>) {
    let parts: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, field)| (name.clone(), field)).collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(i, item)| (i.to_string(), item))
            .collect(),
        _ => return,
    };
    for (name, part) in parts {
        let pointer = format!("{at}/{name}");
        pointers(part, &pointer, found);
        found.push((pointer, part.clone()));
    }
}

/// `/spec/disks/0/name` is of the rule at `spec.disks[].name`.
fn path_of(pointer: &str) -> String {
    let mut path = String::new();
    for part in pointer.split('/').skip(1) {
        match part.parse::<usize>() {
            Ok(_) => path.push_str("[]"),
            Err(_) if path.is_empty() => path.push_str(part),
            Err(_) => path.push_str(&format!(".{part}")),
        }
    }
    path
}

/// `spec.disks[0].name` is of the rule at `spec.disks[].name`.
fn is_of(error: &FieldError, rule: &Rule) -> bool {
    let mut path = String::new();
    let mut inside = false;
    for letter in error.path.chars() {
        inside = (inside || letter == '[') && letter != ']';
        if !inside || letter == '[' {
            path.push(letter);
        }
    }
    // A rule about the whole object names its field itself.
    error.message == rule.message && (path == rule.path || rule.path.is_empty())
}

/// A mutation for each rule of `kind` that `wanted` picks: one that breaks this rule and nothing else.
fn cases(
    kind: Kind,
    wanted: fn(&Rule) -> bool,
    judge: impl Fn(&Value) -> Vec<FieldError>,
    base: &Value,
) -> Result<Vec<(&'static Rule, Mutation)>> {
    let judged: Vec<(Mutation, Vec<FieldError>)> = mutations(base)
        .into_iter()
        .map(|mutation| {
            let errors = judge(&mutation.of(base));
            (mutation, errors)
        })
        .collect();
    let mut cases = Vec::new();
    for rule in kind.rules().iter().filter(|rule| wanted(rule)) {
        let case = judged
            .iter()
            .find(|(_, errors)| matches!(errors.as_slice(), [error] if is_of(error, rule)));
        let Some((mutation, _)) = case else {
            bail!(
                "no change of the sample of {} breaks the rule {:?} at {:?} alone: add to samples.rs or TEXTS",
                kind.name(),
                rule.message,
                rule.path
            );
        };
        cases.push((rule, mutation.clone()));
    }
    Ok(cases)
}

pub fn every_rule_refuses_in_its_own_words(context: &Context) -> Result<()> {
    for kind in Kind::ALL {
        let base = good(kind, "base");
        ensure!(validate(kind, &base).is_empty(), "{:?}", validate(kind, &base));
        context.kubectl_with(&["create", "--dry-run=server", "-f", "-"], &base.to_string())?;
        let cases = cases(
            kind,
            |rule| matches!(rule.check, Check::Value(_)),
            |object| validate(kind, object),
            &base,
        )?;
        let objects: Vec<Value> = cases
            .iter()
            .enumerate()
            .map(|(index, (_, mutation))| {
                let mut object = mutation.of(&base);
                if mutation.pointer != "/metadata/name" {
                    object["metadata"]["name"] = json!(format!("case-{index}"));
                }
                object
            })
            .collect();
        let refusals = refusals(context, &objects)?;
        for ((rule, mutation), object) in cases.iter().zip(&objects) {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let said = refusals
                .get(name)
                .with_context(|| format!("{mutation:?} was admitted"))?;
            check(rule, said).with_context(|| format!("{}: {mutation:?}", kind.name()))?;
        }
        context.say(&format!("{}: {} rules", kind.name(), cases.len()));
    }
    Ok(())
}

/// The server's words have the rule's message at the rule's field.
fn check(rule: &Rule, said: &str) -> Result<()> {
    let field = rule.path.split("[]").next().unwrap_or_default();
    ensure!(
        said.contains(&rule.message) && said.contains(field),
        "{:?} at {:?} is not what the server says:\n{said}",
        rule.message,
        rule.path
    );
    Ok(())
}

/// What the server says of each object that it refuses, by name. One run of kubectl for all of them.
fn refusals(context: &Context, objects: &[Value]) -> Result<BTreeMap<String, String>> {
    let manifest: Vec<String> = objects.iter().map(Value::to_string).collect();
    let file = context.dir.join("objects.yaml");
    std::fs::write(&file, manifest.join("\n---\n")).context("cannot write the objects")?;
    let mut command = context.plane.kubectl_command()?;
    command.args([
        "--namespace",
        &context.namespace,
        "create",
        "--dry-run=server",
        "-f",
    ]);
    let output = command
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .context("cannot run kubectl")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut refused: BTreeMap<String, String> = BTreeMap::new();
    let mut current = None;
    for line in said.lines() {
        if let Some((before, _)) = line.split_once("\" is invalid") {
            current = before.rsplit_once('"').map(|(_, name)| name.to_owned());
        }
        if let Some(name) = &current {
            let text = refused.entry(name.clone()).or_default();
            text.push_str(line);
            text.push('\n');
        }
    }
    ensure!(
        !refused.is_empty() || objects.is_empty(),
        "kubectl refuses nothing: {said}"
    );
    Ok(refused)
}

pub fn every_rule_about_changes_refuses_in_its_own_words(context: &Context) -> Result<()> {
    for kind in Kind::ALL {
        let base = good(kind, "changed");
        let cases = cases(
            kind,
            |rule| matches!(rule.check, Check::Change(_)),
            |object| validate_change(kind, &base, object),
            &base,
        )?;
        if cases.is_empty() {
            continue;
        }
        context.kubectl_with(&["create", "-f", "-"], &base.to_string())?;
        let status = json!({"status": base["status"]}).to_string();
        let resource = kind.name().to_lowercase();
        let patch = |subresource: &[&str], kind_of: &str, patch: &str| {
            let arguments = ["patch", &resource, "changed", "--type", kind_of, "-p", patch];
            context.kubectl(&[&arguments, subresource].concat())
        };
        patch(&["--subresource=status"], "merge", &status)?;
        for (rule, mutation) in &cases {
            let of_status = mutation.pointer.starts_with("/status");
            let subresource: &[&str] = if of_status { &["--subresource=status"] } else { &[] };
            let Err(refusal) = patch(subresource, "json", &mutation.patch()) else {
                bail!("{}: {mutation:?} was admitted", kind.name());
            };
            check(rule, &format!("{refusal:#}")).with_context(|| format!("{}: {mutation:?}", kind.name()))?;
        }
        // What no rule speaks of may change.
        patch(
            &[],
            "merge",
            &json!({"metadata": {"labels": {"changed": "yes"}}}).to_string(),
        )?;
        context.say(&format!("{}: {} rules", kind.name(), cases.len()));
    }
    Ok(())
}

pub fn too_long_texts_are_refused(context: &Context) -> Result<()> {
    for kind in Kind::ALL {
        let base = good(kind, "long");
        let mut fields = Vec::new();
        pointers(&base["spec"], "/spec", &mut fields);
        let mut objects = Vec::new();
        let mut bounds = Vec::new();
        for rule in kind.rules() {
            let Some(most) = rule.max_length else { continue };
            let sample = fields
                .iter()
                .map(|(pointer, _)| pointer)
                .find(|pointer| path_of(pointer) == rule.path);
            let pointer = sample
                .with_context(|| format!("no sample of {}: {}", kind.name(), rule.path))?
                .clone();
            let length = usize::try_from(most)? + 1;
            let mut object = Mutation {
                pointer,
                value: Some(json!("a".repeat(length))),
            }
            .of(&base);
            object["metadata"]["name"] = json!(format!("long-{}", objects.len()));
            objects.push(object);
            bounds.push((rule.path, most));
        }
        if objects.is_empty() {
            continue;
        }
        let refusals = refusals(context, &objects)?;
        for (index, (path, most)) in bounds.iter().enumerate() {
            let said = refusals
                .get(&format!("long-{index}"))
                .with_context(|| format!("{path} may have any length"))?;
            ensure!(
                said.contains(&format!("may not be more than {most}")),
                "{path}:\n{said}"
            );
        }
    }
    Ok(())
}
