//! Checks a value against the structural schema of a CRD, as the API server does: unknown and missing
//! fields, types, enumerations, ranges, lengths, list-map keys, formats.

use serde_json::{Map, Value};

use crate::validation::FieldError;

/// Appends to `errors` what `value` at `path` violates of `schema`.
pub fn check(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if value.is_null() {
        errors.push(FieldError::new(
            path,
            None,
            "has no value: give one or leave the field out",
        ));
        return;
    }
    match schema["type"].as_str() {
        Some("object") => object(schema, value, path, errors),
        Some("array") => array(schema, value, path, errors),
        Some("string") => string(schema, value, path, errors),
        Some("integer") => integer(schema, value, path, errors),
        Some("boolean") if !value.is_boolean() => {
            errors.push(FieldError::new(path, Some(value), "must be true or false"));
        }
        _ => {}
    }
}

fn object(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(fields) = value.as_object() else {
        errors.push(FieldError::new(
            path,
            Some(value),
            "must be an object: fields with values",
        ));
        return;
    };
    let Some(properties) = schema["properties"].as_object() else {
        map(schema, fields, path, errors);
        return;
    };
    for required in schema["required"].as_array().into_iter().flatten() {
        if let Some(name) = required.as_str()
            && fields.get(name).is_none_or(Value::is_null)
        {
            errors.push(FieldError::new(&join(path, name), None, "is required"));
        }
    }
    for (name, field) in fields.iter().filter(|(_, field)| !field.is_null()) {
        match properties.get(name) {
            Some(property) => check(property, field, &join(path, name), errors),
            None => {
                let mut known: Vec<&str> = properties.keys().map(String::as_str).collect();
                known.sort_unstable();
                errors.push(FieldError::new(
                    &join(path, name),
                    None,
                    &format!("is not a field; known here: {}", known.join(", ")),
                ));
            }
        }
    }
}

/// An object whose field names are the user's.
fn map(schema: &Value, fields: &Map<String, Value>, path: &str, errors: &mut Vec<FieldError>) {
    if let Some(most) = schema["maxProperties"].as_u64()
        && fields.len() as u64 > most
    {
        let has = fields.len();
        errors.push(FieldError::new(
            path,
            None,
            &format!("has {has} fields; at most {most} are allowed"),
        ));
    }
    for (name, field) in fields {
        check(
            &schema["additionalProperties"],
            field,
            &format!("{path}[{name:?}]"),
            errors,
        );
    }
}

fn array(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(items) = value.as_array() else {
        errors.push(FieldError::new(path, Some(value), "must be a list"));
        return;
    };
    if let Some(least) = schema["minItems"].as_u64()
        && (items.len() as u64) < least
    {
        errors.push(FieldError::new(
            path,
            None,
            &format!("must have at least {least} item"),
        ));
    }
    if let Some(most) = schema["maxItems"].as_u64()
        && items.len() as u64 > most
    {
        let has = items.len();
        errors.push(FieldError::new(
            path,
            None,
            &format!("has {has} items; at most {most} are allowed"),
        ));
    }
    for (index, item) in items.iter().enumerate() {
        check(&schema["items"], item, &format!("{path}[{index}]"), errors);
    }
    for key in schema["x-kubernetes-list-map-keys"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let Some(key) = key.as_str() else { continue };
        for (index, item) in items.iter().enumerate() {
            if items[..index].iter().any(|other| other.get(key) == item.get(key)) {
                errors.push(FieldError::new(
                    &format!("{path}[{index}].{key}"),
                    item.get(key),
                    "must not appear twice in the list",
                ));
            }
        }
    }
}

fn string(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(text) = value.as_str() else {
        errors.push(FieldError::new(
            path,
            Some(value),
            "must be a string; put it in quotes",
        ));
        return;
    };
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        errors.push(FieldError::new(
            path,
            Some(value),
            &format!("must be one of {}", allowed.join(", ")),
        ));
    }
    if let Some(most) = schema["maxLength"].as_u64()
        && text.chars().count() as u64 > most
    {
        errors.push(FieldError::new(
            path,
            None,
            &format!("is longer than {most} characters"),
        ));
    }
    if schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err() {
        errors.push(FieldError::new(
            path,
            Some(value),
            "must be a time such as 2026-11-22T18:00:00Z",
        ));
    }
}

fn integer(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(number) = value.as_i64() else {
        errors.push(FieldError::new(path, Some(value), "must be a whole number"));
        return;
    };
    let least = schema["minimum"].as_f64().map(|bound| bound as i64);
    let most = schema["maximum"].as_f64().map(|bound| bound as i64);
    let wrong = least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most);
    if wrong {
        let bounds = match (least, most) {
            (Some(least), Some(most)) => format!("must be between {least} and {most}"),
            (Some(least), None) => format!("must be at least {least}"),
            (_, most) => format!("must be at most {}", most.unwrap_or_default()),
        };
        errors.push(FieldError::new(path, Some(value), &bounds));
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}
