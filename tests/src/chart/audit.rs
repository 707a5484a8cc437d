//! Which rights an identity used, from the API server's audit log (level `Metadata` is enough): what a role gives and
//! nobody uses is needless, what was refused is missing.

use std::collections::BTreeSet;

use serde_json::Value;

/// Group, resource and verb, as RBAC names them.
pub type Right = (String, String, String);

/// What a user did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Rights that it used.
    pub used: BTreeSet<Right>,
    /// Rights that it asked for and was not given.
    pub missing: BTreeSet<Right>,
}

/// Reads an audit log, an event a line, for what `user` did.
pub fn used_by(user: &str, log: &str) -> Used {
    let mut all = Used::default();
    for line in log.lines() {
        // The last line may be half written.
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let object = &event["objectRef"];
        if event["user"]["username"] != user || object["resource"].is_null() {
            continue;
        }
        let mut resource = text(&object["resource"]);
        if let Some(subresource) = object["subresource"].as_str() {
            resource = format!("{resource}/{subresource}");
        }
        let right = (text(&object["apiGroup"]), resource, text(&event["verb"]));
        match event["annotations"]["authorization.k8s.io/decision"].as_str() {
            Some("allow") => all.used.insert(right),
            Some("forbid") => all.missing.insert(right),
            _ => false,
        };
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read_from_the_audit_log_of_the_user_alone() {
        let event = |user: &str, verb: &str, object: &str, decision: &str| {
            format!(
                r#"{{"user":{{"username":"{user}"}},"verb":"{verb}","objectRef":{object},"annotations":{{"authorization.k8s.io/decision":"{decision}"}}}}"#
            )
        };
        let status = r#"{"resource":"guests","subresource":"status","apiGroup":"understudy.dev"}"#;
        let log = [
            event("operator", "patch", status, "allow"),
            event("operator", "list", r#"{"resource":"secrets"}"#, "forbid"),
            event("somebody", "delete", status, "allow"),
            event("operator", "get", "null", "allow"),
            r#"{"user":{"username":"oper"#.to_owned(),
        ]
        .join("\n");
        let right = |group: &str, resource: &str, verb: &str| {
            (group.to_owned(), resource.to_owned(), verb.to_owned())
        };
        assert_eq!(
            used_by("operator", &log),
            Used {
                used: [right("understudy.dev", "guests/status", "patch")].into(),
                missing: [right("", "secrets", "list")].into(),
            }
        );
    }
}
