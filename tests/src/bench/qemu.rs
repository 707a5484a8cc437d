//! QEMU with all that it needs, in one directory that can be brought to another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bed::Ssh;

/// What a PC with a kernel of its own boots with, and where Debian's packages put it.
const FIRMWARE: [&str; 4] = [
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "multiboot_dma.bin",
];
const FIRMWARE_DIRS: [&str; 2] = ["/usr/share/seabios", "/usr/share/qemu"];
/// Every machine has these, and they belong together.
const BASE: [&str; 4] = ["libc.so", "libm.so", "ld-linux", "linux-vdso"];
const PROGRAM: &str = "qemu-system-x86_64";

/// Gathers it in `to`; returns what is there, relative to it.
pub fn gather(qemu: &Path, to: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut add = |from: &Path, name: PathBuf| -> Result<()> {
        let target = to.join(&name);
        let folder = target.parent().unwrap_or(to);
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::copy(from, &target).with_context(|| format!("cannot copy {}", from.display()))?;
        found.push(name);
        Ok(())
    };
    add(qemu, PROGRAM.into())?;
    for library in libraries(qemu)? {
        let name = library.file_name().context("a library without a name")?;
        add(&library, Path::new("lib").join(name))?;
    }
    for name in FIRMWARE {
        let from = FIRMWARE_DIRS.map(|dir| Path::new(dir).join(name));
        if let Some(from) = from.iter().find(|file| file.exists()) {
            add(from, Path::new("firmware").join(name))?;
        }
    }
    Ok(found)
}

/// Gathers it in a directory of another machine.
pub fn bring(qemu: &Path, ssh: &Ssh, to: &str) -> Result<()> {
    let here = tempfile::tempdir().context("cannot create a temporary directory")?;
    let files = gather(qemu, here.path())?;
    ssh.run(&format!("mkdir -p {to}/lib {to}/firmware"))?;
    for file in files {
        ssh.push(
            &here.path().join(&file),
            &format!("{to}/{}", file.display()),
            0o755,
        )?;
    }
    Ok(())
}

/// The shared libraries of a program, but those of [`BASE`].
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!(
            "ldd {}: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(text
        .lines()
        .filter(|line| !BASE.iter().any(|base| line.contains(base)))
        .filter_map(|line| line.split_once("=> "))
        .filter_map(|(_, path)| path.split_whitespace().next())
        .map(PathBuf::from)
        .collect())
}
