//! ext4 images on loop devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::root::run;

/// Makes an empty image.
pub fn make(image: &Path) {
    std::fs::File::create(image).unwrap().set_len(256 << 20).unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-F", image.to_str().unwrap()]);
}

/// An image that is mounted while this lives.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts `image` at `at`, which is made where it is not there.
    pub fn new(image: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let paths = [image.to_str().unwrap(), at.to_str().unwrap()];
        run("mount", &["-o", "loop,user_xattr,acl", paths[0], paths[1]]);
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It may have been unmounted already.
        let _ = Command::new("umount").arg("-lq").arg(&self.0).status();
    }
}
