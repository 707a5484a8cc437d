//! The images that nodes and guests start from, built by `tests/bed/images.sh`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{repository, script};

/// Where the images are and what is in them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Images {
    /// The cache that holds them.
    pub cache: PathBuf,
    /// The QEMU that nodes run in.
    pub qemu: PathBuf,
    /// Directory of the node image: `root.ext4`.
    pub node: PathBuf,
    /// Directory of the guest image before our programs are put in; the same files.
    pub guest_base: PathBuf,
    /// Directory of the guest image: `guest.ext4`, `vmlinuz`, `initrd.img`.
    pub guest: PathBuf,
    /// Kernel release that guest and node images boot.
    pub older_kernel: String,
    /// Kernel release whose package waits inside guest and node.
    pub newer_kernel: String,
    /// Path of that package inside them.
    pub newer_package: String,
}

impl Images {
    /// Builds what is missing or outdated and says where everything is. `binaries` is a directory
    /// with the static programs that go into the guest image; what it lacks the image lacks. `only` limits
    /// the work to `qemu`, `node`, `guest-base` or `guest`; empty means all.
    pub fn build(binaries: &Path, only: &[&str]) -> Result<Self> {
        let script = repository().join("tests/bed/images.sh");
        let out = repository().join("target/bed/images.json");
        script::ask(Command::new(&script).args(only).arg("--bin").arg(binaries), &out)
    }

    /// A name for the guest image without our programs that changes with its content.
    pub fn base_name(&self) -> String {
        let key = self
            .guest_base
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        format!("{key}.ext4")
    }

    /// True when this binary of ours was put into the guest image.
    pub fn guest_has(&self, binary: &str) -> bool {
        let meta = std::fs::read(self.guest.join("meta.json")).unwrap_or_default();
        let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap_or_default();
        meta["binaries"]
            .as_array()
            .is_some_and(|list| list.iter().any(|name| name == binary))
    }

    /// The root disk of a guest that has not booted yet.
    pub fn guest_disk(&self) -> PathBuf {
        self.guest.join("guest.ext4")
    }

    /// The same without our programs.
    pub fn base_disk(&self) -> PathBuf {
        self.guest_base.join("guest.ext4")
    }
}
