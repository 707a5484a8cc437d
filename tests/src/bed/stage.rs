//! A stage: a node that is up, with current binaries and the current guest image in it. End-to-end
//! tests, demo and benches all begin here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{End, Firmware, Images, Node, NodeOptions, Status, repository};

/// Binaries that a node needs, as cargo names them.
const ON_NODE: [&str; 5] = [
    "understudy-vmm",
    "understudy-node",
    "understudy-guest",
    "understudy-ledger",
    "understudy-counter",
];
/// Those of them that go into the guest image.
const IN_GUEST: [&str; 3] = ["understudy-guest", "understudy-ledger", "understudy-counter"];

/// The pristine guest image on a node.
pub const GUEST_IMAGE: &str = "/var/lib/understudy/images/guest.ext4";

/// Where binaries are on a node.
pub const NODE_BIN: &str = "/opt/understudy/bin";

/// A node that is up and ours alone.
pub struct Stage {
    /// The node.
    pub node: Node,
    /// The images in use.
    pub images: Images,
    /// Path of the pristine guest image on the node; to be copied, never written.
    pub guest_image: String,
    /// The node boots again when it resets itself.
    pub firmware: Firmware,
    /// Held as long as the stage is used.
    _lock: File,
}

impl Stage {
    /// Brings the node of this name to where tests can begin. `binaries` is the directory of static
    /// binaries; what has not changed is not copied again.
    pub fn set(name: &str, binaries: &Path) -> Result<Self> {
        Stage::set_with(name, binaries, |node, images| {
            node.up(images, &NodeOptions::default(), false)
        })
    }

    /// The same on a new root disk: the node runs its image's kernel, the older one.
    pub fn set_anew(name: &str, binaries: &Path) -> Result<Self> {
        Stage::set_with(name, binaries, |node, images| {
            node.up_with_new_root(images, &NodeOptions::default())?;
            Ok(true)
        })
    }

    fn set_with(name: &str, binaries: &Path, up: fn(&Node, &Images) -> Result<bool>) -> Result<Self> {
        let node = Node::named(name)?;
        let lock = node.lock()?;
        let images = Images::build(binaries, &["qemu", "node", "guest-base"])?;
        let started = Instant::now();
        if up(&node, &images)? {
            report("node up", started);
        }
        let there = push_binaries(&node, binaries)?;
        install_guest(&node, &images, &there)?;
        Ok(Self {
            firmware: Firmware::of(&node, &images, &NodeOptions::default()),
            node,
            images,
            guest_image: GUEST_IMAGE.to_owned(),
            _lock: lock,
        })
    }

    /// Switches the node on where its power was cut or the emulator lost it, and waits for it where it is
    /// rebooting.
    pub fn power_on(&self) -> Result<()> {
        self.firmware.check()?;
        if self.node.status() == Status::Down && self.node.end() == End::Reset {
            return self.node.wait_for_ssh();
        }
        self.node.up(&self.images, &NodeOptions::default(), false)?;
        Ok(())
    }

    /// The directory of static binaries beside the running program: `target/TRIPLE/PROFILE`, also when
    /// the program is a test in `deps/`.
    pub fn binaries() -> Result<PathBuf> {
        let program = std::env::current_exe().context("cannot find this program's own path")?;
        let dir = program.parent().context("this program has no directory")?;
        let dir = if dir.ends_with("deps") {
            dir.parent().unwrap_or(dir)
        } else {
            dir
        };
        Ok(dir.to_path_buf())
    }
}

fn report(what: &str, started: Instant) {
    eprintln!("  {what}: {:.1} s", started.elapsed().as_secs_f64());
}

/// Copies what has changed and returns the list of what is there: `SHA256 NAME` lines. The node
/// keeps that list, so that nothing is hashed there.
fn push_binaries(node: &Node, binaries: &Path) -> Result<String> {
    let list = format!("{NODE_BIN}/.pushed");
    let there = node.ssh().output(&format!("cat {list}"))?.stdout;
    let mut now = String::new();
    let scratch = repository().join("target/bed/push");
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    for name in ON_NODE {
        let binary = binaries.join(name);
        if !binary.exists() {
            bail!("{} is missing: 'make build' builds it", binary.display());
        }
        let entry = format!("{} {name}", sha256(&binary)?);
        if !there.lines().any(|line| line == entry) {
            let started = Instant::now();
            let small = scratch.join(format!("{name}.{}", std::process::id()));
            // Line tables are most of a development build and of no use over there.
            let status = Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .arg(&small)
                .arg(&binary)
                .status();
            if !status.is_ok_and(|status| status.success()) {
                bail!("cannot run strip on {} (package binutils)", binary.display());
            }
            node.ssh().push(&small, &format!("{NODE_BIN}/{name}"), 0o755)?;
            fs::remove_file(&small)?;
            report(&format!("{name} into node"), started);
        }
        now.push_str(&entry);
        now.push('\n');
    }
    if now != there {
        node.ssh().write(&list, &now)?;
    }
    Ok(now)
}

/// Makes the pristine guest image on the node: the base is brought once, our programs are put in
/// whenever they change. A note beside the image, written last, says what is in it.
fn install_guest(node: &Node, images: &Images, binaries: &str) -> Result<()> {
    let base = images.base_name();
    let programs = binaries
        .lines()
        .filter(|line| IN_GUEST.iter().any(|name| line.ends_with(name)));
    let wanted: String = std::iter::once(base.as_str())
        .chain(programs)
        .map(|line| format!("{line}\n"))
        .collect();
    let note = format!("{GUEST_IMAGE}.note");
    let there = node.ssh().output(&format!("cat {note}"))?.stdout;
    if there == wanted {
        return Ok(());
    }
    let started = Instant::now();
    if there.lines().next() != Some(base.as_str()) {
        node.ssh().run("rm -rf /var/lib/understudy/images")?;
        let pushed = node.push_image(&images.base_disk(), &base)?;
        node.ssh().run(&format!("mv {pushed} {GUEST_IMAGE}"))?;
    }
    let script = repository().join("tests/bed/guest-install.sh");
    node.ssh()
        .push(&script, "/opt/understudy/guest-install.sh", 0o755)?;
    node.ssh().write(&note, &format!("{base}\n"))?;
    node.ssh().run(&format!(
        "/opt/understudy/guest-install.sh {GUEST_IMAGE} {NODE_BIN} && sync {GUEST_IMAGE}"
    ))?;
    node.ssh().write(&note, &wanted)?;
    report("guest image on node", started);
    Ok(())
}

/// SHA-256 of a file, in hexadecimal digits.
pub fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg("-b")
        .arg(file)
        .output()
        .context("cannot run sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.split_whitespace().next() {
        Some(hash) if output.status.success() => Ok(hash.trim_start_matches('\\').to_owned()),
        _ => bail!(
            "cannot hash {}: {}",
            file.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    }
}
