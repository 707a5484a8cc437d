//! One identity before the API server: what it may do, verb by verb.

#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

use kube::Client;
use serde_json::{Value, json};

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Allowed,
    /// No role gives the right to it.
    NoRight,
    /// The role would, and the admission policy does not; its message.
    Policy(String),
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// As RBAC names it.
    pub verb: &'static str,
    /// As RBAC names it; empty: the core group.
    pub group: &'static str,
    /// With its subresource, as RBAC names it.
    pub resource: &'static str,
    /// Namespace, where objects have one.
    pub namespace: Option<&'static str>,
    /// Name of the object; none: all of them.
    pub name: Option<&'static str>,
    /// What is written.
    pub body: Value,
}

impl Request {
    /// One of understudy.dev.
    pub fn ours(verb: &'static str, resource: &'static str, name: Option<&'static str>) -> Request {
        let namespaced = resource.starts_with("guests") || resource.starts_with("seamlessreboots");
        Request {
            verb,
            group: "understudy.dev",
            resource,
            namespace: namespaced.then_some("shop"),
            name,
            body: Value::Null,
        }
    }

    /// One of Kubernetes itself.
    pub fn of(
        verb: &'static str,
        group: &'static str,
        resource: &'static str,
        namespace: Option<&'static str>,
        name: Option<&'static str>,
    ) -> Request {
        Request {
            verb,
            group,
            resource,
            namespace,
            name,
            body: Value::Null,
        }
    }

    /// With these fields beside what the object is.
    pub fn with(mut self, body: Value) -> Request {
        self.body = body;
        self
    }

    fn path(&self) -> String {
        let version = if self.group == "understudy.dev" {
            "v1alpha1"
        } else {
            "v1"
        };
        let mut path = match self.group {
            "" => format!("/api/{version}"),
            group => format!("/apis/{group}/{version}"),
        };
        if let Some(namespace) = self.namespace {
            path.push_str(&format!("/namespaces/{namespace}"));
        }
        let (resource, subresource) = match self.resource.split_once('/') {
            Some((resource, subresource)) => (resource, Some(subresource)),
            None => (self.resource, None),
        };
        path.push_str(&format!("/{resource}"));
        // A new object is named in its body; a subresource is of an object.
        if let Some(name) = self
            .name
            .filter(|_| self.verb != "create" || subresource.is_some())
        {
            path.push_str(&format!("/{name}"));
        }
        if let Some(subresource) = subresource {
            path.push_str(&format!("/{subresource}"));
        }
        path
    }

    fn http(&self, manager: &str) -> http::Request<Vec<u8>> {
        let path = self.path();
        let (method, path, content) = match self.verb {
            "get" | "list" => ("GET", path, ""),
            "watch" => ("GET", format!("{path}?watch=true&timeoutSeconds=1"), ""),
            "create" => ("POST", path, "application/json"),
            "update" => ("PUT", path, "application/json"),
            "patch" => (
                "PATCH",
                format!("{path}?fieldManager={manager}&force=true"),
                "application/apply-patch+yaml",
            ),
            "delete" => ("DELETE", path, ""),
            other => panic!("{other} is no verb"),
        };
        let mut body = Vec::new();
        let mut request = http::Request::builder().method(method).uri(path);
        if !content.is_empty() {
            request = request.header("Content-Type", content);
            body = self.object().to_string().into_bytes();
        }
        request.body(body).unwrap()
    }

    fn object(&self) -> Value {
        let (kind, version) = match (self.group, self.resource.split('/').next().unwrap()) {
            ("understudy.dev", "guests") => ("Guest", "understudy.dev/v1alpha1"),
            ("understudy.dev", "seamlessreboots") => ("SeamlessReboot", "understudy.dev/v1alpha1"),
            ("understudy.dev", "nodeupdates") => ("NodeUpdate", "understudy.dev/v1alpha1"),
            ("understudy.dev", "hostupdates") => ("HostUpdate", "understudy.dev/v1alpha1"),
            ("understudy.dev", "hosts") => ("Host", "understudy.dev/v1alpha1"),
            ("events.k8s.io", "events") => ("Event", "events.k8s.io/v1"),
            ("", "events") => ("Event", "v1"),
            ("", "nodes") => ("Node", "v1"),
            ("", "pods") if self.resource == "pods/eviction" => ("Eviction", "policy/v1"),
            ("coordination.k8s.io", "leases") => ("Lease", "coordination.k8s.io/v1"),
            (group, resource) => panic!("no kind is known for {group}/{resource}"),
        };
        let mut object = json!({"apiVersion": version, "kind": kind, "metadata": {"name": self.name}});
        if let Some(namespace) = self.namespace {
            object["metadata"]["namespace"] = json!(namespace);
        }
        for (field, value) in self.body.as_object().into_iter().flatten() {
            match object[field].as_object_mut() {
                Some(there) => there.extend(value.as_object().unwrap().clone()),
                None => object[field] = value.clone(),
            }
        }
        object
    }
}

/// Somebody before the API server.
pub struct Identity {
    /// With its credentials.
    pub client: Client,
    /// Its name as the owner of fields.
    pub manager: &'static str,
}

impl Identity {
    /// Sends a request. Whatever is neither done nor forbidden is a mistake of the test.
    pub async fn send(&self, request: &Request) -> Outcome {
        match self.client.request_text(request.http(self.manager)).await {
            Ok(_) => Outcome::Allowed,
            Err(kube::Error::Api(status)) if status.code == 403 => {
                if status.message.contains("ValidatingAdmissionPolicy") {
                    Outcome::Policy(status.message.clone())
                } else {
                    Outcome::NoRight
                }
            }
            Err(error) => panic!("{request:?}: {error}"),
        }
    }
}
