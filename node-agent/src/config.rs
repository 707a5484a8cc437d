//! Configuration of the agent: a YAML file whose every field has a default.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where `run` looks when no `--config` is given; it need not exist.
pub const DEFAULT_PATH: &str = "/etc/understudy/node.yaml";

/// Longest run directory: sockets beneath it must fit into `sun_path` (108 bytes, unix(7)).
const MAX_RUN_DIR: usize = 44;

/// Configuration of `understudy-node`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Where objects come from.
    pub mode: Mode,
    /// Durable state: objects, operations' journals, logs.
    pub state_dir: PathBuf,
    /// Sockets; lost at a reboot of the host.
    pub run_dir: PathBuf,
    /// Manifests of the stand-alone mode.
    pub manifests_dir: PathBuf,
    /// Sources of disks are names beneath `<disksDir>/<namespace>/`.
    pub disks_dir: PathBuf,
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// How VMM processes are started.
    pub supervisor: Supervisor,
    /// Memory that guests must leave to the host, in MiB.
    pub reserved_memory_mib: u64,
    /// What each namespace may use beyond files in its own directory. Default: nothing.
    pub namespaces: BTreeMap<String, NamespacePolicy>,
    /// What wraps the keys of saved sessions.
    pub credentials: Credentials,
    /// Reboots of the host.
    pub host: HostConfig,
}

/// Where objects come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// From a directory of manifests.
    #[default]
    Standalone,
    /// From an API server, by `<stateDir>/cluster/access.json`; no manifests are read.
    Cluster,
}

/// What wraps the keys of saved sessions while the host reboots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Credentials {
    /// The provider where a HostUpdate names none, and for reboots that the host begins.
    pub provider: ProviderName,
    /// The program of the provider `systemd-creds`.
    pub systemd_creds: PathBuf,
    /// The file of the provider `key-file`: 32 bytes that only root can read, on a file system that
    /// outlives a reboot.
    pub key_file: Option<PathBuf>,
}

/// A credential provider that can be configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderName {
    /// systemd-creds(1) with the host's key.
    #[default]
    SystemdCreds,
    /// A file with a key.
    KeyFile,
}

impl ProviderName {
    /// Its name, as in HostUpdates.
    pub fn as_str(self) -> &'static str {
        match self {
            ProviderName::SystemdCreds => "systemd-creds",
            ProviderName::KeyFile => "key-file",
        }
    }
}

/// How reboots of the host are made and waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostConfig {
    /// The longest that a reboot which the host begins is held up to save sessions, in seconds, 5 to 1500
    /// (systemd forces a reboot after 30 minutes). `install` writes it into logind's InhibitDelayMaxSec and
    /// the service's TimeoutStopSec.
    pub save_timeout_seconds: u64,
    /// What a save is reckoned to write, in MiB a second, until one was measured.
    pub assumed_save_mib_per_second: u64,
}

impl Default for Credentials {
    fn default() -> Credentials {
        Credentials {
            provider: ProviderName::default(),
            systemd_creds: "systemd-creds".into(),
            key_file: None,
        }
    }
}

impl Default for HostConfig {
    fn default() -> HostConfig {
        HostConfig {
            save_timeout_seconds: 600,
            assumed_save_mib_per_second: 100,
        }
    }
}

/// What a namespace's guests may use of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NamespacePolicy {
    /// Bridges that networks may name.
    pub bridges: Vec<String>,
    /// Absolute paths, files or directories, that disks and kernels may name or lie beneath.
    pub paths: Vec<PathBuf>,
}

/// How VMM processes are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Supervisor {
    /// systemd where it runs, else detached processes.
    #[default]
    Auto,
    /// A transient unit each, in `understudy-vmms.slice`.
    Systemd,
    /// A process in a session of its own.
    Detached,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            mode: Mode::default(),
            state_dir: "/var/lib/understudy".into(),
            run_dir: "/run/understudy".into(),
            manifests_dir: "/etc/understudy/manifests".into(),
            disks_dir: "/var/lib/understudy/disks".into(),
            vmm: "/usr/local/bin/understudy-vmm".into(),
            supervisor: Supervisor::Auto,
            reserved_memory_mib: 128,
            namespaces: BTreeMap::new(),
            credentials: Credentials::default(),
            host: HostConfig::default(),
        }
    }
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("reading the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a valid configuration.
    #[error("the configuration {path} is malformed: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// The run directory leaves no room for socket names.
    #[error(
        "runDir {path} is {length} bytes long; Unix sockets beneath it need it to be at most {MAX_RUN_DIR}"
    )]
    RunDirTooLong {
        /// The directory.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// The default provider lacks its setting.
    #[error("credentials.provider is key-file, and credentials.keyFile names no file")]
    NoKeyFile,
    /// A number is out of its range.
    #[error("{field} must be {range}, not {value}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// What it may be.
        range: &'static str,
        /// Its value.
        value: u64,
    },
    /// A directory is not absolute.
    #[error("{field} must be an absolute path, not {path}")]
    NotAbsolute {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        path: PathBuf,
    },
}

impl Config {
    /// Reads the file at `path`, or the default one where it exists, or the defaults.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let config = match path {
            Some(path) => Config::read(path)?,
            None if Path::new(DEFAULT_PATH).exists() => Config::read(Path::new(DEFAULT_PATH))?,
            None => Config::default(),
        };
        config.check()?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        if text.trim().is_empty() {
            return Ok(Config::default());
        }
        serde_saphyr::from_str(&text).map_err(|error| ConfigError::Malformed {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Checks what the types cannot say; to be called again after fields were overridden.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (field, path) in [
            ("stateDir", &self.state_dir),
            ("runDir", &self.run_dir),
            ("manifestsDir", &self.manifests_dir),
            ("disksDir", &self.disks_dir),
            ("vmm", &self.vmm),
        ] {
            if !path.is_absolute() {
                return Err(ConfigError::NotAbsolute {
                    field,
                    path: path.clone(),
                });
            }
        }
        if let Some(path) = self
            .credentials
            .key_file
            .as_ref()
            .filter(|path| !path.is_absolute())
        {
            return Err(ConfigError::NotAbsolute {
                field: "credentials.keyFile",
                path: path.clone(),
            });
        }
        if self.credentials.provider == ProviderName::KeyFile && self.credentials.key_file.is_none() {
            return Err(ConfigError::NoKeyFile);
        }
        if !(5..=1500).contains(&self.host.save_timeout_seconds) {
            return Err(ConfigError::OutOfRange {
                field: "host.saveTimeoutSeconds",
                range: "5 to 1500",
                value: self.host.save_timeout_seconds,
            });
        }
        if self.host.assumed_save_mib_per_second == 0 {
            return Err(ConfigError::OutOfRange {
                field: "host.assumedSaveMibPerSecond",
                range: "1 or more",
                value: 0,
            });
        }
        let length = self.run_dir.as_os_str().len();
        if length > MAX_RUN_DIR {
            return Err(ConfigError::RunDirTooLong {
                path: self.run_dir.clone(),
                length,
            });
        }
        Ok(())
    }

    /// What `namespace` may use.
    pub fn policy(&self, namespace: &str) -> NamespacePolicy {
        self.namespaces.get(namespace).cloned().unwrap_or_default()
    }

    /// Logs of a guest: its VMMs', its consoles and what the agent says of it.
    pub fn log_dir(&self, namespace: &str, guest: &str) -> PathBuf {
        self.state_dir.join("logs").join(namespace).join(guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_only_what_differs_and_unknown_fields_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.yaml");
        fs::write(&path, "namespaces:\n  default:\n    bridges: [br0]\n").unwrap();
        let config = Config::load(Some(&path)).unwrap();
        assert_eq!(config.state_dir, Path::new("/var/lib/understudy"));
        assert_eq!(config.policy("default").bridges, ["br0"]);
        assert!(config.policy("other").bridges.is_empty());

        fs::write(&path, "stateDirectory: /x\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(
            error.contains("stateDirectory") && error.contains("node.yaml"),
            "{error}"
        );

        fs::write(&path, format!("runDir: /{}\n", "x".repeat(60))).unwrap();
        assert!(matches!(
            Config::load(Some(&path)),
            Err(ConfigError::RunDirTooLong { .. })
        ));

        fs::write(&path, "credentials: {provider: key-file}\n").unwrap();
        assert!(matches!(Config::load(Some(&path)), Err(ConfigError::NoKeyFile)));
        fs::write(
            &path,
            "credentials: {provider: key-file, keyFile: /etc/understudy/key}\n",
        )
        .unwrap();
        Config::load(Some(&path)).unwrap();
        fs::write(&path, "host: {saveTimeoutSeconds: 1}\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("host.saveTimeoutSeconds"), "{error}");
    }
}
