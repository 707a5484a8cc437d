//! Checks manifests by the CRDs' own schema and rules, where no API server does it.

use std::fmt;

use serde_json::Value;

use crate::crd::Kind;
use crate::rules::Check;
use crate::structural;

/// What is wrong with one field, and what would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// `spec.disks[1].name`.
    pub path: String,
    /// The value as it stands, shortened; `None` where it is missing or too large to show.
    pub value: Option<String>,
    /// What it must be.
    pub message: String,
}

impl FieldError {
    pub(crate) fn new(path: &str, value: Option<&Value>, message: &str) -> FieldError {
        let value = value.map(|value| {
            let text = value.to_string();
            match text.char_indices().nth(60) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        });
        FieldError {
            path: path.to_owned(),
            value,
            message: message.to_owned(),
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        if let Some(value) = &self.value {
            write!(f, "{value} ")?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that is wrong with `object` as a new resource of this kind; empty when it may be created.
/// `metadata` is checked as far as the name goes.
pub fn validate(kind: Kind, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let schema = kind.schema();
    for part in ["spec", "status"] {
        match object.get(part) {
            Some(value) => structural::check(&schema["properties"][part], value, part, &mut errors),
            None if part == "spec" => errors.push(FieldError::new("spec", None, "is required")),
            None => {}
        }
    }
    // A rule may rely on types, as CEL does: it is asked only of objects that have them.
    if !errors.is_empty() {
        return errors;
    }
    for rule in kind.rules() {
        if let Check::Value(check) = &rule.check {
            at(object, rule.path, "", &mut |path, value| {
                if !check(value) {
                    let shown = (!value.is_object() && !value.is_array()).then_some(value);
                    errors.push(FieldError::new(path, shown, &rule.message));
                }
            });
        }
    }
    errors
}

/// Everything that is wrong with changing `old` into `new`; `new` is also checked by itself.
pub fn validate_change(kind: Kind, old: &Value, new: &Value) -> Vec<FieldError> {
    let mut errors = validate(kind, new);
    for rule in kind.rules() {
        if let Check::Change(check) = rule.check {
            let pointer = format!("/{}", rule.path.replace('.', "/"));
            // As in CEL, a rule about changes holds of what is there before and after.
            if let (Some(old), Some(new)) = (old.pointer(&pointer), new.pointer(&pointer))
                && !check(old, new)
            {
                errors.push(FieldError::new(rule.path, None, &rule.message));
            }
        }
    }
    errors
}

/// Calls `found` with every value at `pattern` (`spec.disks[].name`) beneath `value`.
fn at(value: &Value, pattern: &str, path: &str, found: &mut dyn FnMut(&str, &Value)) {
    if pattern.is_empty() {
        found(path, value);
        return;
    }
    let (head, rest) = pattern.split_once('.').unwrap_or((pattern, ""));
    let name = head.trim_end_matches("[]");
    let Some(field) = value.get(name).filter(|field| !field.is_null()) else {
        return;
    };
    let here = if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    };
    if !head.ends_with("[]") {
        at(field, rest, &here, found);
        return;
    }
    for (index, item) in field.as_array().into_iter().flatten().enumerate() {
        at(item, rest, &format!("{here}[{index}]"), found);
    }
}

#[cfg(test)]
#[path = "validation_test.rs"]
mod tests;
