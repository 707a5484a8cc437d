//! What the chart's ServiceAccounts may do: an agent's rights end at its node, and neither agent nor operator has a right
//! that it does not use. Tokens are bound to Pods on nodes, by TokenRequest, as a kubelet binds them.

#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

use std::collections::BTreeSet;

use kube::{Client, Config};
use serde_json::{Value, json};

use understudy_tests::chart::audit::Right;

use crate::chart_access::{Identity, Outcome, Request};

pub use understudy_tests::chart::install::NAMESPACE;

/// A client with this token and no other credentials.
fn client_with(admin: &Config, token: String) -> Client {
    let mut config = admin.clone();
    config.auth_info = kube::config::AuthInfo {
        token: Some(token.into()),
        ..Default::default()
    };
    Client::try_from(config).unwrap()
}

async fn post(client: &Client, path: &str, body: &Value) -> Value {
    let request = http::Request::builder()
        .method("POST")
        .uri(path)
        .header("Content-Type", "application/json")
        .body(body.to_string().into_bytes())
        .unwrap();
    client
        .request(request)
        .await
        .unwrap_or_else(|error| panic!("POST {path} {body:#}: {error}"))
}

/// Asks for a token of a ServiceAccount; `pod` is what it is bound to.
async fn token(client: &Client, account: &str, pod: Option<(&str, &str)>) -> String {
    let mut spec = json!({"expirationSeconds": 3600});
    if let Some((name, uid)) = pod {
        spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid});
    }
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
    let answer = post(client, &path, &request).await;
    answer["status"]["token"].as_str().expect("a token").to_owned()
}

/// Makes a Pod of a ServiceAccount on a node, as the DaemonSet's controller does; its UID.
async fn pod(client: &Client, name: &str, account: &str, node: &str) -> String {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
            "containers": [{"name": "agent", "image": "understudy.dev/understudy-node:0.1.0"}],
        },
    });
    let made = post(client, &format!("/api/v1/namespaces/{NAMESPACE}/pods"), &pod).await;
    made["metadata"]["uid"].as_str().expect("a UID").to_owned()
}

/// Nodes `alpha` and `beta`, and objects of ours on each, as the operator leaves them.
async fn stage(root: &Identity) {
    let client = &root.client;
    post(
        client,
        "/api/v1/namespaces",
        &json!({"metadata": {"name": "shop"}}),
    )
    .await;
    for node in ["alpha", "beta"] {
        post(
            client,
            "/api/v1/nodes",
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}),
        )
        .await;
    }
    let assigned = |node: &str| json!({"status": {"observedGeneration": 1, "nodeName": node, "nodeUID": format!("uid-{node}")}});
    for (name, node) in [("web-alpha", "alpha"), ("web-beta", "beta")] {
        let guest = json!({"spec": {"nodeName": node, "memory": "512Mi", "disks": [
            {"name": "root", "role": "Root", "source": format!("{name}.img")},
        ]}});
        let reboot = json!({"spec": {"guestName": name}});
        let update = json!({"spec": {"nodeName": node, "origin": "Host"}});
        for (resource, body) in [
            ("guests", guest),
            ("seamlessreboots", reboot),
            ("nodeupdates", update),
        ] {
            let made = Request::ours("create", resource, Some(name)).with(body);
            assert_eq!(root.send(&made).await, Outcome::Allowed);
        }
        for resource in ["guests/status", "seamlessreboots/status"] {
            let status = Request::ours("patch", resource, Some(name)).with(assigned(node));
            assert_eq!(root.send(&status).await, Outcome::Allowed);
        }
    }
    // One that no node has, and what is not a node's.
    let unassigned = json!({"spec": {"nodeName": "alpha", "memory": "512Mi", "disks": [
        {"name": "root", "role": "Root", "source": "new.img"},
    ]}});
    let empty = json!({"spec": {}});
    for (resource, name, body) in [
        ("guests", "unassigned", &unassigned),
        ("hostupdates", "kernel", &empty),
        ("hosts", "beta", &empty),
    ] {
        let made = Request::ours("create", resource, Some(name)).with(body.clone());
        assert_eq!(root.send(&made).await, Outcome::Allowed);
    }
}

fn event(instance: &str, controller: &str, api_version: &str, kind: &str) -> Value {
    json!({
        "eventTime": "2026-11-27T14:00:00.000000Z", "action": "Phase", "reason": "Failed", "type": "Normal",
        "note": "x", "reportingController": controller, "reportingInstance": instance,
        "regarding": {"apiVersion": api_version, "kind": kind, "name": "web-alpha", "namespace": "shop"},
    })
}

fn make_event(name: &'static str, body: Value) -> Request {
    Request::of("create", "events.k8s.io", "events", Some("shop"), Some(name)).with(body)
}

fn phase(phase: &str) -> Value {
    json!({"status": {"observedGeneration": 1, "phase": phase}})
}

fn heartbeat() -> Value {
    json!({"status": {"observedGeneration": 1, "heartbeat": "2026-11-27T14:00:00Z"}})
}

const OURS: &str = "understudy.dev/v1alpha1";
const AGENT: &str = "understudy.dev/node-agent";

/// All that an agent does, on its own node.
fn what_an_agent_does() -> Vec<Request> {
    let mut requests = Vec::new();
    for resource in ["guests", "seamlessreboots", "nodeupdates"] {
        requests.push(Request::ours("get", resource, Some("web-alpha")));
        requests.push(Request::ours("list", resource, None));
        requests.push(Request::ours("watch", resource, None));
    }
    requests.extend([
        Request::ours("patch", "guests/status", Some("web-alpha")).with(phase("Running")),
        Request::ours("patch", "seamlessreboots/status", Some("web-alpha")).with(phase("Pending")),
        Request::ours("patch", "nodeupdates/status", Some("web-alpha")).with(phase("Pending")),
        Request::ours("create", "hosts", Some("alpha")).with(json!({"spec": {}})),
        Request::ours("get", "hosts", Some("alpha")),
        Request::ours("patch", "hosts/status", Some("alpha")).with(heartbeat()),
        make_event("own", event("alpha", AGENT, OURS, "Guest")),
    ]);
    requests
}

/// What no role gives an agent.
fn what_an_agent_has_no_right_to() -> Vec<Request> {
    let mut requests = Vec::new();
    for resource in ["guests", "seamlessreboots", "nodeupdates", "hosts"] {
        let name = if resource == "hosts" { "alpha" } else { "web-alpha" };
        for verb in ["patch", "update", "delete"] {
            requests.push(Request::ours(verb, resource, Some(name)));
        }
        if resource != "hosts" {
            requests.push(Request::ours("create", resource, Some("another")));
        }
    }
    for status in ["guests/status", "seamlessreboots/status", "nodeupdates/status"] {
        requests.push(Request::ours("update", status, Some("web-alpha")));
    }
    requests.extend([
        Request::ours("get", "hostupdates", Some("kernel")),
        Request::ours("patch", "hostupdates/status", Some("kernel")),
        Request::ours("create", "hostupdates", Some("another")),
    ]);
    for resource in ["secrets", "configmaps", "pods", "serviceaccounts"] {
        requests.push(Request::of("list", "", resource, Some(NAMESPACE), None));
    }
    requests.extend([
        Request::of("list", "", "nodes", None, None),
        Request::of("get", "", "nodes", None, Some("alpha")),
        Request::of("create", "", "events", Some("shop"), Some("old")),
        Request::of("list", "coordination.k8s.io", "leases", Some(NAMESPACE), None),
    ]);
    requests
}

/// Writes that the policy refuses, with a word of what it says: another node's, and more than status.
fn what_the_policy_refuses() -> Vec<(Request, &'static str)> {
    let moved = json!({"status": {"observedGeneration": 1, "nodeName": "beta"}});
    vec![
        (
            Request::ours("patch", "guests/status", Some("web-beta")).with(phase("Running")),
            "not assigned to node alpha",
        ),
        (
            Request::ours("patch", "guests/status", Some("unassigned")).with(phase("Running")),
            "not assigned to node alpha",
        ),
        (
            Request::ours("patch", "seamlessreboots/status", Some("web-beta")).with(phase("Failed")),
            "not assigned to node alpha",
        ),
        (
            Request::ours("patch", "nodeupdates/status", Some("web-beta")).with(phase("Failed")),
            "not for node alpha",
        ),
        (
            Request::ours("patch", "guests/status", Some("web-alpha")).with(moved),
            "assignment to a node is the operator's",
        ),
        (
            Request::ours("patch", "nodeupdates/status", Some("web-alpha"))
                .with(json!({"status": {"observedGeneration": 1, "credential": {"publicKey": "own"}}})),
            "the credential is the operator's",
        ),
        (
            Request::ours("create", "hosts", Some("gamma")).with(json!({"spec": {}})),
            "its own Host only",
        ),
        (
            Request::ours("patch", "hosts/status", Some("beta")).with(heartbeat()),
            "its own Host only",
        ),
        (
            make_event("foreign", event("beta", AGENT, OURS, "Guest")),
            "in its own name",
        ),
        (
            make_event("posing", event("alpha", "understudy.dev/operator", OURS, "Guest")),
            "in its own name",
        ),
        (
            make_event("other", event("alpha", AGENT, "v1", "Pod")),
            "objects of understudy.dev only",
        ),
    ]
}

/// What the policy alone holds, were an agent given every right there is.
fn what_the_policy_refuses_whatever_the_role() -> Vec<(Request, &'static str)> {
    vec![
        (Request::ours("patch", "guests", Some("web-alpha")).with(json!({"spec": {"cpus": 2}})), "nothing but status"),
        (Request::ours("create", "seamlessreboots", Some("own")).with(json!({"spec": {"guestName": "web-alpha"}})), "nothing but status"),
        (Request::ours("delete", "guests", Some("web-alpha")), "delete nothing"),
        (Request::ours("delete", "hosts", Some("beta")), "delete nothing"),
        (Request::ours("patch", "hostupdates", Some("kernel")).with(json!({"spec": {"paused": true}})), "write no hostupdates"),
        (Request::ours("patch", "hostupdates/status", Some("kernel")).with(json!({"status": {"observedGeneration": 1}})), "write no hostupdates"),
        (Request::of("create", "", "events", Some("shop"), Some("old")).with(json!({
            "involvedObject": {"kind": "Pod", "apiVersion": "v1", "name": "x", "namespace": "shop"}, "reason": "X", "message": "x",
            "reportingComponent": AGENT, "reportingInstance": "alpha",
        })), "objects of understudy.dev only"),
    ]
}

/// Rights that a role gives.
pub async fn rights(admin: &Client, path: &str) -> BTreeSet<Right> {
    let request = http::Request::get(path).body(Vec::new()).unwrap();
    let role: Value = admin.request(request).await.unwrap();
    let words = |list: &Value| -> Vec<String> {
        list.as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap().to_owned())
            .collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                for verb in words(&rule["verbs"]) {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights
}

fn used(requests: &[Request]) -> BTreeSet<Right> {
    requests
        .iter()
        .map(|request| {
            (
                request.group.to_owned(),
                request.resource.to_owned(),
                request.verb.to_owned(),
            )
        })
        .collect()
}

/// The whole of it, on a cluster where the chart is installed in [`NAMESPACE`] as release `understudy`.
pub async fn agents_rights_end_at_their_node(admin: &Config) {
    let root = Client::try_from(admin.clone()).unwrap();
    stage(&Identity {
        client: root.clone(),
        manager: "understudy-operator",
    })
    .await;
    let uid = pod(&root, "agent-alpha", "understudy-agent", "alpha").await;
    let agent = |token| Identity {
        client: client_with(admin, token),
        manager: "understudy-node",
    };
    let unbound = agent(token(&root, "understudy-agent", None).await);
    let agent = agent(token(&root, "understudy-agent", Some(("agent-alpha", &uid))).await);

    // The policy takes a moment to reach the API server's admission: until then writes go through.
    let probe = Request::ours("patch", "nodeupdates/status", Some("web-beta")).with(phase("Pending"));
    let begun = std::time::Instant::now();
    while agent.send(&probe).await == Outcome::Allowed {
        assert!(
            begun.elapsed().as_secs() < 60,
            "the policy does not come into force"
        );
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }

    let does = what_an_agent_does();
    for request in &does {
        assert_eq!(agent.send(request).await, Outcome::Allowed, "{request:?}");
    }
    for request in does
        .iter()
        .filter(|request| !["get", "list", "watch"].contains(&request.verb))
    {
        match unbound.send(request).await {
            Outcome::Policy(message) => assert!(message.contains("names no node"), "{request:?}: {message}"),
            other => panic!("without the claim, {request:?}: {other:?}"),
        }
    }
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/understudy-agent";
    assert_eq!(
        rights(&root, role).await,
        used(&does),
        "a right that no agent uses, or one that is missing"
    );

    for request in what_an_agent_has_no_right_to() {
        assert_eq!(agent.send(&request).await, Outcome::NoRight, "{request:?}");
    }
    for (request, words) in what_the_policy_refuses() {
        match agent.send(&request).await {
            Outcome::Policy(message) => assert!(message.contains(words), "{request:?}: {message}"),
            other => panic!("{request:?}: {other:?}"),
        }
    }

    // Were an agent given everything, the policy would hold all the same.
    post(&root, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &json!({
        "metadata": {"name": "agent-with-everything"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "understudy-agent", "namespace": NAMESPACE}],
    }))
    .await;
    // The binding takes a moment to reach the authorizer.
    let begun = std::time::Instant::now();
    while agent.send(&Request::ours("list", "hostupdates", None)).await != Outcome::Allowed {
        assert!(
            begun.elapsed().as_secs() < 60,
            "the binding does not come into force"
        );
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    for (request, words) in what_the_policy_refuses()
        .into_iter()
        .chain(what_the_policy_refuses_whatever_the_role())
    {
        match agent.send(&request).await {
            Outcome::Policy(message) => assert!(message.contains(words), "{request:?}: {message}"),
            other => panic!("with every right, {request:?}: {other:?}"),
        }
    }

    // With its Pod the token ends.
    let gone = http::Request::delete(format!(
        "/api/v1/namespaces/{NAMESPACE}/pods/agent-alpha?gracePeriodSeconds=0"
    ));
    let _: Value = root.request(gone.body(Vec::new()).unwrap()).await.unwrap();
    let begun = std::time::Instant::now();
    loop {
        let read = http::Request::get("/apis/understudy.dev/v1alpha1/guests")
            .body(Vec::new())
            .unwrap();
        match agent.client.request_text(read).await {
            Err(kube::Error::Api(status)) if status.code == 401 => break,
            // What was found valid is remembered for some seconds.
            Ok(_) => assert!(begun.elapsed().as_secs() < 60, "the token outlives its Pod"),
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}
