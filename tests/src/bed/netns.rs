//! A network of one's own: a namespace with a bridge and a DHCP server, so that nothing that tests
//! do reaches the machine's network, and no user-mode network stack ends connections on the way.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Address of the bridge, and so of every client that runs in the namespace.
pub const GATEWAY: &str = "10.77.0.1";
const PREFIX: u8 = 24;
/// Guests get leases from here; nodes have fixed addresses below.
const LEASES: &str = "10.77.0.100,10.77.0.250,255.255.255.0,12h";
const BRIDGE: &str = "br0";

/// A network namespace of the bed.
#[derive(Clone, Debug)]
pub struct NetNs {
    name: String,
    run: PathBuf,
}

impl NetNs {
    /// The namespace of the instance in `dir`. The name follows from the directory, so that two
    /// checkouts do not share one by accident. Creates nothing.
    pub fn of(dir: &Path) -> Self {
        // FNV-1a: the name needs to be stable and short, not secret.
        let hash = dir
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
        let name = format!("us-{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff));
        let run = Path::new("/run/understudy-bed").join(&name);
        Self { name, run }
    }

    /// Its name, as in `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Directory for sockets of what runs here (short, since socket paths are limited).
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    /// A command that runs inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// True when the namespace exists.
    pub fn exists(&self) -> bool {
        Path::new("/run/netns").join(&self.name).exists()
    }

    /// Makes namespace, bridge and DHCP server where they are missing.
    pub fn up(&self) -> Result<()> {
        std::fs::create_dir_all(&self.run)
            .with_context(|| format!("cannot create {} (the test bed needs root)", self.run.display()))?;
        if !self.exists() {
            run(Command::new("ip").args(["netns", "add", &self.name]))?;
        }
        if !quiet(self.command("ip").args(["link", "show", BRIDGE]))? {
            run(self.command("ip").args(["link", "set", "lo", "up"]))?;
            run(self.command("ip").args([
                "link",
                "add",
                BRIDGE,
                "type",
                "bridge",
                "stp_state",
                "0",
                "forward_delay",
                "0",
            ]))?;
            run(self
                .command("ip")
                .args(["addr", "add", &format!("{GATEWAY}/{PREFIX}"), "dev", BRIDGE]))?;
            run(self.command("ip").args(["link", "set", BRIDGE, "up"]))?;
            self.be_persistent()?;
        }
        if !self.dhcp_alive() {
            run(self
                .command("dnsmasq")
                .args([
                    "--conf-file=/dev/null",
                    "--user=root",
                    "--port=0",
                    "--bind-interfaces",
                    "--dhcp-authoritative",
                ])
                .arg(format!("--interface={BRIDGE}"))
                .arg(format!("--dhcp-range={LEASES}"))
                .arg(format!("--pid-file={}", self.dhcp_pid_file().display()))
                .arg(format!("--dhcp-leasefile={}", self.leases_file().display()))
                .arg(format!(
                    "--log-facility={}",
                    self.run.join("dnsmasq.log").display()
                )))?;
        }
        Ok(())
    }

    /// Has clients out here try again every four seconds at least while nobody answers, for a quarter of an hour,
    /// where the kernel has the setting (6.15). The default doubles the pause each time, so that what a client
    /// sees of an interruption is up to twice as long as it was. Where there is none, that is what is measured.
    fn be_persistent(&self) -> Result<()> {
        let set = |setting: &str| quiet(self.command("sysctl").args(["-q", "-w", setting]));
        // A connection is given up after so many tries, not after a time: their number comes first.
        if set("net.ipv4.tcp_retries2=255")? && !set("net.ipv4.tcp_rto_max_ms=4000")? {
            set("net.ipv4.tcp_retries2=15")?;
        }
        Ok(())
    }

    /// A tap on the bridge; an existing one is kept.
    pub fn tap(&self, name: &str) -> Result<()> {
        if !quiet(self.command("ip").args(["link", "show", name]))? {
            run(self.command("ip").args(["tuntap", "add", name, "mode", "tap"]))?;
        }
        run(self
            .command("ip")
            .args(["link", "set", name, "master", BRIDGE, "up"]))
    }

    /// Has what runs in here reach `subnet` through a machine on the bridge.
    pub fn route(&self, subnet: &str, via: &str) -> Result<()> {
        run(self
            .command("ip")
            .args(["route", "replace", subnet, "via", via, "dev", BRIDGE]))
    }

    /// Has programs in here listen on an address that is no machine's on the bridge; who shall reach it has its route
    /// through the bridge's own.
    pub fn address(&self, address: &str) -> Result<()> {
        run(self
            .command("ip")
            .args(["addr", "replace", &format!("{address}/32"), "dev", "lo"]))
    }

    /// The address that the DHCP server has leased to `mac`, if any.
    pub fn lease(&self, mac: &str) -> Result<Option<String>> {
        let Ok(text) = std::fs::read_to_string(self.leases_file()) else {
            return Ok(None);
        };
        Ok(text.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (owner, address) = (fields.next()?, fields.next()?);
            owner.eq_ignore_ascii_case(mac).then(|| address.to_owned())
        }))
    }

    /// Ends the DHCP server and removes the namespace; nothing else may run in it any more.
    pub fn down(&self) -> Result<()> {
        if let Some(pid) = self.dhcp_pid() {
            run(Command::new("kill").arg(pid.to_string()))?;
        }
        if self.exists() {
            run(Command::new("ip").args(["netns", "del", &self.name]))?;
        }
        if self.run.exists() {
            std::fs::remove_dir_all(&self.run)
                .with_context(|| format!("cannot remove {}", self.run.display()))?;
        }
        Ok(())
    }

    fn dhcp_pid_file(&self) -> PathBuf {
        self.run.join("dnsmasq.pid")
    }

    fn leases_file(&self) -> PathBuf {
        self.run.join("leases")
    }

    fn dhcp_pid(&self) -> Option<u32> {
        let pid = std::fs::read_to_string(self.dhcp_pid_file())
            .ok()?
            .trim()
            .parse()
            .ok()?;
        super::node::process_mentions(pid, &self.dhcp_pid_file()).then_some(pid)
    }

    fn dhcp_alive(&self) -> bool {
        self.dhcp_pid().is_some()
    }
}

/// Runs a command that must succeed; its standard error is part of the error.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Runs a command for its exit status alone.
fn quiet(command: &mut Command) -> Result<bool> {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    Ok(status.success())
}
