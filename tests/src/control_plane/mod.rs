//! A real control plane: etcd and kube-apiserver, and on demand kube-controller-manager and kube-scheduler, in a
//! folder of its own, with certificates of its own.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use understudy_tests::control_plane::{ControlPlane, Options};
//! let plane = ControlPlane::start("/tmp/plane".as_ref(), Options::default())?;
//! plane.kubectl(&["get", "namespaces"])?;
//! # Ok(()) }
//! ```

mod certificates;
mod helm;
mod kubectl;
pub mod objects;
mod process;
mod programs;

pub use certificates::{Authority, Certificate};
pub use programs::Programs;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::bed::{NetNs, wait_until};
use process::{POLL, Process};

const ETCD: &str = "etcd";
const API_SERVER: &str = "kube-apiserver";
const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];
const KUBECTL: &str = "kubectl";
/// Until it is ready: 4 s on an idle machine, many times that on one that builds.
const READY: Duration = Duration::from_secs(180);
/// Until an API server that was asked to has ended; it lets requests finish.
const STOP: Duration = Duration::from_secs(20);
/// Where services have their addresses.
const SERVICES: &str = "10.96.0.0/16";
/// The first of them, that of the service `kubernetes`: what Pods know the API server by.
const SERVICE_ADDRESS: &str = "10.96.0.1";
/// Port of that service.
const SERVICE_PORT: u16 = 443;
/// Group of the members that may do everything.
const ADMINISTRATORS: &str = "system:masters";

/// What a control plane is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address that the API server listens on and announces.
    pub address: String,
    /// Network namespace in which everything runs, this machine's own when absent. In one of its own the ports are
    /// the usual ones: 6443 for the API server.
    pub netns: Option<NetNs>,
    /// Further names and addresses by which clients reach the API server.
    pub names: Vec<String>,
    /// Runs kube-controller-manager and kube-scheduler as well: Pods get a node, ServiceAccounts are made, owners
    /// that are gone take along what they own.
    pub controllers: bool,
    /// Pods run in this cluster and reach the API server by the service `kubernetes`: it listens on that service's
    /// address and port as well. Wants a network namespace.
    pub pods: bool,
    /// Further arguments of the API server.
    pub api_server_arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: "127.0.0.1".to_owned(),
            netns: None,
            names: Vec::new(),
            controllers: false,
            pods: false,
            api_server_arguments: Vec::new(),
        }
    }
}

/// A control plane that runs. It ends when this is dropped; its logs stay in its folder.
#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    options: Options,
    programs: Programs,
    ports: Ports,
    etcd: Option<Process>,
    api_server: Option<Process>,
    controllers: Vec<Process>,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    etcd: u16,
    etcd_peer: u16,
    api_server: u16,
}

impl ControlPlane {
    /// Builds what is missing, starts everything in `dir` and waits until the API server is ready. What an earlier
    /// control plane has stored in `dir` is there again.
    pub fn start(dir: &Path, options: Options) -> Result<Self> {
        let mut wanted = vec![ETCD, API_SERVER, KUBECTL];
        if options.controllers {
            wanted.extend(CONTROLLERS);
        }
        let programs = Programs::build(&wanted)?;
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        // Processes are told apart by this path.
        let dir = dir
            .canonicalize()
            .with_context(|| format!("cannot find {}", dir.display()))?;
        if is_up(&dir) {
            bail!("a control plane runs in {} already", dir.display());
        }
        let mut ports = Ports::choose(options.netns.is_some())?;
        if options.pods {
            let netns = options.netns.as_ref();
            netns
                .context("Pods reach an API server in a network namespace only")?
                .address(SERVICE_ADDRESS)?;
            ports.api_server = SERVICE_PORT;
        }
        let mut plane = Self {
            dir,
            options,
            programs,
            ports,
            etcd: None,
            api_server: None,
            controllers: Vec::new(),
        };
        plane.write_kubeconfig("admin", "admin", Some(ADMINISTRATORS))?;
        plane.start_etcd()?;
        plane.start_api_server()?;
        if plane.options.controllers {
            plane.start_controllers()?;
        }
        Ok(plane)
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the API server is: `https://ADDRESS:PORT`.
    pub fn server(&self) -> String {
        format!("https://{}:{}", self.options.address, self.ports.api_server)
    }

    /// A kubeconfig of a user who may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    /// The authority that the API server trusts and is known by.
    pub fn authority(&self) -> Result<Authority> {
        Authority::open(&self.dir.join("pki"))
    }

    /// Leaves everything running when this is dropped; [`stop`] ends it.
    pub fn detach(mut self) {
        self.etcd = None;
        self.api_server = None;
        self.controllers.clear();
    }

    /// Stops everything in order; what was stored stays.
    pub fn stop(mut self) -> Result<()> {
        self.stop_all()
    }

    /// Stops the API server as an administrator does: an outage of it begins.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.api_server
            .take()
            .map_or(Ok(()), |process| process.stop(STOP))
    }

    /// Ends the API server as a crash does.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.api_server.take().map_or(Ok(()), Process::kill)
    }

    /// Starts the API server where it does not run, and waits until it is ready. Its address is the one it had.
    pub fn start_api_server(&mut self) -> Result<()> {
        if self.api_server.is_some() {
            return Ok(());
        }
        let command = self.api_server_command()?;
        self.api_server = Some(Process::start(API_SERVER, &self.dir, command)?);
        self.wait_until_ready()
    }

    fn start_etcd(&mut self) -> Result<()> {
        let mut command = self.command(ETCD)?;
        let client = format!("http://127.0.0.1:{}", self.ports.etcd);
        let peer = format!("http://127.0.0.1:{}", self.ports.etcd_peer);
        command.arg("--data-dir").arg(self.dir.join("etcd")).args([
            // What a power cut loses here, nobody misses.
            "--unsafe-no-fsync",
            "--log-level=warn",
            &format!("--listen-client-urls={client}"),
            &format!("--advertise-client-urls={client}"),
            &format!("--listen-peer-urls={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
            &format!("--initial-cluster=default={peer}"),
        ]);
        self.etcd = Some(Process::start(ETCD, &self.dir, command)?);
        Ok(())
    }

    fn api_server_command(&self) -> Result<Command> {
        let authority = self.authority()?;
        let address = &self.options.address;
        let mut names = vec![
            address.clone(),
            "127.0.0.1".to_owned(),
            "localhost".to_owned(),
            SERVICE_ADDRESS.to_owned(),
            "kubernetes.default.svc".to_owned(),
        ];
        names.extend(self.options.names.iter().cloned());
        names.dedup();
        let serving = authority.server(API_SERVER, &names)?;
        let to_kubelets = authority.client("kube-apiserver-kubelet-client", Some(ADMINISTRATORS))?;
        let tokens = authority.token_key()?;
        let ca = authority.certificate().certificate;
        let mut command = self.command(API_SERVER)?;
        for (flag, file) in [
            ("tls-cert-file", &serving.certificate),
            ("tls-private-key-file", &serving.key),
            ("client-ca-file", &ca),
            ("service-account-key-file", &tokens.certificate),
            ("service-account-signing-key-file", &tokens.key),
            ("kubelet-client-certificate", &to_kubelets.certificate),
            ("kubelet-client-key", &to_kubelets.key),
            ("kubelet-certificate-authority", &ca),
        ] {
            command.arg(format!("--{flag}={}", file.display()));
        }
        command
            .args([
                &format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd),
                &format!(
                    "--bind-address={}",
                    if self.options.pods { "0.0.0.0" } else { address }
                ),
                &format!("--advertise-address={address}"),
                &format!("--secure-port={}", self.ports.api_server),
                &format!("--service-cluster-ip-range={SERVICES}"),
                "--service-account-issuer=https://kubernetes.default.svc",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                "--kubelet-preferred-address-types=InternalIP",
            ])
            .args(&self.options.api_server_arguments);
        Ok(command)
    }

    /// Waits for the API server to say that it is ready; fails at once when it or etcd ends.
    fn wait_until_ready(&mut self) -> Result<()> {
        let mut ready = self.kubectl_command()?;
        ready.args(["get", "--raw=/readyz", "--request-timeout=5s"]);
        let result = wait_until("the API server to be ready", READY, POLL, || {
            for process in [&mut self.etcd, &mut self.api_server].into_iter().flatten() {
                process.must_run()?;
            }
            let output = ready.output().context("cannot run kubectl")?;
            Ok(output.status.success().then_some(()))
        });
        let tail = || self.api_server.as_ref().map(Process::tail).unwrap_or_default();
        result.with_context(|| {
            format!(
                "the control plane in {} did not start\n{}",
                self.dir.display(),
                tail()
            )
        })
    }

    fn start_controllers(&mut self) -> Result<()> {
        let authority = self.authority()?;
        let (ca, tokens) = (authority.certificate(), authority.token_key()?);
        for name in CONTROLLERS {
            let kubeconfig = self.write_kubeconfig(name, &format!("system:{name}"), None)?;
            let mut command = self.command(name)?;
            command
                .arg(format!("--kubeconfig={}", kubeconfig.display()))
                .args([
                    // There is one of each, and nobody asks for its metrics.
                    "--leader-elect=false",
                    "--secure-port=0",
                ]);
            if name == CONTROLLERS[0] {
                command.arg("--use-service-account-credentials=true");
                for (flag, file) in [
                    ("service-account-private-key-file", &tokens.key),
                    ("root-ca-file", &ca.certificate),
                    ("cluster-signing-cert-file", &ca.certificate),
                    ("cluster-signing-key-file", &ca.key),
                ] {
                    command.arg(format!("--{flag}={}", file.display()));
                }
            }
            self.controllers.push(Process::start(name, &self.dir, command)?);
        }
        // The controllers' first visible work; Pods are refused before it.
        let mut probe = self.kubectl_command()?;
        probe.args(["get", "serviceaccount", "default", "--namespace=default"]);
        let result = wait_until("the default ServiceAccount", READY, POLL, || {
            for process in &mut self.controllers {
                process.must_run()?;
            }
            let output = probe.output().context("cannot run kubectl")?;
            Ok(output.status.success().then_some(()))
        });
        let tail = || self.controllers.first().map(Process::tail).unwrap_or_default();
        result.with_context(|| format!("kube-controller-manager does nothing\n{}", tail()))
    }

    /// A program of ours, inside the network namespace.
    fn command(&self, name: &str) -> Result<Command> {
        let path = self.programs.path(name)?;
        Ok(match &self.options.netns {
            Some(netns) => netns.command(path),
            None => Command::new(path),
        })
    }

    /// The API server goes first: without etcd it does not react to being asked.
    fn stop_all(&mut self) -> Result<()> {
        let controllers = self.controllers.drain(..).map(|process| process.stop(STOP));
        let stopped = controllers.collect::<Result<Vec<()>>>();
        let api_server = self.stop_api_server();
        let etcd = self.etcd.take().map_or(Ok(()), |process| process.stop(STOP));
        stopped.map(drop).and(api_server).and(etcd)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Err(error) = self.stop_all() {
            eprintln!("warning: the control plane in {}: {error:#}", self.dir.display());
        }
    }
}

/// Whether a control plane runs in `dir`, whoever started it.
pub fn is_up(dir: &Path) -> bool {
    let Ok(dir) = dir.canonicalize() else {
        return false;
    };
    [API_SERVER, ETCD]
        .iter()
        .any(|name| Process::find(name, &dir).is_some())
}

/// Stops what runs in `dir`, whoever started it.
pub fn stop(dir: &Path) -> Result<()> {
    let Ok(dir) = dir.canonicalize() else {
        return Ok(());
    };
    for name in CONTROLLERS.into_iter().rev().chain([API_SERVER, ETCD]) {
        if let Some(process) = Process::find(name, &dir) {
            process.stop(STOP)?;
        }
    }
    Ok(())
}

impl Ports {
    /// Ports that nobody uses at this moment.
    fn choose(own_network: bool) -> Result<Self> {
        if own_network {
            return Ok(Self {
                etcd: 2379,
                etcd_peer: 2380,
                api_server: 6443,
            });
        }
        // Held until all are known, so that they differ.
        let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0"));
        let mut ports = [0; 3];
        for (port, listener) in ports.iter_mut().zip(&listeners) {
            let listener = listener
                .as_ref()
                .map_err(|error| anyhow::anyhow!("no free port: {error}"))?;
            *port = listener.local_addr().context("a port without a number")?.port();
        }
        let [etcd, etcd_peer, api_server] = ports;
        Ok(Self {
            etcd,
            etcd_peer,
            api_server,
        })
    }
}
