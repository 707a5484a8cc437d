//! What the chart renders: variants of its values, put before Helm's own checks and the real API server.

#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use understudy_node::config::Config as NodeConfig;

use crate::chart_rights::NAMESPACE;

/// Where Helm and kubectl are, and the administrator's credentials.
pub struct Tools<'a> {
    /// Helm.
    pub helm: &'a Path,
    /// kubectl.
    pub kubectl: &'a Path,
    /// The administrator's.
    pub kubeconfig: &'a Path,
}

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/understudy")
}

impl Tools<'_> {
    fn run(&self, program: &Path, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .env("KUBECONFIG", self.kubeconfig)
            // Nothing of this user's own Helm.
            .env("HELM_CONFIG_HOME", "/nonexistent")
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    fn helm(&self, arguments: &[&str]) -> Output {
        self.run(self.helm, arguments)
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let output = self.run(self.kubectl, arguments);
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Renders with these values; `Err` is what Helm says.
    fn render(&self, values: &[&str]) -> Result<String, String> {
        let chart = chart();
        let mut arguments = vec![
            "template",
            "understudy",
            chart.to_str().unwrap(),
            "--namespace",
            NAMESPACE,
        ];
        for value in values {
            // JSON where it looks like it, so that lists and maps can be given.
            let json = value.contains("={") || value.contains("=[");
            arguments.extend([if json { "--set-json" } else { "--set" }, value]);
        }
        let output = self.helm(&arguments);
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }
}

fn documents(rendered: &str) -> Vec<Value> {
    rendered
        .split("\n---\n")
        .map(|document| {
            serde_saphyr::from_str::<Value>(document).unwrap_or_else(|error| panic!("{error}: {document}"))
        })
        .filter(|document| !document.is_null())
        .collect()
}

fn find<'a>(documents: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    documents
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
}

const MONITORS: [&str; 2] = ["servicemonitors", "podmonitors"];

/// Kind and name of an object.
type Named = (&'static str, &'static str);

/// Values, and what is there because of them.
const VARIANTS: [(&[&str], &[Named]); 8] = [
    (
        &[],
        &[
            ("Deployment", "understudy-operator"),
            ("DaemonSet", "understudy-agent"),
        ],
    ),
    (
        &[
            "monitoring.serviceMonitor=true",
            "monitoring.podMonitor=true",
            "monitoring.dashboard.enabled=true",
            "monitoring.labels.release=prometheus",
            "networkPolicy.enabled=true",
            "operator.podDisruptionBudget.enabled=true",
            "commonLabels.team=platform",
        ],
        &[
            ("ServiceMonitor", "understudy-operator"),
            ("PodMonitor", "understudy-agent"),
            ("ConfigMap", "understudy-dashboard"),
            ("NetworkPolicy", "understudy-operator"),
            ("PodDisruptionBudget", "understudy-operator"),
        ],
    ),
    (
        &[
            "networkPolicy.enabled=true",
            r#"networkPolicy.metricsFrom=[{"namespaceSelector":{"matchLabels":{"name":"monitoring"}}}]"#,
            r#"networkPolicy.egress=[{"ports":[{"port":6443}]}]"#,
        ],
        &[("NetworkPolicy", "understudy-operator")],
    ),
    (
        &["crds.keep=false", "rbac.aggregateClusterRoles=false"],
        &[("CustomResourceDefinition", "guests.understudy.dev")],
    ),
    (
        &[
            "operator.serviceAccount.create=false",
            "operator.serviceAccount.name=own-operator",
            "agent.serviceAccount.create=false",
            "agent.serviceAccount.name=own-agent",
            "admissionPolicy.enabled=true",
        ],
        &[("ValidatingAdmissionPolicyBinding", "understudy-agent")],
    ),
    (
        &[
            "fullnameOverride=us",
            "image.registry=registry.example.com/mirror",
            "operator.image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "agent.image.tag=0.1.1",
            r#"imagePullSecrets=[{"name":"registry"}]"#,
            r#"operator.tolerations=[{"operator":"Exists"}]"#,
            r#"operator.affinity={"nodeAffinity":{}}"#,
            "operator.priorityClassName=system-cluster-critical",
            r#"operator.extraArgs=["--writes-per-second=10"]"#,
            "operator.podAnnotations.a=b",
            "agent.podLabels.a=b",
        ],
        &[("Deployment", "us-operator"), ("DaemonSet", "us-agent")],
    ),
    (
        &[
            r#"agent.config.namespaces={"shop":{"bridges":["br0"],"paths":["/dev/vg0"]}}"#,
            "agent.config.credentials.provider=key-file",
            "agent.config.credentials.keyFile=/etc/understudy/key",
            "agent.server=https://10.0.0.1:6443",
            "agent.port=19465",
        ],
        &[("ConfigMap", "understudy-agent")],
    ),
    (
        &[
            "rbac.create=false",
            "operator.replicas=0",
            "operator.resources=null",
            "agent.resources=null",
        ],
        &[],
    ),
];

/// Values that are refused, with a word of what is said.
const REFUSED: [(&str, &str); 7] = [
    ("operator.replica=3", "replica"),
    ("operator.replicas=many", "replicas"),
    ("operator.image.digest=sha256:abc", "digest"),
    ("agent.config.namespaces.shop.bridge=br0", "bridge"),
    ("agent.config.host.saveTimeoutSeconds=1", "saveTimeoutSeconds"),
    (
        "agent.config.credentials.provider=key-file",
        "agent.config.credentials.keyFile names no file",
    ),
    (
        "agent.serviceAccount.create=false",
        "agent.serviceAccount.name is needed",
    ),
];

/// `helm lint` has nothing to say, and what is not a value is refused by name.
pub fn lint_is_clean_and_wrong_values_are_refused_by_name(tools: &Tools) {
    let lint = tools.helm(&["lint", "--strict", chart().to_str().unwrap()]);
    let said = String::from_utf8_lossy(&lint.stdout);
    assert!(
        lint.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&lint.stderr)
    );
    assert!(!said.contains("[WARNING]") && !said.contains("[ERROR]"), "{said}");
    for (value, words) in REFUSED {
        let error = tools.render(&[value]).expect_err(value);
        assert!(error.contains(words), "{value}: {error}");
    }
}

/// Every variant is taken by the API server, strictly, and is there where it should be.
pub fn every_variant_is_taken_by_the_api_server(tools: &Tools, scratch: &Path) {
    tools.kubectl(&["create", "namespace", NAMESPACE]);
    // Of the Prometheus operator only the names.
    for plural in MONITORS {
        let kind = if plural == MONITORS[0] {
            "ServiceMonitor"
        } else {
            "PodMonitor"
        };
        let file = scratch.join(plural);
        std::fs::write(&file, serde_json::json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.monitoring.coreos.com")},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced",
                "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind, "listKind": format!("{kind}List")},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                }}}],
            },
        }).to_string())
        .unwrap();
        tools.kubectl(&["apply", "-f", file.to_str().unwrap()]);
        tools.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "crd",
            &format!("{plural}.monitoring.coreos.com"),
        ]);
    }
    for (values, expected) in VARIANTS {
        let rendered = tools
            .render(values)
            .unwrap_or_else(|error| panic!("{values:?}: {error}"));
        let objects = documents(&rendered);
        for (kind, name) in expected {
            assert!(
                find(&objects, kind, name).is_some(),
                "{values:?}: no {kind} {name}"
            );
        }
        let file = scratch.join("rendered.yaml");
        std::fs::write(&file, &rendered).unwrap();
        tools.kubectl(&[
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            file.to_str().unwrap(),
        ]);
        for object in objects
            .iter()
            .filter(|object| object["kind"] == "CustomResourceDefinition")
        {
            let kept = object["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep";
            assert_eq!(kept, !values.contains(&"crds.keep=false"), "{values:?}");
        }
    }
    let without = documents(
        &tools
            .render(&["crds.enabled=false", "admissionPolicy.enabled=false"])
            .unwrap(),
    );
    assert!(
        without
            .iter()
            .all(|object| object["kind"] != "CustomResourceDefinition")
    );
    assert!(
        without
            .iter()
            .all(|object| object["kind"] != "ValidatingAdmissionPolicy")
    );
}

/// What reaches the nodes is what the agent reads, and says what the values say.
pub fn the_nodes_configuration_is_read_by_the_agent(tools: &Tools, scratch: &Path) {
    let load = |values: &[&str]| {
        let objects = documents(&tools.render(values).unwrap());
        let file = scratch.join("node.yaml");
        let config = find(&objects, "ConfigMap", "understudy-agent").unwrap();
        std::fs::write(&file, config["data"]["node.yaml"].as_str().unwrap()).unwrap();
        NodeConfig::load(Some(&file)).unwrap_or_else(|error| panic!("{values:?}: {error}"))
    };
    assert_eq!(load(&[]), NodeConfig::default());
    let config = load(&[
        r#"agent.config.namespaces={"shop":{"bridges":["br0"],"paths":["/dev/vg0"]}}"#,
        "agent.config.credentials.provider=key-file",
        "agent.config.credentials.keyFile=/etc/understudy/key",
        "agent.config.reservedMemoryMib=4096",
    ]);
    assert_eq!(config.policy("shop").bridges, ["br0"]);
    assert_eq!(config.policy("shop").paths, [Path::new("/dev/vg0")]);
    assert_eq!(
        config.credentials.key_file.as_deref(),
        Some(Path::new("/etc/understudy/key"))
    );
    assert_eq!(config.reserved_memory_mib, 4096);
}

/// The operator's Pod is as hardened as Pod Security's `restricted` asks, and the agent's is no more than it needs.
pub fn the_operators_pod_is_restricted(tools: &Tools, scratch: &Path) {
    let rendered = tools.render(&["crds.enabled=false"]).unwrap();
    let mut objects = documents(&rendered);
    objects.retain(|object| object["kind"] == "Deployment");
    let mut pod = objects.remove(0)["spec"]["template"].take();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "operator".into();
    pod["metadata"]["namespace"] = "restricted".into();
    // Not there: it would ask for a ServiceAccount of the namespace.
    pod["spec"].as_object_mut().unwrap().remove("serviceAccountName");
    pod["spec"]["automountServiceAccountToken"] = false.into();
    tools.kubectl(&["create", "namespace", "restricted"]);
    tools.kubectl(&[
        "label",
        "namespace",
        "restricted",
        "pod-security.kubernetes.io/enforce=restricted",
    ]);
    tools.kubectl(&["create", "serviceaccount", "default", "--namespace=restricted"]);
    let file = scratch.join("pod.json");
    std::fs::write(&file, pod.to_string()).unwrap();
    tools.kubectl(&["create", "--dry-run=server", "-f", file.to_str().unwrap()]);
    let container = &pod["spec"]["containers"][0]["securityContext"];
    assert_eq!(container["readOnlyRootFilesystem"], true);
}

/// Installs it for good, for the tests that follow.
pub fn install(tools: &Tools, values: &[&str]) {
    let said = understudy_tests::chart::install::install(tools.helm, tools.kubeconfig, values).unwrap();
    assert!(
        said.contains("kubectl get hosts"),
        "the notes do not say how to go on: {said}"
    );
    tools.kubectl(&[
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd",
        "guests.understudy.dev",
    ]);
}

/// Upgrading changes what it should; uninstalling leaves CRDs and guests, and installing again takes them up.
pub fn uninstalling_keeps_guests_and_installing_again_takes_them_up(tools: &Tools) {
    let chart = chart();
    let upgrade = tools.helm(&[
        "upgrade",
        "understudy",
        chart.to_str().unwrap(),
        "--namespace",
        NAMESPACE,
        "--set",
        "operator.replicas=3",
    ]);
    assert!(
        upgrade.status.success(),
        "{}",
        String::from_utf8_lossy(&upgrade.stderr)
    );
    let replicas = tools.kubectl(&[
        "get",
        "deployment",
        "understudy-operator",
        "--namespace",
        NAMESPACE,
        "-o",
        "jsonpath={.spec.replicas}",
    ]);
    assert_eq!(replicas, "3");
    let guests = || tools.kubectl(&["get", "guests", "-A", "-o", "name"]);
    let before = guests();
    assert!(!before.is_empty());
    let uninstall = tools.helm(&["uninstall", "understudy", "--namespace", NAMESPACE]);
    assert!(
        uninstall.status.success(),
        "{}",
        String::from_utf8_lossy(&uninstall.stderr)
    );
    assert_eq!(guests(), before);
    let left = tools.kubectl(&[
        "get",
        "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings",
        "-o",
        "name",
        "-l",
        "app.kubernetes.io/instance=understudy",
    ]);
    assert_eq!(left, "");
    install(tools, &[]);
    assert_eq!(guests(), before);
}
