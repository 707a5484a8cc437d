//! The Secret with a NodeUpdate's credential: made, read, and destroyed. What it is for is recorded in it, so that
//! whoever leads knows to whom it was released, whatever became of the status.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use understudy_api::node_update::{CredentialRelease, CredentialRequest};
use understudy_api::{NodeUpdate, ObjectMeta};
use understudy_sealing::{Binding, PrivateKey, PublicKey, SealError};

use super::credential::{self, Kept, Said, Task, Verdict};
use crate::controller::Context;
use crate::error::Error;
use crate::place::Place;
use crate::write;

/// Type of the Secrets.
const TYPE: &str = "understudy.dev/credential";
/// Tells people what a Secret is of.
const OF: &str = "understudy.dev/node-update";

/// Fields of a Secret.
mod fields {
    pub const PRIVATE_KEY: &str = "privateKey";
    pub const NODE_UID: &str = "nodeUID";
    pub const MACHINE_ID: &str = "machineID";
    pub const RELEASES: &str = "releases";
}

/// Does what is to be done for a credential. What is to be said of it; `None`: what was said before.
pub async fn perform(
    task: Task,
    update: &NodeUpdate,
    place: &Place,
    context: &Context,
) -> Result<Option<Said>, Error> {
    match task {
        Task::Nothing => Ok(None),
        Task::Make => make(update, place, context).await,
        Task::Answer(request) => answer(update, place, &request, context).await,
        Task::Destroy => {
            context.writer.delete(&stub(update, context)).await?;
            Ok(Some(credential::destroyed(update)))
        }
    }
}

/// Made once: one that is there already, of a leader that died before it could say so, is taken.
async fn make(update: &NodeUpdate, place: &Place, context: &Context) -> Result<Option<Said>, Error> {
    let Some(node) = &place.node else { return Ok(None) };
    let key = PrivateKey::generate().map_err(|source| broken(update, source))?;
    let text = |text: &str| ByteString(text.as_bytes().to_vec());
    let secret = Secret {
        metadata: ObjectMeta {
            annotations: Some(BTreeMap::from([(OF.to_owned(), update.name_any())])),
            // Whoever removes the NodeUpdate by force leaves no key behind.
            owner_references: Some(vec![OwnerReference {
                api_version: NodeUpdate::api_version(&()).into_owned(),
                kind: NodeUpdate::kind(&()).into_owned(),
                name: update.name_any(),
                uid: update.uid().unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..stub(update, context).metadata
        },
        data: Some(BTreeMap::from([
            (fields::PRIVATE_KEY.to_owned(), ByteString(key.bytes().to_vec())),
            (fields::NODE_UID.to_owned(), text(&node.uid)),
            (
                fields::MACHINE_ID.to_owned(),
                text(place.machine_id.as_deref().unwrap_or_default()),
            ),
        ])),
        type_: Some(TYPE.to_owned()),
        ..Secret::default()
    };
    let key = match context.writer.create(&secret).await? {
        true => Some(key),
        false => read(update, context).await?.and_then(|there| private_key(&there)),
    };
    // One that is there and not to be read is somebody else's; the next pass finds it so again, and says so.
    let key = key.ok_or_else(|| broken(update, SealError::Damaged))?;
    let name = format!("{}/{}", context.pod.namespace, credential::secret_name(update));
    Ok(Some(credential::made(key.public().to_string(), &name)))
}

async fn answer(
    update: &NodeUpdate,
    place: &Place,
    request: &CredentialRequest,
    context: &Context,
) -> Result<Option<Said>, Error> {
    let Some(before) = update
        .status
        .as_ref()
        .and_then(|status| status.credential.as_ref())
    else {
        return Ok(None);
    };
    let there = read(update, context).await?;
    let Some((secret, key)) = there.and_then(|there| private_key(&there).map(|key| (there, key))) else {
        let name = format!("{}/{}", context.pod.namespace, credential::secret_name(update));
        let message = format!("Secret {name}, which had the credential, is gone or damaged");
        return Ok(Some(credential::refused(before, request, message, false)));
    };
    let mut kept = kept(&secret);
    let verdict = credential::judge(update, place, &kept, request);
    let refuse = |message| Ok(Some(credential::refused(before, request, message, true)));
    match verdict {
        Verdict::Wait => return Ok(None),
        Verdict::Refuse(message) => return refuse(message),
        Verdict::Again => {}
        Verdict::Release => kept.releases.push(request.clone()),
    }
    let binding = Binding::release(
        &update.uid().unwrap_or_default(),
        &kept.node_uid,
        &kept.machine_id,
        &request.boot_id,
    );
    let sealed = match request.public_key.parse::<PublicKey>() {
        Ok(public_key) => public_key.seal(key.bytes(), &binding),
        Err(error) => Err(error),
    };
    let sealed_credential = match sealed {
        Ok(sealed) => sealed,
        Err(error) => return refuse(format!("what the agent gave as its key is not usable: {error}")),
    };
    if verdict == Verdict::Release {
        // Recorded before it is told, on exactly what was read: of two leaders, or two requests, one comes first.
        record(&secret, &kept, update, context).await?;
    }
    let release = CredentialRelease {
        boot_id: request.boot_id.clone(),
        public_key: request.public_key.clone(),
        sealed_credential,
        count: i32::try_from(kept.releases.len()).unwrap_or(i32::MAX),
    };
    Ok(Some(credential::released(before, release)))
}

async fn record(secret: &Secret, kept: &Kept, update: &NodeUpdate, context: &Context) -> Result<(), Error> {
    let action = format!(
        "recording a release of the credential of NodeUpdate {}",
        update.name_any()
    );
    let releases = serde_json::to_vec(&kept.releases).map_err(|source| Error::Encode {
        action: action.clone(),
        source,
    })?;
    let mut body = write::body(secret);
    body["metadata"]["resourceVersion"] = json!(secret.resource_version());
    body["data"] = json!({fields::RELEASES: ByteString(releases)});
    context.writer.apply(&action, secret, &body).await.map(drop)
}

async fn read(update: &NodeUpdate, context: &Context) -> Result<Option<Secret>, Error> {
    let api: Api<Secret> = Api::namespaced(context.writer.client().clone(), &context.pod.namespace);
    let action = format!("reading the credential of NodeUpdate {}", update.name_any());
    let read = api.get_opt(&credential::secret_name(update)).await;
    read.map_err(|error| Error::from_kube(&action, error))
}

fn stub(update: &NodeUpdate, context: &Context) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(credential::secret_name(update)),
            namespace: Some(context.pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        ..Secret::default()
    }
}

fn field<'a>(secret: &'a Secret, name: &str) -> &'a [u8] {
    let data = secret.data.as_ref();
    data.and_then(|data| data.get(name))
        .map_or(&[], |bytes| bytes.0.as_slice())
}

fn private_key(secret: &Secret) -> Option<PrivateKey> {
    PrivateKey::from_slice(field(secret, fields::PRIVATE_KEY))
}

fn kept(secret: &Secret) -> Kept {
    let text = |name| String::from_utf8_lossy(field(secret, name)).into_owned();
    Kept {
        node_uid: text(fields::NODE_UID),
        machine_id: text(fields::MACHINE_ID),
        releases: serde_json::from_slice(field(secret, fields::RELEASES)).unwrap_or_default(),
    }
}

fn broken(update: &NodeUpdate, source: SealError) -> Error {
    Error::Credential {
        action: format!("making the credential of NodeUpdate {}", update.name_any()),
        source,
    }
}
