//! Changes that other programs make.

use std::path::Path;
use std::process::Command;

/// Changes a tree as another program would: the agent's own changes do not count.
pub fn sh(root: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-ec", script])
        .current_dir(root)
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}
