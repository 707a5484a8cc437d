//! The provider `operator`: keys are sealed to a key pair whose private half, the *credential*, the operator keeps in a
//! Secret, apart from this host.
//!
//! The public half is in the NodeUpdate before the agent begins it, so that registering keys waits for nobody. After
//! the reboot the agent makes a key pair of its own, in memory, and asks for the credential by its public half; the
//! operator answers by sealing it to that, once for each boot. Both stand in the NodeUpdate's status, and go the way
//! that every status goes: whoever waits here knows of no API server.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use understudy_api::NodeUpdate;
use understudy_api::node_update::{Credential, CredentialRequest, OPERATOR_PROVIDER};
use understudy_sealing::{Binding, PrivateKey, PublicKey, SealError};
use zeroize::Zeroizing;

use super::hand::{check_memory_only, write_secret};
use super::{CredentialError, CredentialProvider, Identity, Secret};
use crate::store::{Object, Objects};

/// What is registered of a session's key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wrapped {
    /// UID of the NodeUpdate.
    node_update: String,
    /// The public half of its credential.
    public_key: String,
    /// The session's key, sealed to it.
    sealed: String,
}

/// Keys that only the operator's credential opens.
pub struct Operator {
    objects: Arc<dyn Objects>,
    directory: PathBuf,
    boot_id: String,
}

impl Operator {
    /// Its name.
    pub const NAME: &str = OPERATOR_PROVIDER;

    /// The provider of a node with these objects, in a boot. Key pairs of requests are beneath `run_dir`, and so end
    /// with the boot; an agent that is started anew in it asks by the same one.
    pub fn new(objects: Arc<dyn Objects>, run_dir: &Path, boot_id: &str) -> Operator {
        Operator {
            objects,
            directory: run_dir.join("requests"),
            boot_id: boot_id.to_owned(),
        }
    }

    fn not_ready(why: impl Into<String>, remedy: &str) -> CredentialError {
        CredentialError::NotReady {
            provider: Operator::NAME,
            why: why.into(),
            remedy: remedy.to_owned(),
        }
    }

    fn refused(why: impl Into<String>) -> CredentialError {
        CredentialError::Refused {
            provider: Operator::NAME,
            why: why.into(),
        }
    }

    fn check_cluster(&self) -> Result<(), CredentialError> {
        match self.objects.stands_alone() {
            false => Ok(()),
            true => Err(Operator::not_ready(
                "it needs a cluster, and this node stands alone",
                "let the HostUpdate name another credentialProvider",
            )),
        }
    }

    /// A NodeUpdate with what the operator has made for it.
    fn update(&self, name: &str) -> Result<(NodeUpdate, Option<Credential>), CredentialError> {
        let found = self.objects.node_update(name);
        let found = found.map_err(|error| CredentialError::Objects(error.to_string()))?;
        let update =
            found.ok_or_else(|| Operator::refused(format!("NodeUpdate {name} is not there any more")))?;
        let credential = update
            .status
            .as_ref()
            .and_then(|status| status.credential.clone());
        Ok((update, credential))
    }

    /// The operator's public key for a NodeUpdate.
    fn public_key(&self, name: &str) -> Result<(String, PublicKey), CredentialError> {
        let (update, credential) = self.update(name)?;
        let missing = || {
            Operator::not_ready(
                format!("the operator has made no credential for NodeUpdate {name}"),
                "is the operator of the same version as this agent, and may it write Secrets in its namespace?",
            )
        };
        let public_key = credential.ok_or_else(missing)?.public_key;
        let public_key = public_key
            .parse()
            .map_err(|error: SealError| Operator::not_ready(error.to_string(), "delete the NodeUpdate"))?;
        Ok((update.uid(), public_key))
    }

    /// The credential, where the operator has released it to this boot. Where it was not asked for, it is.
    fn credential(&self, identity: &Identity, uid: &str) -> Result<PrivateKey, CredentialError> {
        let name = &identity.node_update;
        let (update, credential) = self.update(name)?;
        if update.uid() != uid {
            let message = format!("NodeUpdate {name} is another one than it was registered for");
            return Err(Operator::refused(message));
        }
        let own = self.own_key(uid)?;
        let request = CredentialRequest {
            boot_id: self.boot_id.clone(),
            public_key: own.public().to_string(),
        };
        let status = update.status.unwrap_or_default();
        if status.credential_request.as_ref() != Some(&request) {
            tracing::info!(
                update = name,
                boot = request.boot_id,
                "asking the operator for the credential"
            );
            let asked = self.objects.report_node_update(name, uid, true, &mut |status| {
                status.credential_request = Some(request.clone());
            });
            asked.map_err(|error| CredentialError::Objects(error.to_string()))?;
        }
        let credential = credential
            .ok_or_else(|| Operator::refused(format!("NodeUpdate {name} tells of no credential any more")))?;
        if let Some(refusal) = credential
            .refusal
            .filter(|there| (&there.boot_id, &there.public_key) == (&request.boot_id, &request.public_key))
        {
            // Whoever tries again asks anew: what stood against it may be gone by then.
            self.forget(uid);
            return Err(Operator::refused(refusal.message));
        }
        let release = credential
            .release
            .filter(|there| (&there.boot_id, &there.public_key) == (&request.boot_id, &request.public_key));
        let Some(release) = release else {
            let why = self.objects.away().unwrap_or_else(|| {
                "the operator has not answered yet; see the condition CredentialKept of the NodeUpdate"
                    .to_owned()
            });
            return Err(CredentialError::Awaited {
                provider: Operator::NAME,
                why,
            });
        };
        let node_uid = status.node_uid.unwrap_or_default();
        let binding = Binding::release(uid, &node_uid, &identity.machine_id, &self.boot_id);
        let bytes = own
            .open(&release.sealed_credential, &binding)
            .map_err(|error| Operator::refused(format!("what the operator has released: {error}")))?;
        PrivateKey::from_slice(&bytes)
            .ok_or_else(|| Operator::refused("what the operator has released is no credential"))
    }

    /// The key pair by which this boot asks, made at the first time.
    fn own_key(&self, uid: &str) -> Result<PrivateKey, CredentialError> {
        let path = self.path(uid);
        let failed = |source| CredentialError::Hand {
            path: path.clone(),
            source,
        };
        match fs::read(&path).map(Zeroizing::new) {
            Ok(bytes) => {
                // One that a full disk has cut is of no use to anybody; it was not asked by before it was whole.
                if let Some(key) = PrivateKey::from_slice(&bytes) {
                    return Ok(key);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let key = PrivateKey::generate().map_err(|_| CredentialError::Random)?;
        if let Some(run_dir) = self.directory.parent() {
            check_memory_only(run_dir)?;
        }
        write_secret(&path, key.bytes()).map_err(failed)?;
        Ok(key)
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.directory.join(uid)
    }

    fn binding(uid: &str, identity: &Identity) -> Binding {
        Binding::session_key(uid, &identity.name())
    }
}

impl CredentialProvider for Operator {
    fn name(&self) -> &'static str {
        Operator::NAME
    }

    fn ready(&self) -> Result<(), CredentialError> {
        self.check_cluster()?;
        match self.objects.away() {
            None => Ok(()),
            Some(why) => Err(Operator::not_ready(
                why,
                "it is ready again when the API server answers",
            )),
        }
    }

    /// What is needed before the reboot is here already, whether the API server answers or not.
    fn ready_for(&self, node_update: &str) -> Result<(), CredentialError> {
        self.check_cluster()?;
        self.public_key(node_update).map(drop)
    }

    fn wrap(&self, identity: &Identity, key: &Secret) -> Result<String, CredentialError> {
        let failed = |why: String| CredentialError::Wrap {
            provider: Operator::NAME,
            why,
        };
        let (uid, public_key) = self.public_key(&identity.node_update)?;
        let sealed = public_key
            .seal(key.bytes(), &Operator::binding(&uid, identity))
            .map_err(|error| failed(error.to_string()))?;
        let wrapped = Wrapped {
            node_update: uid,
            public_key: public_key.to_string(),
            sealed,
        };
        serde_json::to_string(&wrapped).map_err(|error| failed(error.to_string()))
    }

    fn unwrap(&self, identity: &Identity, wrapped: &str) -> Result<Secret, CredentialError> {
        let wrapped: Wrapped =
            serde_json::from_str(wrapped).map_err(|_| Operator::refused("the record is damaged"))?;
        let credential = self.credential(identity, &wrapped.node_update)?;
        if credential.public().to_string() != wrapped.public_key {
            let message = "the operator has released another credential than the key was sealed to";
            return Err(Operator::refused(message));
        }
        let key = credential
            .open(
                &wrapped.sealed,
                &Operator::binding(&wrapped.node_update, identity),
            )
            .map_err(|_| {
                Operator::refused(
                    "it was registered for another guest, node, boot or checkpoint, or the record is damaged",
                )
            })?;
        Secret::from_slice(&key).ok_or_else(|| Operator::refused("the record is damaged"))
    }

    fn forget(&self, node_update: &str) {
        let path = self.path(node_update);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(path = %path.display(), %error, "the key of a request could not be removed");
        }
    }
}

#[cfg(test)]
#[path = "operator_test.rs"]
mod tests;
