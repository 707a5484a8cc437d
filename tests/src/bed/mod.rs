//! The test bed: images, and node VMs with real (emulated) hardware virtualisation.
//!
//! A [`Node`] is a QEMU process with emulated SVM in a [`NetNs`] of its own; inside it a stock
//! Debian loads `kvm_amd`, so that everything above runs against the real `/dev/kvm`. A node stays
//! up between test runs; that is what makes the inner loop short.

mod boot;
mod guest_check;
mod images;
mod lost;
mod netns;
mod node;
mod qmp;
pub mod script;
mod ssh;
mod stage;
mod wait;

pub use boot::{End, Firmware};
pub use guest_check::check_guest;
pub use images::Images;
pub use netns::{GATEWAY, NetNs};
pub(crate) use node::process_mentions;
pub use node::{Node, NodeOptions, Status};
pub use qmp::Qmp;
pub use ssh::{Output, Ssh};
pub use stage::{GUEST_IMAGE, NODE_BIN, Stage, sha256};
pub use wait::{Deadline, wait_until};

use std::path::{Path, PathBuf};

/// The root of the checkout that this was built from.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap_or_else(|_| PathBuf::from("."))
}

/// Where build products and instances live: `$UNDERSTUDY_CACHE`, else `/var/cache/understudy` where
/// the machine has it, else `target/bed` of the checkout. The same rule as in `tests/bed/lib.sh`.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("UNDERSTUDY_CACHE").filter(|dir| !dir.is_empty()) {
        return PathBuf::from(dir);
    }
    let shared = Path::new("/var/cache/understudy");
    if shared.is_dir() {
        shared.to_path_buf()
    } else {
        repository().join("target/bed")
    }
}
