//! Evaluates the chart's CEL as Flux does (its RFC 0009): first the generation, then `inProgress`, `failed` and `current`,
//! with the object's top-level fields as variables.

use std::fs;

use cel::{Context, Program};
use serde_json::Value;
use understudy_api::API_VERSION;
use understudy_api::crd::Kind;

use crate::{Verdict, gitops};

/// Reads an object by its kind's expressions.
pub fn read(object: &Value) -> Verdict {
    if let (Some(generation), Some(observed)) = (
        object["metadata"]["generation"].as_i64(),
        object["status"]["observedGeneration"].as_i64(),
    ) && generation != observed
    {
        return Verdict::InProgress;
    }
    let checks = checks();
    let check = checks
        .iter()
        .find(|check| check["kind"] == object["kind"] && check["apiVersion"] == object["apiVersion"])
        .expect("a check for the kind");
    for (name, verdict) in [
        ("inProgress", Verdict::InProgress),
        ("failed", Verdict::Failed),
        ("current", Verdict::Current),
    ] {
        if holds(check[name].as_str().unwrap(), object) {
            return verdict;
        }
    }
    Verdict::InProgress
}

fn holds(expression: &str, object: &Value) -> bool {
    let mut context = Context::default();
    for (name, value) in object.as_object().unwrap() {
        context.add_variable(name.as_str(), value).unwrap();
    }
    let program = Program::compile(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
    match program.execute(&context) {
        Ok(cel::Value::Bool(holds)) => holds,
        other => panic!("{expression}: {other:?}"),
    }
}

fn checks() -> Vec<Value> {
    let text = fs::read_to_string(gitops().join("flux/health-check-exprs.yaml")).unwrap();
    let patch: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(patch[0]["path"], "/spec/healthCheckExprs");
    patch[0]["value"].as_array().unwrap().clone()
}

#[test]
fn every_kind_has_its_check() {
    let checks = checks();
    assert_eq!(checks.len(), Kind::ALL.len());
    for kind in Kind::ALL {
        let there = |check: &&Value| check["kind"] == kind.name() && check["apiVersion"] == API_VERSION;
        assert_eq!(checks.iter().filter(there).count(), 1, "{}", kind.name());
    }
}
