//! `understudy-node pod`: what the DaemonSet's container runs. It brings the host service, keeps its access to the API
//! server fresh, and shows its logs, health and metrics. It owns nothing: at its end the service and the guests go on.

mod install;
mod on_host;
mod serve;
mod token;

use std::error::Error;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;

pub use on_host::{Entering, Host, HostError, become_command};

use self::install::{InstallError, Installer};
use self::serve::Service;
use self::token::{TokenError, claims};
use crate::agent::UNIT;
use crate::cluster::access::{self, Access, AccessError};

/// How often mounted files are looked at; the kubelet renews them within a minute or so of a change.
const LOOK: Duration = Duration::from_secs(2);
/// How soon the end is noticed.
const TICK: Duration = Duration::from_millis(100);
/// Pauses after the host could not be made as it shall be, or its journal not be followed.
const AGAIN: Duration = Duration::from_secs(10);

/// Arguments of `pod`.
#[derive(Clone, Debug, Args)]
pub struct Arguments {
    /// The host's root file system, as mounted into the container
    #[arg(
        long,
        value_name = "DIR",
        env = "UNDERSTUDY_HOST_ROOT",
        default_value = "/host"
    )]
    host_root: PathBuf,
    /// Where the image has understudy-node and understudy-vmm
    #[arg(long, value_name = "DIR", env = "UNDERSTUDY_IMAGE_DIR", default_value = "/")]
    image_dir: PathBuf,
    /// The node's configuration, as mounted from a ConfigMap; without it the defaults hold
    #[arg(
        long,
        value_name = "FILE",
        env = "UNDERSTUDY_NODE_CONFIG",
        default_value = "/etc/understudy/node.yaml"
    )]
    node_config: PathBuf,
    /// Directory with the ServiceAccount's token and ca.crt
    #[arg(
        long,
        value_name = "DIR",
        env = "UNDERSTUDY_SERVICE_ACCOUNT",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount"
    )]
    service_account: PathBuf,
    /// URL at which the host reaches the API server [default: https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT]
    #[arg(long, value_name = "URL", env = "UNDERSTUDY_SERVER")]
    server: Option<String>,
    /// The node's name, to be checked against that in the token
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Where health and metrics are served
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "UNDERSTUDY_LISTEN",
        default_value = "0.0.0.0:9465"
    )]
    listen: SocketAddr,
}

/// Why the Pod cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// A file of the ServiceAccount.
    #[error("reading {path}: {source}; is the ServiceAccount's token mounted?")]
    ServiceAccount {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is of another node.
    #[error("the ServiceAccount's token is of node {token:?}, and the Pod runs on {node:?}")]
    OtherNode {
        /// The token's.
        token: String,
        /// Ours.
        node: String,
    },
    /// The API server's address is not known.
    #[error(
        "where is the API server? KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; set --server"
    )]
    NoServer,
    /// The access could not be written.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The host is not as it shall be.
    #[error(transparent)]
    Install(#[from] InstallError),
}

/// Runs the Pod until SIGTERM or SIGINT.
pub fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let pod = Arc::new(Pod {
        arguments: arguments.clone(),
        host: Box::new(Entering::new()?),
        stop: stop.clone(),
        journal: Mutex::default(),
    });
    let config = pod.installer().config()?;
    let state_dir = serve::state_dir(&arguments.host_root, &config.state_dir);
    let service = Service {
        state_dir: state_dir.clone(),
    };
    // The service cannot start without it: what is wrong with it is told at once.
    pod.write_access(&state_dir)?;
    let listen = arguments.listen;
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map(drop)
    };
    spawn(
        "http",
        Box::new(move || {
            if let Err(error) = serve::serve(listen, service) {
                tracing::error!(%listen, %error, "health and metrics are not served");
                std::process::exit(1);
            }
        }),
    )?;
    spawn("access", {
        let pod = pod.clone();
        Box::new(move || pod.keep_access(&state_dir))
    })?;
    spawn("install", {
        let pod = pod.clone();
        Box::new(move || pod.keep_installed())
    })?;
    spawn("journal", {
        let pod = pod.clone();
        Box::new(move || pod.keep_journal())
    })?;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
    }
    pod.end_journal();
    tracing::info!("the Pod ends; the service and the guests go on");
    Ok(())
}

struct Pod {
    arguments: Arguments,
    host: Box<dyn Host>,
    stop: Arc<AtomicBool>,
    /// What shows the service's logs.
    journal: Mutex<Option<Child>>,
}

impl Pod {
    fn installer(&self) -> Installer<'_> {
        Installer {
            host_root: &self.arguments.host_root,
            image_dir: &self.arguments.image_dir,
            node_config: &self.arguments.node_config,
            version: env!("CARGO_PKG_VERSION"),
            host: &*self.host,
        }
    }

    /// Writes the service's access, where it is another than before.
    fn write_access(&self, state_dir: &Path) -> Result<(), PodError> {
        let access = read_access(&self.arguments)?;
        if access::write(state_dir, &access)? {
            tracing::info!(?access, "the service's access to the API server was renewed");
        }
        Ok(())
    }

    fn keep_access(&self, state_dir: &Path) {
        let mut told = String::new();
        while self.rest(LOOK) {
            match self.write_access(state_dir) {
                Ok(()) => told.clear(),
                Err(error) if error.to_string() == told => {}
                Err(error) => {
                    told = error.to_string();
                    tracing::error!("the service's access to the API server is not renewed: {told}");
                }
            }
        }
    }

    /// Makes the host as it shall be, at the start and when the configuration changes.
    fn keep_installed(&self) {
        let mut done: Option<Option<Vec<u8>>> = None;
        loop {
            let config = fs::read(&self.arguments.node_config).ok();
            if done.as_ref() != Some(&config) {
                match self.installer().settle(done.is_none()) {
                    Ok(_) => done = Some(config),
                    Err(error) => {
                        tracing::error!(
                            "the service is not installed as it shall be, this is tried again: {error}"
                        );
                        if !self.rest(AGAIN) {
                            return;
                        }
                        continue;
                    }
                }
            }
            if !self.rest(LOOK) {
                return;
            }
        }
    }

    /// Shows the service's logs as our own: `kubectl logs` is where people look.
    fn keep_journal(&self) {
        let mut lines = "50";
        loop {
            let command = [
                "journalctl",
                "--follow",
                "--output=cat",
                "--lines",
                lines,
                "--unit",
                UNIT,
            ];
            match self.host.follow(&command) {
                Ok(child) => {
                    *self.journal() = Some(child);
                    lines = "0";
                    while self.journal_runs() {
                        if !self.rest(TICK) {
                            self.end_journal();
                            return;
                        }
                    }
                }
                Err(error) => {
                    tracing::error!("the service's logs are not shown, this is tried again: {error}")
                }
            }
            if !self.rest(AGAIN) {
                return;
            }
        }
    }

    fn journal(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal_runs(&self) -> bool {
        let mut journal = self.journal();
        let runs = journal
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !runs {
            *journal = None;
        }
        runs
    }

    fn end_journal(&self) {
        if let Some(mut child) = self.journal().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits; `false` when the Pod ends.
    fn rest(&self, time: Duration) -> bool {
        let deadline = std::time::Instant::now() + time;
        while std::time::Instant::now() < deadline {
            if self.stop.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::sleep(TICK.min(time));
        }
        !self.stop.load(Ordering::Relaxed)
    }
}

/// What the kubelet has mounted.
fn read_access(arguments: &Arguments) -> Result<Access, PodError> {
    let read = |name: &str| {
        let path = arguments.service_account.join(name);
        fs::read_to_string(&path).map_err(|source| PodError::ServiceAccount { path, source })
    };
    let token = read("token")?.trim().to_owned();
    let claims = claims(&token)?;
    if let Some(node) = arguments
        .node_name
        .as_ref()
        .filter(|node| **node != claims.node_name)
    {
        return Err(PodError::OtherNode {
            token: claims.node_name,
            node: node.clone(),
        });
    }
    let server = match &arguments.server {
        Some(server) if !server.is_empty() => server.clone(),
        _ => {
            let variable = |name| {
                std::env::var(name)
                    .ok()
                    .filter(|value: &String| !value.is_empty())
            };
            let host = variable("KUBERNETES_SERVICE_HOST").ok_or(PodError::NoServer)?;
            let port = variable("KUBERNETES_SERVICE_PORT").ok_or(PodError::NoServer)?;
            // An IPv6 address.
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host
            };
            format!("https://{host}:{port}")
        }
    };
    Ok(Access {
        server,
        ca_data: read("ca.crt")?,
        token,
        node_name: claims.node_name,
        node_uid: claims.node_uid,
        namespace: claims.namespace,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &Path, node: &str) -> Arguments {
        Arguments {
            host_root: dir.join("host"),
            image_dir: dir.join("image"),
            node_config: dir.join("node.yaml"),
            service_account: dir.join("account"),
            server: Some("https://10.0.0.1:443".into()),
            node_name: Some(node.into()),
            listen: ([127, 0, 0, 1], 0).into(),
        }
    }

    #[test]
    fn the_access_is_what_the_token_says() {
        let dir = tempfile::tempdir().unwrap();
        let account = dir.path().join("account");
        let error = read_access(&arguments(dir.path(), "alpha"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("token"), "{error}");
        fs::create_dir(&account).unwrap();
        let token = token::tests::token(&serde_json::json!({"kubernetes.io": {
            "namespace": "understudy", "node": {"name": "alpha", "uid": "n"}}}));
        fs::write(account.join("token"), token.clone() + "\n").unwrap();
        fs::write(account.join("ca.crt"), "pem").unwrap();
        let access = read_access(&arguments(dir.path(), "alpha")).unwrap();
        assert_eq!(access.node_uid, "n");
        assert_eq!(access.token, token);
        assert_eq!(access.server, "https://10.0.0.1:443");
        assert!(matches!(
            read_access(&arguments(dir.path(), "beta")),
            Err(PodError::OtherNode { .. })
        ));
    }
}
