//! `install`: puts the agent into the root of an image, or of the running system.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::generator;

const BINARY: &str = "usr/lib/understudy/understudy-guest";
const UNIT_DIR: &str = "usr/lib/systemd/system";
const UNIT: &str = "understudy-guest.service";
const SLICE: &str = "understudy.slice";
const UNIT_TEXT: &str = include_str!("../systemd/understudy-guest.service");
const SLICE_TEXT: &str = include_str!("../systemd/understudy.slice");

/// Why the agent could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The directory is no root of a system with systemd.
    #[error(
        "{0} is not the root of a system with systemd: {0}/usr/lib/systemd/systemd is missing; name the directory in which the image's root file system is mounted or unpacked"
    )]
    NotARoot(PathBuf),
    /// A path below the root leads out of it.
    #[error(
        "{0} leads out of the root by a symbolic link; remove the link or install inside the running guest with --root /"
    )]
    Escapes(PathBuf),
    /// A file could not be read or written.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// systemctl failed in the running system.
    #[error("systemctl {arguments} failed: {problem}; the files are installed, a reboot starts the agent")]
    Systemctl {
        /// What was called.
        arguments: String,
        /// Why it failed.
        problem: String,
    },
}

/// Installs the running binary below `root`; returns what was changed. Doing it again changes nothing; a
/// newer binary replaces the older one. In the running system (`/`) the service is (re)started.
pub fn install(root: &Path) -> Result<Vec<PathBuf>, InstallError> {
    if !root.join("usr/lib/systemd/systemd").exists() {
        return Err(InstallError::NotARoot(root.to_owned()));
    }
    let mut own = Vec::new();
    let source = Path::new("/proc/self/exe");
    fs::File::open(source)
        .and_then(|mut f| f.read_to_end(&mut own))
        .map_err(|source| InstallError::File {
            what: "reading",
            path: "/proc/self/exe".into(),
            source,
        })?;
    let mut changed = Vec::new();
    // Made now, so that nothing has to be made beside the guest's data later.
    directory(root, Path::new("var/lib/understudy/any"))?;
    put_file(root, BINARY, &own, 0o755, &mut changed)?;
    put_file(
        root,
        &format!("{UNIT_DIR}/{UNIT}"),
        UNIT_TEXT.as_bytes(),
        0o644,
        &mut changed,
    )?;
    put_file(
        root,
        &format!("{UNIT_DIR}/{SLICE}"),
        SLICE_TEXT.as_bytes(),
        0o644,
        &mut changed,
    )?;
    let generator = format!("usr/lib/systemd/system-generators/{}", generator::NAME);
    put_link(
        root,
        &generator,
        "../../understudy/understudy-guest",
        &mut changed,
    )?;
    put_link(
        root,
        "usr/sbin/understudy-guest",
        "../lib/understudy/understudy-guest",
        &mut changed,
    )?;
    let wants = format!("etc/systemd/system/sysinit.target.wants/{UNIT}");
    put_link(root, &wants, &format!("/{UNIT_DIR}/{UNIT}"), &mut changed)?;
    if is_running_root(root) {
        start(!changed.is_empty())?;
    }
    Ok(changed)
}

fn is_running_root(root: &Path) -> bool {
    let canonical = fs::canonicalize(root).is_ok_and(|p| p == Path::new("/"));
    canonical && Path::new("/run/systemd/system").exists()
}

fn start(changed: bool) -> Result<(), InstallError> {
    let verb = if changed { "restart" } else { "start" };
    for arguments in [&["daemon-reload"][..], &[verb, UNIT]] {
        let problem = match Command::new("systemctl").args(arguments).output() {
            Ok(output) if output.status.success() => continue,
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        return Err(InstallError::Systemctl {
            arguments: arguments.join(" "),
            problem,
        });
    }
    Ok(())
}

/// The directory of `path` below `root`, made where it is missing. Links within an image are often absolute
/// and would lead into this machine instead: those are refused.
fn directory(root: &Path, path: &Path) -> Result<PathBuf, InstallError> {
    let real_root = fs::canonicalize(root).map_err(|source| InstallError::File {
        what: "opening",
        path: root.to_owned(),
        source,
    })?;
    let mut at = real_root.clone();
    for component in path.parent().unwrap_or(Path::new("")).components() {
        let Component::Normal(name) = component else {
            continue;
        };
        let next = at.join(name);
        match fs::create_dir(&next) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(InstallError::File {
                    what: "making directory",
                    path: next,
                    source,
                });
            }
        }
        at = fs::canonicalize(&next).map_err(|source| InstallError::File {
            what: "opening",
            path: next.clone(),
            source,
        })?;
        if !at.starts_with(&real_root) {
            return Err(InstallError::Escapes(next));
        }
    }
    Ok(at)
}

fn put_file(
    root: &Path,
    path: &str,
    content: &[u8],
    mode: u32,
    changed: &mut Vec<PathBuf>,
) -> Result<(), InstallError> {
    let path = Path::new(path);
    let folder = directory(root, path)?;
    let target = folder.join(path.file_name().unwrap_or_default());
    let is_regular = fs::symlink_metadata(&target).is_ok_and(|m| m.is_file());
    if is_regular && fs::read(&target).is_ok_and(|known| known == content) {
        return Ok(());
    }
    let temporary = folder.join(format!(
        ".{}.new",
        path.file_name().unwrap_or_default().to_string_lossy()
    ));
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        // The image or the machine may be switched off right after: never half a binary.
        file.sync_all()?;
        fs::rename(&temporary, &target)
    };
    write().map_err(|source| {
        // What is left of the attempt is of no use; the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        InstallError::File {
            what: "writing",
            path: target.clone(),
            source,
        }
    })?;
    changed.push(target);
    Ok(())
}

fn put_link(root: &Path, path: &str, to: &str, changed: &mut Vec<PathBuf>) -> Result<(), InstallError> {
    let path = Path::new(path);
    let target = directory(root, path)?.join(path.file_name().unwrap_or_default());
    if fs::read_link(&target).is_ok_and(|known| known == Path::new(to)) {
        return Ok(());
    }
    let replace = || -> io::Result<()> {
        match fs::remove_file(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(to, &target)
    };
    replace().map_err(|source| InstallError::File {
        what: "linking",
        path: target.clone(),
        source,
    })?;
    changed.push(target);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("usr/lib/systemd")).unwrap();
        fs::write(root.path().join("usr/lib/systemd/systemd"), "").unwrap();
        root
    }

    #[test]
    fn an_image_gets_binary_unit_slice_generator_and_enablement_and_a_second_time_nothing() {
        let root = image();
        assert_eq!(install(root.path()).unwrap().len(), 6);
        let binary = fs::metadata(root.path().join(BINARY)).unwrap();
        assert_eq!(binary.permissions().mode() & 0o777, 0o755);
        for link in [
            "usr/sbin/understudy-guest",
            "usr/lib/systemd/system-generators/understudy-guest-generator",
        ] {
            assert_eq!(
                fs::canonicalize(root.path().join(link)).unwrap(),
                fs::canonicalize(root.path().join(BINARY)).unwrap()
            );
        }
        assert!(
            fs::read_link(
                root.path()
                    .join("etc/systemd/system/sysinit.target.wants")
                    .join(UNIT)
            )
            .is_ok()
        );
        assert!(install(root.path()).unwrap().is_empty());
    }

    #[test]
    fn a_directory_that_is_no_root_is_refused_with_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let error = install(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("usr/lib/systemd/systemd is missing"),
            "{error}"
        );
    }

    #[test]
    fn a_link_out_of_the_image_is_not_followed() {
        let root = image();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), root.path().join("etc")).unwrap();
        assert!(matches!(install(root.path()), Err(InstallError::Escapes(_))));
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
