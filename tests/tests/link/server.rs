//! A real etcd and kube-apiserver on loopback, of binaries that `UNDERSTUDY_KUBE` names the directory of, with our CRDs
//! and with the rights that an agent has.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};
use understudy_node::cluster::Access;

const LIMIT: Duration = Duration::from_secs(90);
const ADMIN: &str = "administrator-of-the-tests";
/// Where the agents' Pods are.
pub const NAMESPACE: &str = "understudy-system";

/// What an agent may do, and nothing else.
const RIGHTS: &[(&str, &[&str], &[&str])] = &[
    (
        "understudy.dev",
        &["guests", "seamlessreboots", "nodeupdates"],
        &["get", "list", "watch"],
    ),
    (
        "understudy.dev",
        &[
            "guests/status",
            "seamlessreboots/status",
            "nodeupdates/status",
            "hosts/status",
        ],
        &["patch"],
    ),
    ("understudy.dev", &["hosts"], &["get", "create"]),
    ("events.k8s.io", &["events"], &["create"]),
];

pub struct Server {
    binaries: PathBuf,
    dir: tempfile::TempDir,
    port: u16,
    etcd_port: u16,
    etcd: Mutex<Option<Child>>,
    api: Mutex<Option<Child>>,
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Server {
    pub fn start(binaries: &Path) -> Result<Server> {
        let dir = tempfile::tempdir()?;
        for (arguments, what) in [
            (vec!["genrsa", "-out", "sa.key", "2048"], "a key"),
            (
                vec!["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"],
                "its public half",
            ),
        ] {
            let done = Command::new("openssl")
                .args(arguments)
                .current_dir(dir.path())
                .stderr(Stdio::null())
                .status()?;
            ensure!(done.success(), "openssl makes {what}");
        }
        fs::write(
            dir.path().join("tokens"),
            format!("{ADMIN},admin,admin,\"system:masters\"\n"),
        )?;
        let server = Server {
            binaries: binaries.to_owned(),
            dir,
            port: free_port()?,
            etcd_port: free_port()?,
            etcd: Mutex::default(),
            api: Mutex::default(),
        };
        let etcd = format!("http://127.0.0.1:{}", server.etcd_port);
        let peers = format!("http://127.0.0.1:{}", free_port()?);
        let child = server.spawn(
            "etcd-bin",
            &[
                "--data-dir=etcd",
                "--unsafe-no-fsync",
                &format!("--listen-client-urls={etcd}"),
                &format!("--advertise-client-urls={etcd}"),
                &format!("--listen-peer-urls={peers}"),
            ],
        )?;
        *server.etcd.lock().expect("not poisoned") = Some(child);
        server.start_api()?;
        Ok(server)
    }

    fn spawn(&self, name: &str, arguments: &[&str]) -> Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{name}.log")))?;
        Command::new(self.binaries.join(name))
            .args(arguments)
            .current_dir(self.dir.path())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}"))
    }

    pub fn start_api(&self) -> Result<()> {
        let child = self.spawn(
            "kube-apiserver",
            &[
                &format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
                &format!("--secure-port={}", self.port),
                "--cert-dir=certs",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--service-cluster-ip-range=10.0.0.0/24",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-account-key-file=sa.pub",
                "--service-account-signing-key-file=sa.key",
                "--token-auth-file=tokens",
                "--authorization-mode=Node,RBAC",
            ],
        )?;
        *self.api.lock().expect("not poisoned") = Some(child);
        let deadline = Instant::now() + LIMIT;
        let ready = || {
            Command::new("curl")
                .args(["-sk", "-m", "2", &format!("{}/readyz", self.url())])
                .output()
                .is_ok_and(|output| output.stdout == b"ok")
        };
        while !ready() {
            if Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("kube-apiserver.log"))?;
                let end: String = log
                    .lines()
                    .rev()
                    .take(20)
                    .map(|line| format!("{line}\n"))
                    .collect();
                bail!("the API server is not ready:\n{end}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    pub fn stop_api(&self) {
        end(&self.api);
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub fn admin(&self) -> Result<Client> {
        let mut config = Config::new(self.url().parse()?);
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(ADMIN.to_owned().into());
        Ok(Client::try_from(config)?)
    }

    /// CRDs, namespace, ServiceAccount and the agents' rights.
    pub async fn prepare(&self) -> Result<()> {
        let admin = self.admin()?;
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
        for entry in fs::read_dir(crds)? {
            let text = fs::read_to_string(entry?.path())?;
            let crd: Value = serde_saphyr::from_str(&text)?;
            make(&admin, "apiextensions.k8s.io/v1", "CustomResourceDefinition", crd).await?;
        }
        let rules: Vec<Value> = RIGHTS
            .iter()
            .map(|(group, resources, verbs)| json!({"apiGroups": [group], "resources": resources, "verbs": verbs}))
            .collect();
        let rbac = "rbac.authorization.k8s.io/v1";
        for (api, kind, object) in [
            ("v1", "Namespace", json!({"metadata": {"name": NAMESPACE}})),
            (
                "v1",
                "ServiceAccount",
                json!({"metadata": {"name": "agent", "namespace": NAMESPACE}}),
            ),
            (
                rbac,
                "ClusterRole",
                json!({"metadata": {"name": "agent"}, "rules": rules}),
            ),
            (
                rbac,
                "ClusterRoleBinding",
                json!({"metadata": {"name": "agent"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "agent"},
                "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": NAMESPACE}]}),
            ),
        ] {
            make(&admin, api, kind, object).await?;
        }
        // Until the API server serves our kinds.
        let resource = ApiResource::erase::<understudy_api::Guest>(&());
        let api: Api<DynamicObject> = Api::all_with(admin, &resource);
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = api.list(&Default::default()).await {
            ensure!(Instant::now() < deadline, "our kinds are not served: {error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// A node, and the access of its agent: the token is of a Pod on it, as the kubelet asks for.
    pub async fn node(&self, name: &str) -> Result<Access> {
        let admin = self.admin()?;
        let nodes: Api<Node> = Api::all(admin.clone());
        let node = json!({"metadata": {"name": name}});
        let node = nodes
            .create(&PostParams::default(), &serde_json::from_value(node)?)
            .await?;
        let pods: Api<Pod> = Api::namespaced(admin.clone(), NAMESPACE);
        let pod = json!({"metadata": {"name": format!("agent-{name}")}, "spec": {
            "nodeName": name, "serviceAccountName": "agent", "containers": [{"name": "agent", "image": "agent"}]}});
        let pod = pods
            .create(&PostParams::default(), &serde_json::from_value(pod)?)
            .await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(admin, NAMESPACE);
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: Vec::new(),
                expiration_seconds: Some(3600),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name,
                    uid: pod.metadata.uid,
                }),
            },
            ..TokenRequest::default()
        };
        let token = accounts
            .create_token_request("agent", &PostParams::default(), &request)
            .await?;
        Ok(Access {
            server: self.url(),
            ca_data: fs::read_to_string(self.dir.path().join("certs/apiserver.crt"))?,
            token: token.status.context("a token")?.token,
            node_name: name.to_owned(),
            node_uid: node.metadata.uid.context("a UID")?,
            namespace: NAMESPACE.to_owned(),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // In this order: without etcd the API server does not end.
        end(&self.api);
        end(&self.etcd);
    }
}

fn end(child: &Mutex<Option<Child>>) {
    if let Some(mut child) = child.lock().expect("not poisoned").take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The API of a kind, as an administrator uses it.
pub fn api(client: &Client, version: &str, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Makes an object.
pub async fn make(client: &Client, version: &str, kind: &str, mut object: Value) -> Result<DynamicObject> {
    object["apiVersion"] = version.into();
    object["kind"] = kind.into();
    let object: DynamicObject = serde_json::from_value(object)?;
    let api = api(client, version, kind, object.metadata.namespace.as_deref());
    let made = api.create(&PostParams::default(), &object).await;
    made.with_context(|| format!("making {kind} {:?}", object.metadata.name))
}

/// Applies a status as one manager does.
pub async fn apply_status(
    api: &Api<DynamicObject>,
    kind: &str,
    name: &str,
    manager: &str,
    force: bool,
    status: Value,
) -> kube::Result<DynamicObject> {
    let mut params = PatchParams::apply(manager);
    params.force = force;
    let body = json!({"apiVersion": "understudy.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "status": status});
    api.patch_status(name, &params, &Patch::Apply(body)).await
}
