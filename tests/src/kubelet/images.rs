//! Container images for a node of the bed: ours, made by `understudy-image` as `make image` does, and the bed's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use understudy_image::{Identity, Image, Layout, layer};

/// Registry of the bed's own images.
pub const REGISTRY: &str = "bed.understudy.dev";
/// What is in ours.
const BINARIES: [&str; 3] = ["understudy", "understudy-node", "understudy-vmm"];
/// Holds a Pod's namespaces; containerd's configuration names it.
const PAUSE: Image = Image {
    name: "pause",
    description: "Holds the namespaces of a Pod",
    binaries: &["understudy-sleeper"],
    user: "65535:65535",
};
/// An ordinary Pod.
const SLEEPER: Image = Image {
    name: "sleeper",
    description: "Sleeps until it is asked to end",
    ..PAUSE
};

/// The bed's own images, `bed.understudy.dev/pause:1` and `bed.understudy.dev/sleeper:1`.
pub fn bed(binaries: &Path, dir: &Path) -> Result<PathBuf> {
    let stripped = dir.join("bed");
    strip(binaries, PAUSE.binaries, &stripped)?;
    let mut layout = Layout::new(Timestamp::UNIX_EPOCH);
    for image in [PAUSE, SLEEPER] {
        let identity = Identity {
            reference: format!("{REGISTRY}/{}:1", image.name),
            version: "1".to_owned(),
            revision: None,
        };
        layout.add(
            image,
            layer::build(image, &stripped, Timestamp::UNIX_EPOCH)?,
            &identity,
        )?;
    }
    let archive = dir.join("bed.tar");
    layout.write(&archive)?;
    Ok(archive)
}

/// Images of operator and agent from these binaries, tagged with the version that the binaries call themselves.
pub fn ours(binaries: &Path, dir: &Path) -> Result<PathBuf> {
    let stripped = dir.join("ours");
    strip(binaries, &BINARIES, &stripped)?;
    make(
        binaries,
        &stripped,
        env!("CARGO_PKG_VERSION"),
        &[],
        &dir.join("ours.tar"),
    )
}

/// The agent's image as a release after this one would bring it: the same programs but for the version that they call
/// themselves. `version` is as long as this one's.
pub fn next_agent(binaries: &Path, dir: &Path, version: &str) -> Result<PathBuf> {
    let stripped = dir.join("next");
    strip(binaries, &BINARIES[1..], &stripped)?;
    for name in &BINARIES[1..] {
        let file = stripped.join(name);
        let mut content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let count = rename_version(&mut content, env!("CARGO_PKG_VERSION"), version)?;
        ensure!(count > 0, "{name} does not know its version");
        fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
    }
    make(binaries, &stripped, version, &["agent"], &dir.join("next.tar"))
}

fn make(binaries: &Path, from: &Path, tag: &str, which: &[&str], archive: &Path) -> Result<PathBuf> {
    let program = binaries.join("understudy-image");
    let output = Command::new(&program)
        .arg("--binaries")
        .arg(from)
        .args(["--tag", tag, "--output"])
        .arg(archive)
        .args(which)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(archive.to_path_buf())
}

/// Copies without symbols: those of a development build are most of it.
fn strip(binaries: &Path, names: &[&str], to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for name in names {
        let binary = binaries.join(name);
        let status = Command::new("strip")
            .arg("-o")
            .arg(to.join(name))
            .arg(&binary)
            .status();
        if !status.is_ok_and(|status| status.success()) {
            bail!("cannot run strip on {} (package binutils)", binary.display());
        }
    }
    Ok(())
}

/// Replaces a version by another one of the same length; not where it is the end of a longer number, as in rules of
/// time zones. Returns how often.
fn rename_version(content: &mut [u8], old: &str, new: &str) -> Result<usize> {
    ensure!(
        old.len() == new.len(),
        "{new} must be as long as {old}: it takes its place"
    );
    let mut count = 0;
    for at in 0..content.len().saturating_sub(old.len()) {
        let is_whole = at == 0 || !content[at - 1].is_ascii_digit();
        if is_whole && content[at..].starts_with(old.as_bytes()) {
            content[at..at + new.len()].copy_from_slice(new.as_bytes());
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_renamed_where_it_stands_alone() {
        let mut text = b"agent0.1.0of M10.1.0, 0.1.0.".to_vec();
        assert_eq!(rename_version(&mut text, "0.1.0", "0.1.1").unwrap(), 2);
        assert_eq!(text, b"agent0.1.1of M10.1.0, 0.1.1.");
        assert!(rename_version(&mut text, "0.1.0", "0.1.10").is_err());
    }
}
