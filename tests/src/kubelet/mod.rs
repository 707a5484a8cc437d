//! A real kubelet, with containerd, on a node VM: it joins the control plane of a test, and Pods run.
//!
//! Pods are routed: each node has a subnet of theirs, which the node's network knows the way to. In the place of
//! kube-proxy the API server itself has the address of the service `kubernetes` ([`crate::control_plane::Options::pods`]).

pub mod images;
mod programs;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bed::{Node, Ssh, wait_until};
use crate::control_plane::ControlPlane;

/// Group of kubelets; their user is `system:node:NAME`.
const NODES: &str = "system:nodes";
const CONFIG: &str = "/etc/kubernetes";
/// A node is Ready 20 s after its kubelet was started, beside nothing else.
const READY: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(500);

/// A node of a cluster.
#[derive(Debug)]
pub struct Kubelet {
    node: Node,
    name: String,
}

impl Kubelet {
    /// Brings kubelet and containerd to the node VM, has them join the control plane under this name, and waits until
    /// the node is Ready. `archives` are container images, to be there from the start.
    pub fn join(
        node: &Node,
        plane: &ControlPlane,
        name: &str,
        archives: &[impl AsRef<Path>],
    ) -> Result<Kubelet> {
        let kubelet = Kubelet {
            node: node.clone(),
            name: name.to_owned(),
        };
        leave(node.ssh())?;
        programs::bring(node)?;
        kubelet.configure(plane)?;
        node.netns().route(&pods(node), &node.address())?;
        let ssh = node.ssh();
        ssh.run(
            "systemctl daemon-reload && systemctl enable -q containerd kubelet && systemctl start containerd",
        )?;
        for archive in archives {
            kubelet.import(archive.as_ref())?;
        }
        kubelet.start()?;
        kubelet.wait_until_ready(plane)?;
        Ok(kubelet)
    }

    /// Makes the images of an archive known to the node's containerd.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let key = super::bed::sha256(archive)?;
        let name = format!("{}.tar", key.get(..16).unwrap_or(&key));
        let pushed = self.node.push_image(archive, &name)?;
        // Content that is there already is not unpacked again.
        self.node.ssh().run(&format!(
            "/opt/kubernetes/bin/ctr --namespace k8s.io images import {pushed} && rm {pushed}"
        ))?;
        Ok(())
    }

    /// Waits until the API server calls the node Ready, by the word of this boot's kubelet.
    pub fn wait_until_ready(&self, plane: &ControlPlane) -> Result<()> {
        let boot = self.node.boot_id()?;
        wait_until(&format!("node {} to be Ready", self.name), READY, POLL, || {
            // There is no Node before the kubelet has made it.
            let Ok(node) = plane.get(&["node", &self.name]) else {
                return Ok(None);
            };
            let ready = crate::machine::condition_is(&node, "Ready", "True");
            Ok((ready && node["status"]["nodeInfo"]["bootID"] == boot.as_str()).then_some(()))
        })
        .with_context(|| self.tail())
    }

    /// The Node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Kills the kubelet (`kill -9`); Pods go on. It stays down until [`Kubelet::start`].
    pub fn kill(&self) -> Result<()> {
        self.node
            .ssh()
            .run("systemctl kill -s KILL kubelet; systemctl stop kubelet")?;
        Ok(())
    }

    /// Starts it where it does not run.
    pub fn start(&self) -> Result<()> {
        self.node.ssh().run("systemctl start kubelet")?;
        Ok(())
    }

    /// Ends kubelet, Pods and containerd. What Pods have put on the host stays.
    pub fn leave(&self) -> Result<()> {
        leave(self.node.ssh())
    }

    fn configure(&self, plane: &ControlPlane) -> Result<()> {
        let authority = plane.authority()?;
        let client = authority.client(&format!("system:node:{}", self.name), Some(NODES))?;
        let names = [self.name.clone(), self.node.address()];
        let serving = authority.server(&format!("kubelet-{}", self.name), &names)?;
        let ssh = self.node.ssh();
        for (file, local) in [
            ("ca.crt", &authority.certificate().certificate),
            ("client.crt", &client.certificate),
            ("client.key", &client.key),
            ("kubelet.crt", &serving.certificate),
            ("kubelet.key", &serving.key),
        ] {
            let text =
                fs::read_to_string(local).with_context(|| format!("cannot read {}", local.display()))?;
            ssh.write(&format!("{CONFIG}/{file}"), &text)?;
        }
        for (file, content) in [
            (
                format!("{CONFIG}/kubelet.kubeconfig"),
                kubeconfig(&plane.server()),
            ),
            (
                "/etc/cni/net.d/10-pods.conflist".to_owned(),
                network(&pods(&self.node)),
            ),
        ] {
            // JSON is YAML too.
            ssh.write(&file, &content.to_string())?;
        }
        ssh.write(
            &format!("{CONFIG}/kubelet.env"),
            &format!("NODE_NAME={}\nNODE_ADDRESS={}\n", self.name, self.node.address()),
        )
    }

    fn tail(&self) -> String {
        let line = "journalctl --no-pager -n 25 -u kubelet -u containerd";
        let said = self.node.ssh().output(line).map(|output| output.stdout);
        format!("kubelet and containerd said last:\n{}", said.unwrap_or_default())
    }
}

/// Ends what an earlier test's cluster left on a node: kubelet, Pods, containerd. Images stay.
pub fn leave(ssh: &Ssh) -> Result<()> {
    ssh.run(
        "[ -e /etc/systemd/system/kubelet.service ] || exit 0
         systemctl disable -q --now kubelet
         systemctl stop kubepods.slice
         if systemctl -q is-active containerd; then
             ctr='/opt/kubernetes/bin/ctr --namespace k8s.io'
             $ctr tasks ls -q | xargs -r $ctr tasks delete --force >/dev/null 2>&1
             $ctr containers ls -q | xargs -r $ctr containers delete >/dev/null 2>&1
         fi
         systemctl disable -q --now containerd
         awk '$2 ~ \"^/(run/containerd|run/netns/cni|var/lib/kubelet)\" { print $2 }' /proc/mounts | sort -r | xargs -r umount -l
         rm -rf /var/lib/kubelet /run/containerd /var/lib/cni /var/lib/containerd/io.containerd.grpc.v1.cri /run/netns/cni-*
         ip link show cni0 >/dev/null 2>&1 && ip link del cni0
         true",
    )?;
    Ok(())
}

fn kubeconfig(server: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bed", "cluster": {"server": server, "certificate-authority": format!("{CONFIG}/ca.crt")}}],
        "users": [{"name": "kubelet", "user": {
            "client-certificate": format!("{CONFIG}/client.crt"), "client-key": format!("{CONFIG}/client.key")}}],
        "contexts": [{"name": "bed", "context": {"cluster": "bed", "user": "kubelet"}}],
        "current-context": "bed",
    })
}

/// Subnet of a node's Pods: with the last number of its own address in it.
fn pods(node: &Node) -> String {
    let address = node.address();
    let number = address.rsplit('.').next().unwrap_or_default();
    format!("10.88.{number}.0/24")
}

/// A bridge of the node's own, without address translation.
fn network(pods: &str) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }],
    })
}
