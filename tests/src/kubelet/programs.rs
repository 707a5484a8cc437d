//! kubelet, containerd and what belongs to them, as a file system image that the node mounts: several times faster there
//! than files over the emulated network.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bed::{Node, repository};
use crate::control_plane::Programs;

/// What `build.sh` calls the group, and its members.
const GROUP: &str = "node";
const NAMES: [&str; 9] = [
    "kubelet",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "bridge",
    "host-local",
    "loopback",
    "portmap",
];
/// Where the mount unit looks for the image.
const IMAGE: &str = "/var/lib/understudy/images/kubernetes.ext4";

/// Brings them and mounts them at `/opt/kubernetes`, with the bed's configuration copied into `/etc`. What is there
/// already is not copied again.
pub fn bring(node: &Node) -> Result<()> {
    let programs = Programs::build(&[GROUP])?;
    // The folder of a program has the hash of what it was built from in its name.
    let mut wanted = String::new();
    for name in NAMES {
        wanted.push_str(&format!("{}\n", programs.path(name)?.display()));
    }
    let (ssh, note) = (node.ssh(), format!("{IMAGE}.note"));
    if ssh.output(&format!("cat {note}"))?.stdout != wanted {
        let started = Instant::now();
        ssh.run(&format!(
            "umount /opt/kubernetes 2>/dev/null; rm -f {IMAGE} {note}"
        ))?;
        let image = make_image(&programs, &node.dir().join("kubernetes.ext4"))?;
        node.push_image(&image, "kubernetes.ext4")?;
        fs::remove_file(&image).with_context(|| format!("cannot remove {}", image.display()))?;
        ssh.write(&note, &wanted)?;
        eprintln!(
            "  kubelet and containerd into node: {:.1} s",
            started.elapsed().as_secs_f64()
        );
    }
    configure(node)?;
    ssh.run(
        "systemctl daemon-reload && systemctl start opt-kubernetes.mount
         mkdir -p /opt/cni && ln -sfn /opt/kubernetes/bin /opt/cni/bin
         modprobe overlay",
    )?;
    Ok(())
}

fn make_image(programs: &Programs, image: &Path) -> Result<std::path::PathBuf> {
    let content = image.with_extension("content");
    let bin = content.join("bin");
    if content.exists() {
        fs::remove_dir_all(&content)?;
    }
    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    let mut size = 0;
    for name in NAMES {
        let program = programs.path(name)?;
        size += fs::copy(program, bin.join(name))
            .with_context(|| format!("cannot copy {}", program.display()))?;
    }
    let _ = fs::remove_file(image);
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(&content)
        .arg(image)
        .arg(format!("{}M", (size >> 20) * 105 / 100 + 16))
        .output()
        .context("cannot run mke2fs (package e2fsprogs)")?;
    if !made.status.success() {
        bail!("mke2fs: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    fs::remove_dir_all(&content)?;
    Ok(image.to_path_buf())
}

/// Copies `tests/bed/kubernetes/node` over the node's root.
fn configure(node: &Node) -> Result<()> {
    let tree = repository().join("tests/bed/kubernetes/node");
    let tar = Command::new("tar")
        .arg("-C")
        .arg(&tree)
        .args(["--owner=0", "--group=0", "-c", "."])
        .output()
        .context("cannot run tar")?;
    if !tar.status.success() {
        bail!("{} cannot be packed", tree.display());
    }
    let archive = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    fs::write(archive.path(), tar.stdout)?;
    node.ssh()
        .push(archive.path(), "/run/kubernetes-node.tar", 0o600)?;
    node.ssh()
        .run("tar -C / --no-overwrite-dir -xf /run/kubernetes-node.tar && rm /run/kubernetes-node.tar")?;
    Ok(())
}
