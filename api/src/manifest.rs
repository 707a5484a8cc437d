//! Manifests in YAML, as `kubectl apply` takes them: read, checked and decoded without an API server.

use serde_json::Value;

use crate::crd::Kind;
use crate::validation::{FieldError, validate};
use crate::{API_VERSION, Guest, HostUpdate, SeamlessReboot};

/// Largest manifest that is read, in bytes.
pub const MAX_MANIFEST: usize = 1 << 20;

/// A checked manifest. Defaults are filled in; `metadata.namespace` is set (`default` where absent) for kinds
/// that have one.
#[derive(Clone, Debug, PartialEq)]
pub enum Manifest {
    /// A Guest.
    Guest(Box<Guest>),
    /// A SeamlessReboot.
    SeamlessReboot(Box<SeamlessReboot>),
    /// A HostUpdate.
    HostUpdate(Box<HostUpdate>),
}

/// Why a manifest was refused. It says which document (from 1) of the text is meant.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Too large.
    #[error("the manifest has {0} bytes; at most {MAX_MANIFEST} are read")]
    TooLarge(usize),
    /// Not YAML.
    #[error("not valid YAML: {0}")]
    Yaml(String),
    /// Another kind of object, or another version.
    #[error(
        "document {document}: apiVersion {api_version:?}, kind {kind:?} is not known here; known: {API_VERSION} with Guest, SeamlessReboot or HostUpdate"
    )]
    UnknownKind {
        /// Which document.
        document: usize,
        /// `apiVersion` as it stands.
        api_version: String,
        /// `kind` as it stands.
        kind: String,
    },
    /// A kind that nobody applies.
    #[error(
        "document {document}: a {kind} is made by node agents and cannot be applied; apply a HostUpdate to have a host rebooted"
    )]
    MadeByAgents {
        /// Which document.
        document: usize,
        /// `NodeUpdate` or `Host`.
        kind: &'static str,
    },
    /// Fields are wrong.
    #[error("document {document}, {kind} {name:?}: {}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid {
        /// Which document.
        document: usize,
        /// `Guest`, `SeamlessReboot` or `HostUpdate`.
        kind: &'static str,
        /// `metadata.name`, as far as it is there.
        name: String,
        /// What is wrong, field by field; not empty.
        errors: Vec<FieldError>,
    },
}

/// Reads all documents of a text. Each is good or bad by itself; only text that is no YAML fails as a whole.
pub fn parse(text: &str) -> Result<Vec<Result<Manifest, ManifestError>>, ManifestError> {
    if text.len() > MAX_MANIFEST {
        return Err(ManifestError::TooLarge(text.len()));
    }
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| ManifestError::Yaml(error.to_string()))?;
    Ok(documents
        .into_iter()
        .enumerate()
        .filter(|(_, object)| !object.is_null())
        .map(|(index, object)| decode(index + 1, object))
        .collect())
}

fn decode(document: usize, mut object: Value) -> Result<Manifest, ManifestError> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let kind = match Kind::from_name(&kind) {
        Some(kind) if api_version == API_VERSION => kind,
        _ => {
            return Err(ManifestError::UnknownKind {
                document,
                api_version,
                kind,
            });
        }
    };
    if matches!(kind, Kind::NodeUpdate | Kind::Host) {
        let kind = kind.name();
        return Err(ManifestError::MadeByAgents { document, kind });
    }
    drop_nulls(&mut object);
    let name = text(&object["metadata"]["name"]);
    let invalid = |errors| ManifestError::Invalid {
        document,
        kind: kind.name(),
        name: name.clone(),
        errors,
    };
    let mut errors = metadata(kind, &object);
    errors.extend(validate(kind, &object));
    if !errors.is_empty() {
        return Err(invalid(errors));
    }
    if kind.is_namespaced() && object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = "default".into();
    }
    // What the schema accepts decodes; should the two ever disagree, the decoder's words are shown.
    let mismatch = |error: serde_json::Error| invalid(vec![FieldError::new("", None, &error.to_string())]);
    Ok(match kind {
        Kind::Guest => Manifest::Guest(serde_json::from_value(object).map_err(mismatch)?),
        Kind::SeamlessReboot => Manifest::SeamlessReboot(serde_json::from_value(object).map_err(mismatch)?),
        Kind::HostUpdate => Manifest::HostUpdate(serde_json::from_value(object).map_err(mismatch)?),
        Kind::NodeUpdate | Kind::Host => {
            let kind = kind.name();
            return Err(ManifestError::MadeByAgents { document, kind });
        }
    })
}

/// `field:` without a value means what the field's absence means, as with the API server.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// What the API server checks of names by itself.
fn metadata(kind: Kind, object: &Value) -> Vec<FieldError> {
    let metadata = &object["metadata"];
    let mut errors = Vec::new();
    let is_name = |value: &Value, dots: bool| {
        let text = value.as_str().unwrap_or_default();
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        text.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (dots && b == b'.'))
            && edge(text.as_bytes().first())
            && edge(text.as_bytes().last())
    };
    let words = "must be lower-case letters, digits and '-'";
    if metadata["name"].is_null() {
        errors.push(FieldError::new("metadata.name", None, "is required"));
    } else if !is_name(&metadata["name"], true) {
        errors.push(FieldError::new("metadata.name", Some(&metadata["name"]), words));
    }
    let namespace = &metadata["namespace"];
    if !kind.is_namespaced() {
        if !namespace.is_null() {
            let words = format!("must be left out: a {} belongs to no namespace", kind.name());
            errors.push(FieldError::new("metadata.namespace", Some(namespace), &words));
        }
        return errors;
    }
    let short = namespace.as_str().is_some_and(|name| name.len() <= 63);
    if !namespace.is_null() && (!short || !is_name(namespace, false)) {
        errors.push(FieldError::new("metadata.namespace", Some(namespace), words));
    }
    errors
}

#[cfg(test)]
#[path = "manifest_test.rs"]
mod tests;
