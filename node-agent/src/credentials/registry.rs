//! Registered keys: durable records, each of one checkpoint.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{CredentialError, CredentialProvider, Identity, KeyFile, Operator, Secret, SystemdCreds};
use crate::config::Credentials;
use crate::durable::{self, DurableError};

/// Version of the record's format.
const VERSION: u32 = 1;

/// `<stateDir>/credentials/<checkpoint>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Record {
    version: u32,
    provider: String,
    identity: Identity,
    wrapped: String,
}

/// The providers of this node and what is registered with them.
#[derive(Clone)]
pub struct Registry {
    directory: PathBuf,
    providers: Vec<Arc<dyn CredentialProvider>>,
    default: String,
}

impl Registry {
    /// The registry beneath `state_dir`, with the providers that the configuration names, and the operator.
    pub fn open(state_dir: &Path, config: &Credentials, operator: Operator) -> Registry {
        let mut providers: Vec<Arc<dyn CredentialProvider>> =
            vec![Arc::new(SystemdCreds::new(&config.systemd_creds))];
        if let Some(path) = &config.key_file {
            providers.push(Arc::new(KeyFile::new(path)));
        }
        providers.push(Arc::new(operator));
        let default = config.provider.as_str();
        providers.sort_by_key(|provider| provider.name() != default);
        Registry {
            directory: state_dir.join("credentials"),
            providers,
            default: default.to_owned(),
        }
    }

    /// A registry with providers of the test's own, the first of which is the default.
    #[cfg(test)]
    pub(super) fn with(state_dir: &Path, providers: Vec<Arc<dyn CredentialProvider>>) -> Registry {
        Registry {
            directory: state_dir.join("credentials"),
            default: providers[0].name().to_owned(),
            providers,
        }
    }

    /// All providers, the default first.
    pub fn providers(&self) -> &[Arc<dyn CredentialProvider>] {
        &self.providers
    }

    /// The provider of this name; without one, the node's default.
    pub fn provider(&self, name: Option<&str>) -> Result<&Arc<dyn CredentialProvider>, CredentialError> {
        let name = name.unwrap_or(&self.default);
        self.providers
            .iter()
            .find(|provider| provider.name() == name)
            .ok_or_else(|| CredentialError::Unknown {
                name: name.to_owned(),
                known: self.providers.iter().map(|provider| provider.name()).collect(),
            })
    }

    /// Registers a key: when this returns, the record survives a power cut.
    pub fn register(
        &self,
        provider: Option<&str>,
        identity: &Identity,
        key: &Secret,
    ) -> Result<(), CredentialError> {
        let provider = self.provider(provider)?;
        let record = Record {
            version: VERSION,
            provider: provider.name().to_owned(),
            identity: identity.clone(),
            wrapped: provider.wrap(identity, key)?,
        };
        durable::make_dir(&self.directory)?;
        Ok(durable::write_json(&self.path(identity.checkpoint), &record)?)
    }

    /// Logs on: the key of a checkpoint of this guest on this machine, in another boot than the saving one.
    pub fn log_on(
        &self,
        checkpoint: Uuid,
        guest_uid: &str,
        machine_id: &str,
        boot_id: &str,
    ) -> Result<Secret, CredentialError> {
        let path = self.path(checkpoint);
        let record: Record = durable::read_json(&path)?.ok_or(CredentialError::Missing(checkpoint))?;
        if record.version != VERSION {
            return Err(DurableError::Damaged {
                path,
                reason: format!("version {} where {VERSION} is known", record.version),
            }
            .into());
        }
        let identity = record.identity;
        for (what, registered, asking) in [
            ("guest", identity.guest_uid.as_str(), guest_uid),
            ("machine", &identity.machine_id, machine_id),
            (
                "checkpoint",
                &identity.checkpoint.to_string(),
                &checkpoint.to_string(),
            ),
        ] {
            if registered != asking {
                return Err(CredentialError::Foreign {
                    checkpoint,
                    what,
                    registered: registered.to_owned(),
                    asking: asking.to_owned(),
                });
            }
        }
        if identity.boot_id == boot_id {
            return Err(CredentialError::SameBoot(checkpoint));
        }
        self.provider(Some(&record.provider))?
            .unwrap(&identity, &record.wrapped)
    }

    /// The NodeUpdate of this UID is over: none of its keys is asked for any more.
    pub fn forget(&self, node_update: &str) {
        for provider in &self.providers {
            provider.forget(node_update);
        }
    }

    /// Whether a key is registered for a checkpoint.
    pub fn is_registered(&self, checkpoint: Uuid) -> bool {
        self.path(checkpoint).exists()
    }

    /// Destroys what is registered for a checkpoint; fine where nothing is. It is overwritten before it is
    /// removed, which is as much as can be done on file systems that write in place.
    pub fn destroy(&self, checkpoint: Uuid) -> Result<(), CredentialError> {
        let path = self.path(checkpoint);
        if let Ok(mut file) = OpenOptions::new().write(true).open(&path) {
            let length = file.metadata().map_or(0, |metadata| metadata.len());
            let zeros = vec![0u8; usize::try_from(length).unwrap_or(0).min(1 << 20)];
            if let Err(error) = file.write_all(&zeros).and_then(|()| file.sync_all()) {
                tracing::warn!(path = %path.display(), %error, "a key's record is removed without being overwritten");
            }
        }
        Ok(durable::remove(&path)?)
    }

    fn path(&self, checkpoint: Uuid) -> PathBuf {
        self.directory.join(format!("{checkpoint}.json"))
    }
}
