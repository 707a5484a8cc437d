//! The only way to write: fenced by the lease, limited in rate, and not at all where nothing would change.

pub mod diff;
mod latest;
mod limit;
mod notes;

use std::fmt::Debug;
use std::sync::Arc;

use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::core::ApiResource;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::time::timeout_at;
use understudy_api::managers::OPERATOR;

use crate::error::{Error, named};
use crate::lease::Fence;
use crate::metrics::Metrics;
pub use limit::Limit;
pub use notes::{Note, Notes};

/// A status as the operator wants it: all fields of it that are the operator's, and no others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The fields.
    pub fields: Map<String, Value>,
    /// Takes fields from their owner: only where that one's node is gone.
    pub force: bool,
    /// Only where the object is still the one that was read.
    pub exact: bool,
}

/// Objects that the operator writes.
pub trait Written:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync
{
}
impl<K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync> Written
    for K
{
}

/// What every write goes through.
struct Gate {
    fence: Fence,
    limit: Limit,
}

impl Gate {
    /// Writes: limited in rate, begun only while the fence is open, and given up when it closes.
    async fn pass<T>(
        &self,
        action: &str,
        write: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Error> {
        self.limit.pass().await;
        let deadline = self.fence.deadline().ok_or_else(|| Error::NotLeading {
            action: action.to_owned(),
        })?;
        match timeout_at(deadline, write).await {
            Ok(written) => written.map_err(|error| Error::from_kube(action, error)),
            Err(_) => Err(Error::TooLate {
                action: action.to_owned(),
            }),
        }
    }
}

/// The operator's hand.
pub struct Writer {
    client: Client,
    gate: Arc<Gate>,
    noted: notes::Sender,
    latest: latest::Latest,
    metrics: Arc<Metrics>,
}

impl Writer {
    /// A writer that writes only while `fence` is open, and what publishes its events. `identity` tells replicas apart in
    /// those.
    pub fn new(
        client: Client,
        fence: Fence,
        limit: Limit,
        identity: &str,
        metrics: Arc<Metrics>,
    ) -> (Writer, Notes) {
        let gate = Arc::new(Gate { fence, limit });
        let (noted, notes) = Notes::new(client.clone(), gate.clone(), identity, metrics.clone());
        let writer = Writer {
            client,
            gate,
            noted,
            latest: latest::Latest::default(),
            metrics,
        };
        (writer, notes)
    }

    /// The client, for reading.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Applies the status, where that changes anything. Whether it did.
    pub async fn status<K: Written>(&self, object: &K, status: &Status) -> Result<bool, Error> {
        let action = format!("applying the status of {}", named(object));
        let live = encode(&action, object)?;
        if !diff::status_changes(object.meta(), &live["status"], &status.fields) {
            return Ok(false);
        }
        let mut body = body(object);
        body["status"] = Value::Object(status.fields.clone());
        if status.exact {
            body["metadata"]["resourceVersion"] = json!(object.resource_version());
        }
        let parameters = PatchParams {
            force: status.force,
            ..PatchParams::apply(OPERATOR)
        };
        let name = object.name_any();
        let api = self.api(object);
        let patch = Patch::Apply(&body);
        let write = api.patch_status(&name, &parameters, &patch);
        let written = self.write::<K, _>(&action, "apply", write).await?;
        self.latest.wrote(&written.metadata);
        Ok(true)
    }

    /// Applies the operator's finalizer and annotations, and takes away others of its own. The object as it is now, which
    /// the watch tells later: a pass goes on with that one. `None` where nothing was to be written, and where the object
    /// went with its last finalizer.
    pub async fn metadata<K: Written>(
        &self,
        object: &K,
        finalizer: Option<&str>,
        annotations: &[(&str, String)],
    ) -> Result<Option<K>, Error> {
        if !diff::metadata_changes(object.meta(), finalizer, annotations) {
            return Ok(None);
        }
        let action = format!("applying the metadata of {}", named(object));
        let mut body = body(object);
        if let Some(finalizer) = finalizer {
            body["metadata"]["finalizers"] = json!([finalizer]);
        }
        if !annotations.is_empty() {
            let annotations = annotations
                .iter()
                .map(|(name, value)| ((*name).to_owned(), json!(value)));
            body["metadata"]["annotations"] = Value::Object(annotations.collect());
        }
        let Some(written) = self.apply(&action, object, &body).await? else {
            return Ok(None);
        };
        self.latest.wrote(&written.metadata);
        let parsed = written.try_parse();
        parsed
            .map(Some)
            .map_err(|source| Error::Answer { action, source })
    }

    /// Applies `body` as all that the operator owns of an object but its status. The object as it is now; `None` where
    /// it is gone.
    pub async fn apply<K: Written>(
        &self,
        action: &str,
        object: &K,
        body: &Value,
    ) -> Result<Option<DynamicObject>, Error> {
        let name = object.name_any();
        let parameters = PatchParams::apply(OPERATOR);
        let api = self.api(object);
        let patch = Patch::Apply(body);
        let write = api.patch(&name, &parameters, &patch);
        match self.write::<K, _>(action, "apply", write).await {
            // It went with its last finalizer, or was gone already.
            Err(error) if error.is_not_found() && object.meta().deletion_timestamp.is_some() => Ok(None),
            other => other.map(Some),
        }
    }

    /// Whether this object was written since it was read, so that acting on it would be acting twice. It is seen anew in
    /// a moment.
    pub fn has_written_since<K: Written>(&self, object: &K) -> bool {
        self.latest.is_newer_than(object.meta())
    }

    /// Creates an object; one of that name that is there already is as good. Whether it is new.
    pub async fn create<K: Written>(&self, object: &K) -> Result<bool, Error> {
        let action = format!("creating {}", named(object));
        let mut body = encode(&action, object)?;
        body["apiVersion"] = json!(K::api_version(&()));
        body["kind"] = json!(K::kind(&()));
        let body: DynamicObject = serde_json::from_value(body).map_err(|source| Error::Encode {
            action: action.clone(),
            source,
        })?;
        let parameters = PostParams {
            field_manager: Some(OPERATOR.to_owned()),
            ..PostParams::default()
        };
        let api = self.api(object);
        let write = api.create(&parameters, &body);
        match self.write::<K, _>(&action, "create", write).await {
            Ok(_) => Ok(true),
            Err(Error::Changed { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes exactly the object that was read; one that is gone is as good.
    pub async fn delete<K: Written>(&self, object: &K) -> Result<(), Error> {
        self.delete_where(object, None).await
    }

    /// Deletes it only where nobody has written it since it was read.
    pub async fn delete_unchanged<K: Written>(&self, object: &K) -> Result<(), Error> {
        self.delete_where(object, object.resource_version()).await
    }

    async fn delete_where<K: Written>(
        &self,
        object: &K,
        resource_version: Option<String>,
    ) -> Result<(), Error> {
        let action = format!("deleting {}", named(object));
        let name = object.name_any();
        let parameters = DeleteParams::background().preconditions(Preconditions {
            uid: object.uid(),
            resource_version,
        });
        let api = self.api(object);
        let write = api.delete(&name, &parameters);
        match self.write::<K, _>(&action, "delete", write).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }

    /// Has an event published, in a while. Nothing depends on one, and nothing waits for it.
    pub fn note<K: Written>(&self, object: &K, note: &Note) {
        self.noted.send(object.object_ref(&()), note.clone());
    }

    /// Anything else that is written, as all writes are.
    pub async fn fenced<T>(
        &self,
        action: &str,
        write: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Error> {
        self.gate.pass(action, write).await
    }

    async fn write<K: Written, T>(
        &self,
        action: &str,
        verb: &'static str,
        write: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Error> {
        let written = self.fenced(action, write).await;
        let outcome = written.as_ref().err().map_or("Ok", Error::reason);
        self.metrics.wrote(&K::kind(&()), verb, outcome);
        written
    }

    fn api<K: Written>(&self, object: &K) -> Api<DynamicObject> {
        let resource = ApiResource::erase::<K>(&());
        match object.namespace() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), &namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }
}

/// The object's identity, to be applied with what is wanted. The UID keeps an apply from making an object
/// anew that is gone.
pub fn body<K: Written>(object: &K) -> Value {
    let mut metadata = json!({"name": object.name_any(), "uid": object.uid()});
    if let Some(namespace) = object.namespace() {
        metadata["namespace"] = json!(namespace);
    }
    json!({"apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": metadata})
}

fn encode<K: Written>(action: &str, object: &K) -> Result<Value, Error> {
    serde_json::to_value(object).map_err(|source| Error::Encode {
        action: action.to_owned(),
        source,
    })
}
