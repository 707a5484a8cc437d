//! Whether an apply would change anything: of what is there, and of what is ours.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Map, Value};
use understudy_api::conditions::{self, Wanted};
use understudy_api::managers::{AGENT, OPERATOR};
use understudy_api::{Condition, ObjectMeta};

/// Whether an agent has written this object's status: the claim.
pub fn is_claimed(meta: &ObjectMeta) -> bool {
    meta.managed_fields.iter().flatten().any(|entry| {
        entry.manager.as_deref() == Some(AGENT) && entry.subresource.as_deref() == Some("status")
    })
}

/// What the operator owns by apply: of the status, or of the object itself.
fn owned(meta: &ObjectMeta, subresource: Option<&str>) -> Option<Value> {
    let entry = meta.managed_fields.iter().flatten().find(|entry| {
        entry.manager.as_deref() == Some(OPERATOR)
            && entry.operation.as_deref() == Some("Apply")
            && entry.subresource.as_deref() == subresource
    })?;
    Some(entry.fields_v1.as_ref()?.0.clone())
}

/// Whether the operator owns this field of the status.
pub fn owns(meta: &ObjectMeta, field: &str) -> bool {
    owned(meta, Some("status")).is_some_and(|fields| fields["f:status"].get(format!("f:{field}")).is_some())
}

/// Whether applying `wanted` as the status would change a value, take a field, or let one go.
///
/// Conditions are compared by type. Times of transition were carried over and are not compared.
pub fn status_changes(meta: &ObjectMeta, live: &Value, wanted: &Map<String, Value>) -> bool {
    let owned = owned(meta, Some("status")).map_or(Value::Null, |fields| fields["f:status"].clone());
    let names = |value: &Value| -> BTreeSet<String> {
        let keys = value.as_object().into_iter().flat_map(Map::keys);
        keys.filter_map(|key| key.strip_prefix("f:").map(str::to_owned))
            .collect()
    };
    let ours = names(&owned);
    let same_fields = wanted.keys().all(|name| ours.contains(name)) && ours.len() == wanted.len();
    if !same_fields || conditions_owned(&owned) != conditions_wanted(wanted) {
        return true;
    }
    wanted.iter().any(|(name, value)| match name.as_str() {
        "conditions" => !list(value).all(|condition| list(&live[name]).any(|there| same(there, condition))),
        _ => live[name] != *value,
    })
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn same(there: &Value, wanted: &Value) -> bool {
    ["type", "status", "reason", "message", "observedGeneration"]
        .iter()
        .all(|field| there[field] == wanted[field])
}

fn conditions_owned(owned: &Value) -> BTreeSet<String> {
    let keys = owned["f:conditions"].as_object().into_iter().flat_map(Map::keys);
    keys.filter_map(|key| {
        let key: Value = serde_json::from_str(key.strip_prefix("k:")?).ok()?;
        Some(key["type"].as_str()?.to_owned())
    })
    .collect()
}

fn conditions_wanted(wanted: &Map<String, Value>) -> BTreeSet<String> {
    wanted.get("conditions").map_or_else(BTreeSet::new, |conditions| {
        let types = list(conditions).filter_map(|condition| condition["type"].as_str());
        types.map(str::to_owned).collect()
    })
}

/// The conditions to apply: those that are wanted, with their times of transition carried over from what is
/// there.
pub fn carry(live: &[Condition], generation: i64, now: Timestamp, wanted: &[Wanted<'_>]) -> Vec<Condition> {
    let is_wanted = |condition: &&Condition| wanted.iter().any(|want| want.kind == condition.type_);
    let mut carried: Vec<Condition> = live.iter().filter(is_wanted).cloned().collect();
    conditions::set(&mut carried, generation, now, wanted);
    carried
}

/// Whether the operator's metadata is as wanted: this finalizer or none, these annotations and no others.
pub fn metadata_changes(meta: &ObjectMeta, finalizer: Option<&str>, annotations: &[(&str, String)]) -> bool {
    let owned = owned(meta, None).map_or(Value::Null, |fields| fields["f:metadata"].clone());
    let ours = |field: &str| -> BTreeSet<String> {
        let keys = owned[field].as_object().into_iter().flat_map(Map::keys);
        keys.filter(|key| *key != ".")
            .filter_map(|key| Some(key.split_once(':')?.1.trim_matches('"').to_owned()))
            .collect()
    };
    let finalizers: BTreeSet<String> = finalizer.into_iter().map(str::to_owned).collect();
    let names: BTreeSet<String> = annotations.iter().map(|(name, _)| (*name).to_owned()).collect();
    let there = |name: &str| meta.annotations.as_ref().and_then(|all| all.get(name));
    ours("f:finalizers") != finalizers
        || ours("f:annotations") != names
        || annotations.iter().any(|(name, value)| there(name) != Some(value))
        || finalizer.is_some_and(|finalizer| !has_finalizer(meta, finalizer))
}

/// Whether the object waits for this finalizer before it goes.
pub fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|there| there == finalizer)
}

/// So deep managed fields are compared: as far as `f:status`, `f:conditions`, `k:{"type":"Ready"}`.
const COMPARED: usize = 3;

/// Leaves out what is deeper.
fn trim_fields(fields: &mut Value, depth: usize) {
    match fields {
        Value::Object(fields) if depth > 0 => {
            fields
                .values_mut()
                .for_each(|field| trim_fields(field, depth - 1));
        }
        other => *other = Value::Null,
    }
}

/// Leaves of the managed fields only what is asked here: they are the larger part of a small object.
pub fn trim_managed_fields(meta: &mut ObjectMeta) {
    let Some(entries) = &mut meta.managed_fields else {
        return;
    };
    entries.retain(|entry| matches!(entry.manager.as_deref(), Some(OPERATOR | AGENT)));
    for entry in entries.iter_mut() {
        if entry.manager.as_deref() != Some(OPERATOR) || entry.operation.as_deref() != Some("Apply") {
            entry.fields_v1 = None;
        }
        if let Some(fields) = &mut entry.fields_v1 {
            trim_fields(&mut fields.0, COMPARED);
        }
        entry.time = None;
    }
    entries.shrink_to_fit();
}

#[cfg(test)]
#[path = "diff_test.rs"]
mod tests;
