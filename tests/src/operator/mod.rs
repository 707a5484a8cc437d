//! The operator as it runs in a cluster, but for its Pod: the real binary, with the rights that the chart gives it and
//! no others, at a real API server whose audit log tells what it did.

mod agents;
mod audit;

pub use agents::{Agents, Machine};
pub use audit::{Audit, Event};

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{Stage, wait_until};
use crate::chart::install::{self, NAMESPACE};
use crate::control_plane::{ControlPlane, Options, Programs};

/// What the API server calls the operator.
pub const USER: &str = "system:serviceaccount:understudy:understudy-operator";
/// What the chart calls the operator: its account, its role and its Lease.
const NAME: &str = "understudy-operator";
/// Until a process that was started or asked to end has: a machine that builds is slow.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// A control plane with the chart, for operators.
pub struct Installed {
    /// The control plane; no controllers run.
    pub plane: ControlPlane,
    kubeconfig: PathBuf,
}

impl Installed {
    /// Starts a control plane in `dir` that keeps an audit log, and installs the chart.
    pub fn start(dir: &Path) -> Result<Installed> {
        let programs = Programs::build(&["helm"])?;
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let audit = audit::arguments(dir)?;
        let plane = ControlPlane::start(
            dir,
            Options {
                api_server_arguments: audit,
                ..Options::default()
            },
        )?;
        install::install(programs.path("helm")?, &plane.kubeconfig(), &[])?;
        let arguments = [
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "crd",
            "--all",
        ];
        plane.kubectl(&arguments)?;
        let token = plane.token(NAMESPACE, NAME)?;
        let kubeconfig = plane.write_token_kubeconfig(NAME, &token)?;
        Ok(Installed { plane, kubeconfig })
    }

    /// What happened at the API server so far.
    pub fn audit(&self) -> Result<Audit> {
        Audit::read(self.plane.dir())
    }

    /// Starts an operator that calls itself `identity`.
    pub fn operator(&self, identity: &str, arguments: &[&str]) -> Result<Operator> {
        let program = Stage::binaries()?.join("understudy");
        let log = self.plane.dir().join(format!("{identity}.log"));
        let file = || File::options().create(true).append(true).open(&log);
        let address = free_address()?;
        let child = Command::new(&program)
            .args(["run", "--namespace", NAMESPACE, "--lease", NAME])
            .args(["--identity", identity, "--log-format=text"])
            .arg(format!("--listen={address}"))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::null())
            .stdout(file().with_context(|| format!("cannot open {}", log.display()))?)
            .stderr(file().with_context(|| format!("cannot open {}", log.display()))?)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let mut operator = Operator { child, address, log };
        operator.wait("be ready", |operator| {
            Ok(operator.get("/readyz").is_ok_and(|answer| answer == "ok"))
        })?;
        Ok(operator)
    }
}

/// Nobody listens there at this moment.
fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
    listener.local_addr().context("a port without a number")
}

/// An operator that runs. It is killed when this is dropped.
pub struct Operator {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl Operator {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))
    }

    /// Waits until it leads.
    pub fn wait_until_it_leads(&mut self) -> Result<()> {
        self.wait("lead", |operator| {
            Ok(operator.metric("understudy_operator_leading")? == 1.0)
        })
    }

    /// Waits for something that it comes to; an error when it ends.
    pub fn wait(&mut self, what: &str, condition: impl Fn(&Operator) -> Result<bool>) -> Result<()> {
        let what = format!("the operator to {what}");
        wait_until(&what, LIMIT, POLL, || {
            if let Some(status) = self.child.try_wait().context("asking for the operator's state")? {
                bail!("the operator has ended ({status}), see {}", self.log.display());
            }
            Ok(condition(self)?.then_some(()))
        })
    }

    /// The sum of all samples of a metric; none is zero.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics")?;
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter(|line| {
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            line[..end] == *name
        });
        samples
            .map(|line| {
                let value = line.rsplit(' ').next().unwrap_or_default();
                value.parse::<f64>().with_context(|| format!("no number: {line}"))
            })
            .sum()
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address).context("the operator does not listen")?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        if !head.contains(" 200 ") {
            bail!("{path}: {head}");
        }
        Ok(body.to_owned())
    }

    /// Ends it at once, as `kill -9` does.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("killing the operator")?;
        self.child.wait().context("waiting for the operator to end")?;
        Ok(())
    }

    /// Asks it to end, as a kubelet does, and waits until it has.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("a process without an id")?, Signal::TERM)
            .context("signalling the operator")?;
        wait_until("the operator to end", LIMIT, POLL, || {
            self.child.try_wait().context("waiting for the operator to end")
        })
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Of one that has ended nothing is left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
