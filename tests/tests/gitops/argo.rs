//! Runs the chart's Lua as Argo CD does: with the base and table libraries, and nothing else.

use std::collections::BTreeMap;
use std::fs;

use mlua::{Lua, LuaOptions, LuaSerdeExt, StdLib};
use serde_json::Value;
use understudy_api::GROUP;
use understudy_api::crd::Kind;

use crate::{Verdict, gitops};

fn run(object: &Value) -> BTreeMap<String, String> {
    let script = scripts()
        .remove(object["kind"].as_str().unwrap())
        .expect("a script for the kind");
    let lua = Lua::new_with(StdLib::TABLE, LuaOptions::default()).unwrap();
    // What is absent is nil in Argo CD, and not a value of its own.
    let options = mlua::serde::SerializeOptions::new()
        .serialize_none_to_null(false)
        .serialize_unit_to_null(false);
    lua.globals()
        .set("obj", lua.to_value_with(object, options).unwrap())
        .unwrap();
    let health: mlua::Value = lua
        .load(script)
        .set_name("health.lua")
        .eval()
        .expect("the script runs");
    lua.from_value(health).expect("a table of strings")
}

/// Reads an object by its kind's script.
pub fn read(object: &Value) -> Verdict {
    match run(object)["status"].as_str() {
        "Healthy" => Verdict::Current,
        "Progressing" => Verdict::InProgress,
        "Suspended" => Verdict::Suspended,
        "Degraded" => Verdict::Failed,
        other => panic!("{other} is no health of Argo CD's that we use"),
    }
}

/// What it tells people.
pub fn message(object: &Value) -> String {
    run(object).remove("message").expect("a message")
}

/// The script for each kind, as the component puts them into Argo CD's ConfigMap.
fn scripts() -> BTreeMap<String, String> {
    let folder = gitops().join("argocd");
    let text = fs::read_to_string(folder.join("kustomization.yaml")).unwrap();
    let component: Value = serde_saphyr::from_str(&text).unwrap();
    component["configMapGenerator"][0]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let (key, file) = entry.as_str().unwrap().split_once('=').unwrap();
            let kind = key
                .strip_prefix(&format!("resource.customizations.health.{GROUP}_"))
                .unwrap();
            (kind.to_owned(), fs::read_to_string(folder.join(file)).unwrap())
        })
        .collect()
}

#[test]
fn every_kind_has_its_check() {
    let scripts = scripts();
    assert_eq!(scripts.len(), Kind::ALL.len());
    assert!(Kind::ALL.iter().all(|kind| scripts.contains_key(kind.name())));
}
