//! What the Pod brings to the host: binaries by version, the service's configuration, and the service itself, which is
//! restarted only when something of it has changed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::on_host::{Host, HostError};
use crate::agent::UNIT;
use crate::config::{Config, ConfigError, DEFAULT_PATH, Mode};
use crate::durable::{self, DurableError};

/// Where versions lie on the host.
const VERSIONS: &str = "/opt/understudy";
/// The agent's own binary, and that of the VMM.
const PROGRAM: &str = "understudy-node";
const VMM: &str = "understudy-vmm";
const UNIT_DIR: &str = "/etc/systemd/system";

/// Why the host is not as it shall be.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file of the image or the host.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file could not be replaced.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The node's configuration is not usable; the service goes on with the last one.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration could not be written.
    #[error("writing the configuration: {0}")]
    Encode(String),
    /// A command of the host failed.
    #[error(transparent)]
    Host(#[from] HostError),
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + 'a {
    move |source| InstallError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What the service was started with last.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Started {
    version: String,
    digest: String,
}

/// The host, as the Pod sees it.
pub struct Installer<'a> {
    /// The host's root, in the Pod.
    pub host_root: &'a Path,
    /// Where the binaries lie in the image.
    pub image_dir: &'a Path,
    /// The node's configuration, as the chart gives it; it need not be there.
    pub node_config: &'a Path,
    /// The version that the image holds.
    pub version: &'a str,
    /// Runs the host's commands.
    pub host: &'a dyn Host,
}

impl Installer<'_> {
    /// The configuration with which the service runs: the chart's, on a cluster.
    pub fn config(&self) -> Result<Config, InstallError> {
        let mut config = match self.node_config.exists() {
            true => Config::load(Some(self.node_config))?,
            false => Config::default(),
        };
        config.mode = Mode::Cluster;
        if config.vmm == Config::default().vmm {
            config.vmm = current().join(VMM);
        }
        Ok(config)
    }

    /// Makes the host so. Returns whether the service was started anew. `is_first`: a service that does not run is
    /// started; later an administrator may have stopped it.
    pub fn settle(&self, is_first: bool) -> Result<bool, InstallError> {
        let config = self.config()?;
        let program = self.bring(PROGRAM)?;
        self.bring(VMM)?;
        self.switch()?;
        let text =
            serde_saphyr::to_string(&config).map_err(|error| InstallError::Encode(error.to_string()))?;
        let text =
            format!("# Written by the agent's Pod from its ConfigMap; changes here do not last.\n{text}");
        let path = self.on_host(Path::new(DEFAULT_PATH));
        let unit = self.on_host(&Path::new(UNIT_DIR).join(UNIT));
        let marker = self.on_host(Path::new(VERSIONS)).join("started.json");
        let installed = current().join(PROGRAM).display().to_string();
        let is_ours = fs::read_to_string(&unit).is_ok_and(|unit| unit.contains(&installed));
        if !is_ours || !fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
            // Somebody else's, such as an administrator's own `install`: the service does not run as the marker says.
            forget(&marker)?;
        }
        self.replace(&path, text.as_bytes())?;

        let mut digest = Context::new(&SHA256);
        digest.update(program.as_bytes());
        digest.update(text.as_bytes());
        let wanted = Started {
            version: self.version.to_owned(),
            digest: hex(digest.finish().as_ref()),
        };
        // Written when the service runs with it: a Pod that dies in between does it again.
        let started = durable::read_json::<Started>(&marker).unwrap_or_default();
        if started.as_ref() != Some(&wanted) {
            self.host.run(&[
                &installed,
                "install",
                "--config",
                DEFAULT_PATH,
                "--program",
                &installed,
            ])?;
            tracing::info!(version = self.version, "starting the service anew; guests run on");
            self.host.run(&["systemctl", "restart", UNIT])?;
            durable::write_json(&marker, &wanted)?;
            self.prune();
            return Ok(true);
        }
        if is_first && self.host.run(&["systemctl", "is-active", UNIT]).is_err() {
            tracing::info!("starting the service");
            self.host.run(&["systemctl", "start", UNIT])?;
            return Ok(true);
        }
        Ok(false)
    }

    /// A path of the host.
    pub fn on_host(&self, path: &Path) -> PathBuf {
        self.host_root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Copies a binary of the image into the directory of its version, where it is not there. Returns its digest.
    fn bring(&self, name: &str) -> Result<String, InstallError> {
        let source = self.image_dir.join(name);
        let directory = self.on_host(&Path::new(VERSIONS).join(self.version));
        let target = directory.join(name);
        let wanted = digest(&source).map_err(io_error("reading", &source))?;
        if digest(&target).is_ok_and(|there| there == wanted) {
            return Ok(wanted);
        }
        durable::make_dir(&directory)?;
        let temporary = directory.join(format!("{name}.new"));
        // Replaced, not overwritten: one that runs stays what it is.
        let _ = fs::remove_file(&temporary);
        fs::copy(&source, &temporary).map_err(io_error("copying", &source))?;
        let failed = io_error("writing", &temporary);
        File::open(&temporary)
            .and_then(|file| {
                file.set_permissions(fs::Permissions::from_mode(0o755))?;
                file.sync_all()
            })
            .map_err(failed)?;
        fs::rename(&temporary, &target).map_err(io_error("replacing", &target))?;
        durable::sync_dir(&directory)?;
        tracing::info!(path = %target.display(), "installed");
        Ok(wanted)
    }

    /// `current` is this version from now on, or stays what it was.
    fn switch(&self) -> Result<(), InstallError> {
        let link = self.on_host(&current());
        if fs::read_link(&link).is_ok_and(|there| there == Path::new(self.version)) {
            return Ok(());
        }
        let temporary = link.with_extension("new");
        let _ = fs::remove_file(&temporary);
        symlink(self.version, &temporary).map_err(io_error("linking", &temporary))?;
        fs::rename(&temporary, &link).map_err(io_error("replacing", &link))?;
        durable::sync_dir(&self.on_host(Path::new(VERSIONS)))?;
        Ok(())
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), InstallError> {
        if fs::read(path).is_ok_and(|there| there == content) {
            return Ok(());
        }
        if let Some(directory) = path.parent() {
            durable::make_dir(directory)?;
        }
        durable::replace(path, content)?;
        Ok(())
    }

    /// Removes versions of which nothing runs: a guest's VMM keeps its own.
    fn prune(&self) {
        let running = running();
        let versions = self.on_host(Path::new(VERSIONS));
        let entries = fs::read_dir(&versions).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default();
            // What an administrator has put there, such as `bin`, is not ours to remove.
            let is_version = name
                .to_string_lossy()
                .starts_with(|first: char| first.is_ascii_digit())
                && fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
            if !is_version || name == self.version {
                continue;
            }
            let files: Vec<PathBuf> = [PROGRAM, VMM].iter().map(|name| path.join(name)).collect();
            let is_ours = files.iter().any(|file| file.exists());
            let runs = files
                .iter()
                .filter_map(|file| identity(file))
                .any(|file| running.contains(&file));
            if !is_ours || runs {
                continue;
            }
            match fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "nothing runs of this version; removed"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "an old version stays"),
            }
        }
    }
}

fn forget(marker: &Path) -> Result<(), InstallError> {
    match fs::remove_file(marker) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", marker)(error)),
        _ => Ok(()),
    }
}

/// The link to the version that the service and new guests use.
fn current() -> PathBuf {
    Path::new(VERSIONS).join("current")
}

/// Device and inode: the same from within every mount namespace.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// What all processes of the host run; with hostPID these are all that there are.
fn running() -> Vec<(u64, u64)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| identity(&entry.path().join("exe")))
        .collect()
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(context.finish().as_ref())),
            length => context.update(&buffer[..length]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "install_test.rs"]
mod tests;
