//! `values.yaml` with its comments: each value's documentation, and what its schema says beyond its type.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

/// A line of a comment that adds to the value's schema.
const SCHEMA: &str = "@schema ";

/// A value, or a group of them.
#[derive(Debug)]
pub struct Node {
    name: String,
    comment: String,
    schema: Map<String, Value>,
    default: Value,
    /// Empty where the default is the whole value.
    children: Vec<Node>,
}

/// A key as it stands in the file.
struct Line {
    indent: usize,
    name: String,
    comment: Vec<String>,
}

/// Reads the text of `values.yaml`. Every value has a comment; a map whose keys have none is one value.
pub fn read(text: &str) -> Result<Vec<Node>> {
    let defaults: Value = serde_saphyr::from_str(text)?;
    let lines = lines(text);
    let (nodes, read) = children(&lines, 0, &defaults, "")?;
    if read != lines.len() {
        bail!("{}: not indented as the values around it", lines[read].name);
    }
    Ok(nodes)
}

fn lines(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut comment = Vec::new();
    for line in text.lines() {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        if let Some(words) = content.strip_prefix('#') {
            comment.push(words.trim().to_owned());
        } else if let Some((name, _)) = content.split_once(':').filter(|(name, _)| is_key(name)) {
            lines.push(Line {
                indent,
                name: name.to_owned(),
                comment: std::mem::take(&mut comment),
            });
        } else {
            // An empty line parts the head of the file from the first value; items of lists have no comments.
            comment.clear();
        }
    }
    lines
}

fn is_key(name: &str) -> bool {
    !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "./_-".contains(c))
        && !name.starts_with('-')
}

/// The nodes at the indentation of the first line, and how many lines they took.
fn children(lines: &[Line], indent: usize, defaults: &Value, path: &str) -> Result<(Vec<Node>, usize)> {
    let mut nodes = Vec::new();
    let mut at = 0;
    while let Some(line) = lines.get(at).filter(|line| line.indent == indent) {
        at += 1;
        let path = format!("{path}{}", line.name);
        let default = defaults
            .get(&line.name)
            .with_context(|| format!("{path}: not where it seems to be"))?;
        let inner: usize = lines[at..].iter().take_while(|line| line.indent > indent).count();
        let below = &lines[at..at + inner];
        let documented = below.iter().filter(|line| !line.comment.is_empty()).count();
        let children = match below.first() {
            Some(first) if documented > 0 => {
                let (children, read) = children(below, first.indent, default, &format!("{path}."))?;
                if read != inner {
                    bail!(
                        "{path}: {} is not indented as the values around it",
                        below[read].name
                    );
                }
                children
            }
            _ => Vec::new(),
        };
        at += inner;
        nodes.push(node(line, default, children).with_context(|| path)?);
    }
    Ok((nodes, at))
}

fn node(line: &Line, default: &Value, children: Vec<Node>) -> Result<Node> {
    let mut words = Vec::new();
    let mut schema = Map::new();
    for text in &line.comment {
        match text.strip_prefix(SCHEMA) {
            Some(json) => schema.extend(serde_json::from_str::<Map<String, Value>>(json).context("@schema")?),
            None => words.push(text.as_str()),
        }
    }
    let comment = words.join(" ");
    if comment.is_empty() && children.is_empty() {
        bail!("no comment says what it is");
    }
    Ok(Node {
        name: line.name.clone(),
        comment,
        schema,
        default: default.clone(),
        children,
    })
}

/// The JSON schema of the values: nothing else is let through.
pub fn schema(nodes: &[Node]) -> Value {
    let mut schema = object(nodes);
    schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    schema
}

fn object(nodes: &[Node]) -> Value {
    let properties: Map<String, Value> = nodes.iter().map(|node| (node.name.clone(), of(node))).collect();
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

fn of(node: &Node) -> Value {
    let mut schema = match &node.default {
        Value::Bool(_) => json!({"type": "boolean"}),
        Value::Number(_) => json!({"type": "integer"}),
        Value::Array(_) => json!({"type": "array"}),
        Value::Object(_) if node.children.is_empty() => {
            json!({"type": "object", "additionalProperties": false})
        }
        Value::Object(_) => object(&node.children),
        Value::String(_) | Value::Null => json!({"type": "string"}),
    };
    if !node.comment.is_empty() {
        schema["description"] = json!(node.comment);
    }
    for (key, value) in &node.schema {
        schema[key] = value.clone();
    }
    schema
}

/// The table of values, in Markdown.
pub fn table(nodes: &[Node]) -> String {
    let mut table = "| value | default | |\n| --- | --- | --- |\n".to_owned();
    rows(nodes, "", &mut table);
    table
}

fn rows(nodes: &[Node], path: &str, table: &mut String) {
    for node in nodes {
        let path = format!("{path}{}", node.name);
        if node.children.is_empty() {
            let comment = node.comment.replace('|', "\\|");
            table.push_str(&format!("| `{path}` | `{}` | {comment} |\n", node.default));
        } else {
            rows(&node.children, &format!("{path}."), table);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# The head of the file.\n\n# How many.\n# @schema {\"minimum\": 0}\nreplicas: 2\nimage:\n  # Its name,\n  # a | b.\n  name: x\n# Free.\n# @schema {\"additionalProperties\": true}\nresources:\n  limits:\n    memory: 1Mi\n";

    #[test]
    fn comments_become_table_and_schema_and_what_has_no_comment_is_part_of_what_is_above() {
        let nodes = read(TEXT).unwrap();
        assert_eq!(
            table(&nodes).lines().skip(2).collect::<Vec<_>>(),
            [
                "| `replicas` | `2` | How many. |",
                "| `image.name` | `\"x\"` | Its name, a \\| b. |",
                "| `resources` | `{\"limits\":{\"memory\":\"1Mi\"}}` | Free. |",
            ]
        );
        let schema = schema(&nodes);
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(
            schema["properties"]["replicas"],
            json!({"type": "integer", "minimum": 0, "description": "How many."})
        );
        assert_eq!(schema["properties"]["image"]["additionalProperties"], false);
        assert_eq!(schema["properties"]["resources"]["additionalProperties"], true);
    }

    #[test]
    fn a_value_without_a_comment_is_named() {
        let error = format!(
            "{:#}",
            read("# A group.\na:\n  # Documented.\n  b: 1\n  c: 2\n").unwrap_err()
        );
        assert!(error.contains("a.c") && error.contains("no comment"), "{error}");
        let error = format!("{:#}", read("# X.\n# @schema {\na: 1\n").unwrap_err());
        assert!(error.contains("@schema"), "{error}");
    }
}
