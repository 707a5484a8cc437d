//! A machine with the node agent on it: this one where its KVM can run stock kernels, else a node VM.
//!
//! Demo, benches and end-to-end tests put manifests into a directory and read what the agent says, as a
//! user would, and know no more of where that happens than this file does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bed::{Images, NODE_BIN, NetNs, Node, Ssh, Stage, Status, cache_dir, wait_until};
use crate::kubelet;

/// Where the agent's own files and the guests' disks are on the machine.
const STATE: &str = "/var/lib/understudy";
const MANIFESTS: &str = "/etc/understudy/manifests";

/// Port of the ledger in the guest image.
pub const LEDGER_PORT: u16 = 7000;
/// Port of the counter in the guest image.
pub const COUNTER_PORT: u16 = 7001;

/// How often a condition on the machine is asked: often enough for people, seldom enough that asking
/// does not cost the emulated processors much.
const POLL: Duration = Duration::from_millis(500);

/// A machine with the node agent on it.
pub struct Machine {
    place: Place,
    netns: NetNs,
    images: Images,
    guest_image: String,
    binaries: PathBuf,
}

enum Place {
    /// A node VM.
    Node(Node),
    /// This machine, in the bed's network namespace; the agent is a child process.
    Here { dir: PathBuf, agent: Option<Child> },
}

impl Machine {
    /// The node VM of a stage.
    pub fn in_node(stage: &Stage, binaries: &Path) -> Machine {
        Machine {
            netns: stage.node.netns().clone(),
            guest_image: stage.guest_image.clone(),
            place: Place::Node(stage.node.clone()),
            images: stage.images.clone(),
            binaries: binaries.to_path_buf(),
        }
    }

    /// This machine.
    pub fn here(images: &Images, binaries: &Path) -> Result<Machine> {
        let dir = cache_dir().join("nodes").join("here");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let netns = NetNs::of(&dir);
        netns.up()?;
        Ok(Machine {
            place: Place::Here { dir, agent: None },
            netns,
            guest_image: images.guest_disk().display().to_string(),
            images: images.clone(),
            binaries: binaries.to_path_buf(),
        })
    }

    /// Why this machine's KVM cannot run a stock kernel; `None` where it can.
    pub fn why_not_here(binaries: &Path) -> Result<Option<String>> {
        let vmm = binaries.join("understudy-vmm");
        let output = Command::new(&vmm)
            .arg("check")
            .output()
            .with_context(|| format!("cannot run {}", vmm.display()))?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        Ok((!output.status.success()).then_some(said))
    }

    /// In a sentence, where this is.
    pub fn describe(&self) -> String {
        match &self.place {
            Place::Node(node) => format!("in node VM {} (QEMU, emulated SVM)", node.name()),
            Place::Here { .. } => "on this machine's /dev/kvm".to_owned(),
        }
    }

    /// The network that guests and clients share.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The node VM, where there is one.
    pub fn node(&self) -> Option<&Node> {
        match &self.place {
            Place::Node(node) => Some(node),
            Place::Here { .. } => None,
        }
    }

    /// The images it was made with.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// Runs a shell command line on the machine; it must succeed.
    pub fn sh(&self, line: &str) -> Result<String> {
        match &self.place {
            Place::Node(node) => node.ssh().run(line),
            Place::Here { .. } => {
                let output = self
                    .netns
                    .command("sh")
                    .args(["-c", line])
                    .output()
                    .context("cannot run sh")?;
                if !output.status.success() {
                    bail!(
                        "{line:?} failed: {}",
                        String::from_utf8_lossy(&output.stderr).trim()
                    );
                }
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
        }
    }

    /// Path of the agent's file or directory on the machine.
    fn path(&self, absolute: &str) -> String {
        match &self.place {
            Place::Node(_) => absolute.to_owned(),
            Place::Here { dir, .. } => format!("{}{absolute}", dir.display()),
        }
    }

    /// Path of one of our programs on the machine.
    pub fn program(&self, name: &str) -> String {
        match &self.place {
            Place::Node(_) => format!("{NODE_BIN}/{name}"),
            Place::Here { .. } => self.binaries.join(name).display().to_string(),
        }
    }

    /// Ends whatever an earlier run left: agent, VMMs, objects, disks.
    pub fn clear(&mut self) -> Result<()> {
        if let Place::Node(node) = &self.place {
            // An agent's Pod would go on with its work.
            kubelet::leave(node.ssh())?;
        }
        self.stop_agent()?;
        let (state, manifests) = (self.path(STATE), self.path(MANIFESTS));
        match &self.place {
            Place::Node(_) => self.sh(&format!(
                "systemctl stop 'understudy-vmm-*' 2>/dev/null; systemctl reset-failed 2>/dev/null
                 for tap in $(ip -br link | grep -o '^us[^ @]*'); do ip link del $tap; done
                 find {state} -mindepth 1 -maxdepth 1 ! -name images ! -name e2e ! -name lost+found -exec rm -rf {{}} +
                 rm -rf {manifests} /run/understudy /opt/understudy/current /opt/understudy/started.json /opt/understudy/[0-9]*; mkdir -p {manifests} {state}/disks/default"
            ))?,
            Place::Here { .. } => {
                let run = self.run_dir();
                self.sh(&format!(
                    "for s in {run}/guests/*/*/*/control.sock; do [ -S $s ] && curl -s -X PUT -d '{{}}' --unix-socket $s http://vmm/v1/vm/stop; done
                     rm -rf {state} {run} {manifests}; mkdir -p {manifests} {state}/disks/default {run}"
                ))?
            }
        };
        Ok(())
    }

    /// Where the agent keeps sockets: `guests/NAMESPACE/NAME/INCARNATION/control.sock` and others.
    pub fn run_dir(&self) -> String {
        match &self.place {
            Place::Node(_) => "/run/understudy".to_owned(),
            Place::Here { .. } => self.netns.run_dir().join("us").display().to_string(),
        }
    }

    /// Puts the agent's configuration on the machine and starts the agent.
    pub fn start_agent(&mut self) -> Result<()> {
        self.start_agent_with("")
    }

    /// As [`Machine::start_agent`], for a cluster that `access` leads to: the file that the agent's Pod writes.
    pub fn start_agent_on_cluster(&mut self, access: &Value) -> Result<()> {
        let Place::Node(node) = &self.place else {
            bail!("an agent on a cluster has a node VM");
        };
        let dir = format!("{STATE}/cluster");
        node.ssh().run(&format!("mkdir -p {dir}"))?;
        node.ssh()
            .write(&format!("{dir}/access.json"), &access.to_string())?;
        node.ssh().run(&format!("chmod 600 {dir}/access.json"))?;
        self.start_agent_with("mode: Cluster\n")
    }

    fn start_agent_with(&mut self, more: &str) -> Result<()> {
        let config = format!(
            "stateDir: {}\nrunDir: {}\nmanifestsDir: {}\ndisksDir: {}\nvmm: {}\nnamespaces:\n  default:\n    bridges: [br0]\n{more}",
            self.path(STATE),
            self.run_dir(),
            self.path(MANIFESTS),
            self.path(&format!("{STATE}/disks")),
            self.program("understudy-vmm"),
        );
        let (program, state) = (self.program("understudy-node"), self.path(STATE));
        match &mut self.place {
            Place::Node(node) => {
                node.ssh().run("mkdir -p /etc/understudy")?;
                node.ssh().write("/etc/understudy/node.yaml", &config)?;
                node.ssh().run(&format!(
                    "{program} install && systemctl restart understudy-node.service"
                ))?;
            }
            Place::Here { dir, agent } => {
                let file = dir.join("node.yaml");
                fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
                let log = fs::File::create(Path::new(&state).join("agent.log"))?;
                let child = self
                    .netns
                    .command(&program)
                    .args(["run", "--config"])
                    .arg(&file)
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .spawn()
                    .with_context(|| format!("cannot start {program}"))?;
                *agent = Some(child);
            }
        }
        wait_until("the node agent to answer", Duration::from_secs(60), POLL, || {
            Ok(self.status().ok())
        })?;
        Ok(())
    }

    /// Stops the agent, not its guests.
    pub fn stop_agent(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Node(node) => {
                node.ssh()
                    .run("systemctl stop understudy-node.service 2>/dev/null || true")?;
            }
            Place::Here { agent, .. } => {
                if let Some(mut child) = agent.take() {
                    let _ = child.kill();
                    child.wait().context("waiting for the agent to end")?;
                }
            }
        }
        Ok(())
    }

    /// Kills the agent (`kill -9`), not its guests. It stays down until [`Machine::start_agent`].
    pub fn kill_agent(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Node(node) => {
                node.ssh().run(
                    "systemctl kill -s KILL understudy-node.service; systemctl stop understudy-node.service",
                )?;
                Ok(())
            }
            Place::Here { .. } => self.stop_agent(),
        }
    }

    /// Has the agent kill itself at these points, `STEP:before` or `STEP:after`, once at each.
    pub fn halt_at(&self, points: &[&str]) -> Result<()> {
        let file = self.path(&format!("{STATE}/halt-at"));
        self.sh(&format!("printf '%s\\n' {} >{file}", points.join(" ")))?;
        Ok(())
    }

    /// The points of [`Machine::halt_at`] at which the agent has not been killed.
    pub fn halts_left(&self) -> Result<Vec<String>> {
        let text = self.sh(&format!("cat {}", self.path(&format!("{STATE}/halt-at"))))?;
        Ok(text
            .lines()
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// Deletes every SeamlessReboot and HostUpdate, their manifests first.
    pub fn forget_reboots(&self) -> Result<()> {
        let manifests = self.path(MANIFESTS);
        self.sh(&format!(
            "cd {manifests} && grep -lE 'kind: (SeamlessReboot|HostUpdate)' *.yaml | xargs -r rm --"
        ))?;
        let status = self.status()?;
        for kind in ["SeamlessReboot", "HostUpdate"] {
            for object in all(&status, kind) {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                self.sh(&self.agent_command(&format!("delete {} {name}", kind.to_lowercase())))?;
            }
        }
        Ok(())
    }

    /// Puts a fresh copy of the guest image where a Guest of the namespace `default` finds it as `name`.
    pub fn place_disk(&self, name: &str) -> Result<()> {
        let target = self.path(&format!("{STATE}/disks/default/{name}"));
        self.sh(&format!(
            "cp --sparse=always --reflink=auto {} {target}",
            self.guest_image
        ))?;
        Ok(())
    }

    /// Puts a manifest into the agent's directory; appears whole or not at all.
    pub fn apply(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path(&format!("{MANIFESTS}/{file}"));
        match &self.place {
            Place::Node(node) => {
                node.ssh().write(&format!("{path}.new"), text)?;
                self.sh(&format!("mv {path}.new {path}"))?;
            }
            Place::Here { .. } => {
                fs::write(format!("{path}.new"), text)?;
                fs::rename(format!("{path}.new"), &path)?;
            }
        }
        Ok(())
    }

    /// What the agent has logged of a guest of the namespace `default`.
    pub fn guest_log(&self, name: &str) -> Result<String> {
        self.sh(&format!(
            "cat {}",
            self.path(&format!("{STATE}/logs/default/{name}/agent.log"))
        ))
    }

    /// What `understudy-node status -o json` says.
    pub fn status(&self) -> Result<Value> {
        let text = self.sh(&self.agent_command("status -o json"))?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status is not JSON: {text}"))
    }

    /// A command line of `understudy-node` for the agent of this stage.
    pub fn agent_command(&self, arguments: &str) -> String {
        let config = match &self.place {
            Place::Node(_) => "/etc/understudy/node.yaml".to_owned(),
            Place::Here { dir, .. } => dir.join("node.yaml").display().to_string(),
        };
        format!(
            "{} {arguments} --config {config}",
            self.program("understudy-node")
        )
    }

    /// The same of a machine that may be rebooting: `None` while it does not answer. An error where it is down
    /// for good.
    pub fn status_if_up(&self) -> Result<Option<Value>> {
        if let Place::Node(node) = &self.place {
            node.ensure_not_lost()?;
            if node.status() == Status::Down {
                return Ok(None);
            }
        }
        Ok(self.status().ok())
    }

    /// One object of the agent: `kind` is `Guest` or `SeamlessReboot`, say.
    pub fn object(&self, kind: &str, name: &str) -> Result<Option<Value>> {
        Ok(find(&self.status()?, kind, name))
    }

    /// Waits until `condition` yields a value of the object.
    pub fn wait_for<T>(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Value) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut last = Value::Null;
        wait_until(&format!("{kind} {name}: {what}"), limit, POLL, || {
            let Some(object) = self.object(kind, name)? else {
                return Ok(None);
            };
            let found = condition(&object)?;
            last = object["status"].clone();
            Ok(found)
        })
        .with_context(|| format!("its status was {last}"))
    }

    /// Waits until a guest runs and its agent has told of a complete boot; returns its IPv4 address.
    pub fn wait_for_guest(&self, name: &str, limit: Duration) -> Result<String> {
        self.wait_for("Guest", name, "to be Ready with an address", limit, |guest| {
            if guest["status"]["phase"] == "Failed" {
                bail!("guest {name} failed: {}", condition_message(guest, "Ready"));
            }
            let ready = condition_is(guest, "Ready", "True");
            let address = guest["status"]["addresses"].as_array().and_then(|list| {
                list.iter()
                    .filter_map(Value::as_str)
                    .find(|a| a.parse::<std::net::Ipv4Addr>().is_ok())
            });
            Ok(address.filter(|_| ready).map(str::to_owned))
        })
    }

    /// A way into a guest, from outside.
    pub fn guest(&self, address: &str) -> Ssh {
        Ssh::new(&self.netns, address, &self.images.cache.join("ssh/id_ed25519"))
    }

    /// One of our clients, to run outside in the guests' network.
    pub fn client(&self, program: &str) -> Command {
        self.netns.command(self.binaries.join(program))
    }

    /// Copies the logs of all parts into `to`: the agent's, each VMM's and console's, the node's console.
    pub fn collect_logs(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
        match &self.place {
            Place::Node(node) => {
                let journal = node
                    .ssh()
                    .run("journalctl --no-pager -o short-iso-precise | tail -20000")?;
                fs::write(to.join("node-journal.log"), journal)?;
                fs::copy(node.console_log(), to.join("node-console.log"))?;
                let logs = self.sh(&format!(
                    "cd {STATE}; find logs operations updates objects -type f -size -4M 2>/dev/null || true"
                ))?;
                for name in logs.lines() {
                    let text = self.sh(&format!("cat {STATE}/{name}"))?;
                    let file = to.join(name);
                    if let Some(folder) = file.parent() {
                        fs::create_dir_all(folder)?;
                    }
                    fs::write(file, text)?;
                }
            }
            Place::Here { .. } => {
                // Disks are not logs.
                self.sh(&format!(
                    "cd {} && find agent.log logs operations objects -type f -size -4M -exec cp --parents -t {} {{}} +",
                    self.path(STATE),
                    to.display()
                ))?;
            }
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Place::Here {
            agent: Some(child), ..
        } = &mut self.place
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The objects of a kind in what `status -o json` prints.
pub fn all<'a>(status: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    let items = status["items"].as_array().map_or(&[][..], Vec::as_slice);
    items.iter().filter(move |object| object["kind"] == kind)
}

/// An object in what `status -o json` prints.
pub fn find(status: &Value, kind: &str, name: &str) -> Option<Value> {
    all(status, kind)
        .find(|object| object["metadata"]["name"] == name)
        .cloned()
}

/// Whether the condition of this type has this status.
pub fn condition_is(object: &Value, kind: &str, status: &str) -> bool {
    condition(object, kind).is_some_and(|c| c["status"] == status)
}

/// Reason and message of a condition, for people.
pub fn condition_message(object: &Value, kind: &str) -> String {
    match condition(object, kind) {
        Some(c) => format!(
            "{}: {}",
            c["reason"].as_str().unwrap_or(""),
            c["message"].as_str().unwrap_or("")
        ),
        None => format!("no condition {kind}"),
    }
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"]
        .as_array()?
        .iter()
        .find(|c| c["type"] == kind)
}
