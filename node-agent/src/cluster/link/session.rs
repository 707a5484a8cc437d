//! One connection to the API server: watches, and writes of statuses, until it is away or the link ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::events::v1::Event;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::Notify;
use tokio::time::timeout;
use understudy_api::managers::AGENT;
use understudy_api::{Guest, Host, NodeUpdate, SeamlessReboot};

use super::client::{REQUEST, Trouble, trouble, watch_trouble};
use super::desk::{Job, Tag};
use super::desks::Desks;
use super::health::Keeper;
use crate::cluster::kinds::Mirrored;
use crate::cluster::reports::Answer;
use crate::store::{Key, Object};

/// Events of a watch that are taken in at once.
const BATCH: usize = 256;
/// Writes that are under way at once; the rest waits.
const CONCURRENT: usize = 8;
/// Events that are under way at once; more are dropped, the status tells it all.
const EVENTS: usize = 16;
/// How long the end of the link waits for its last writes.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The API server is away.
    Away(String),
    /// There is another access.
    Access,
    /// The link ends.
    Stopped,
    /// The Host was deleted behind our back.
    NoHost,
}

/// What a session is told from outside.
#[derive(Debug)]
pub struct Signals {
    /// The store has changed, or time has passed, or any of the others.
    pub bell: Notify,
    /// The link ends.
    pub stopping: AtomicBool,
}

type Watches = SelectAll<BoxStream<'static, Vec<(Tag, watcher::Result<watcher::Event<DynamicObject>>)>>>;
type Done = (
    Tag,
    Key,
    Result<DynamicObject, Trouble>,
    Option<DynamicObject>,
    Option<Box<Event>>,
);

/// Runs a session. The desks come back with what was tried. `look`: whether there is another access.
pub async fn run(
    mut desks: Desks,
    client: &Client,
    node: &str,
    signals: &Signals,
    health: &Arc<Keeper>,
    mut look: impl FnMut() -> bool,
) -> (Option<Desks>, End) {
    let mut watches = Watches::new();
    watches.push(watch::<Guest>(client, Tag::Guest, node));
    watches.push(watch::<SeamlessReboot>(client, Tag::Reboot, node));
    watches.push(watch::<NodeUpdate>(client, Tag::NodeUpdate, node));
    let mut writes: FuturesUnordered<BoxFuture<'static, Done>> = FuturesUnordered::new();
    let mut events: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
    let mut told = std::collections::BTreeSet::new();
    loop {
        let is_stopping = signals.stopping.load(Ordering::Relaxed);
        // Files are read and written, and synced.
        let pace = is_stopping.then_some(Duration::ZERO);
        let worked = tokio::task::spawn_blocking(move || {
            let agenda = desks.work(pace);
            (desks, agenda)
        });
        let agenda;
        (desks, agenda) = match worked.await {
            Ok(worked) => worked,
            Err(error) => {
                tracing::error!(%error, "mirroring has failed; it begins anew");
                return (None, End::Access);
            }
        };
        for job in agenda.jobs {
            // The rest is found again when there is room.
            if writes.len() >= CONCURRENT {
                desks.unanswered(job.tag, &job.key);
                continue;
            }
            writes.push(write(client.clone(), job).boxed());
        }
        if is_stopping {
            let _ = timeout(LAST_WRITES, writes.by_ref().for_each(|_| async {})).await;
            return (Some(desks), End::Stopped);
        }
        if desks.lacks_host() {
            return (Some(desks), End::NoHost);
        }
        let next = agenda.next.map(tokio::time::Instant::from_std);
        tokio::select! {
            Some(batch) = watches.next() => {
                for (tag, event) in batch {
                    match event {
                        Ok(event) => {
                            if desks.event(tag, event) {
                                health.count(|health| health.lists += 1);
                                desks.tidy();
                            }
                        }
                        Err(error) => match watch_trouble(&error) {
                            None => tracing::debug!(kind = ?tag, %error, "the watch goes on"),
                            Some(Trouble::Away(why)) => return (Some(desks), End::Away(why)),
                            Some(Trouble::Answer(answer)) => {
                                let why = format!("watching {tag:?}: {answer:?}");
                                if told.insert(why.clone()) {
                                    tracing::error!("{why}; it is tried again");
                                }
                            }
                        },
                    }
                }
            }
            Some((tag, key, result, fresh, event)) = writes.next(), if !writes.is_empty() => {
                match result {
                    Ok(object) => {
                        health.count(|health| health.writes += 1);
                        desks.settle(tag, &key, &Answer::Written, Some(object));
                        if let Some(event) = event.filter(|_| events.len() < EVENTS) {
                            events.push(tell(client.clone(), *event, health.clone()).boxed());
                        }
                    }
                    Err(Trouble::Away(why)) => {
                        desks.unanswered(tag, &key);
                        return (Some(desks), End::Away(why));
                    }
                    Err(Trouble::Answer(answer)) => {
                        health.count(|health| match &answer {
                            Answer::Conflict(_) => health.conflicts += 1,
                            Answer::Refused(_) => health.refused += 1,
                            Answer::Written | Answer::Gone => {}
                        });
                        desks.settle(tag, &key, &answer, fresh);
                    }
                }
            }
            Some(()) = events.next(), if !events.is_empty() => {}
            () = signals.bell.notified() => {}
            () = async { match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            } } => {}
        }
        if look() {
            return (Some(desks), End::Access);
        }
    }
}

/// Watches the objects of a kind that are this node's, as they are: what we do not understand stalls no other.
fn watch<O: Mirrored>(
    client: &Client,
    tag: Tag,
    node: &str,
) -> BoxStream<'static, Vec<(Tag, watcher::Result<watcher::Event<DynamicObject>>)>> {
    let resource = O::resource();
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let config = watcher::Config::default().fields(&format!("{}={node}", O::NODE_FIELD));
    watcher(api, config)
        .default_backoff()
        .map(move |event| (tag, event))
        .ready_chunks(BATCH)
        .boxed()
}

fn resource(tag: Tag) -> ApiResource {
    match tag {
        Tag::Guest => Guest::resource(),
        Tag::Reboot => SeamlessReboot::resource(),
        Tag::NodeUpdate => NodeUpdate::resource(),
        Tag::Host => ApiResource::erase::<Host>(&()),
    }
}

/// Within the time of a request.
async fn asked<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
    match timeout(REQUEST, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(trouble(&error)),
        Err(_) => Err(Trouble::Away(format!("no answer within {} s", REQUEST.as_secs()))),
    }
}

/// Applies a status. Where somebody else's write stood against it, the object as it is now comes with the answer.
async fn write(client: Client, job: Job) -> Done {
    let resource = resource(job.tag);
    let api: Api<DynamicObject> = match job.key.namespace.as_str() {
        "" => Api::all_with(client, &resource),
        namespace => Api::namespaced_with(client, namespace, &resource),
    };
    let name = job.key.name.clone();
    let patch = Patch::Apply(&job.write.body);
    let result = asked(api.patch_status(&name, &job.write.params, &patch)).await;
    let fresh = match &result {
        Err(Trouble::Answer(Answer::Conflict(_))) => asked(api.get(&name)).await.ok(),
        _ => None,
    };
    (job.tag, job.key, result, fresh, job.event)
}

/// Creates an event. One that is lost is lost: the status tells the same.
async fn tell(client: Client, event: Event, health: Arc<Keeper>) {
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let api: Api<Event> = Api::namespaced(client, &namespace);
    match asked(api.create(&PostParams::default(), &event)).await {
        Ok(_) => health.count(|health| health.events += 1),
        Err(why) => tracing::debug!(?why, "an event was not written"),
    }
}

/// Finds the node's Host, which is made where it is missing.
pub async fn host(client: &Client, node: &str) -> Result<Host, Trouble> {
    let api: Api<Host> = Api::all(client.clone());
    if let Some(host) = asked(api.get_opt(node)).await? {
        return Ok(host);
    }
    let params = PostParams {
        field_manager: Some(AGENT.to_owned()),
        ..PostParams::default()
    };
    match asked(api.create(&params, &Host::new(node, Default::default()))).await {
        Ok(host) => {
            tracing::info!(host = node, "the Host was made");
            Ok(host)
        }
        // Somebody was faster, or it could not be looked at.
        Err(Trouble::Answer(Answer::Conflict(_))) => asked(api.get(node)).await,
        Err(Trouble::Answer(Answer::Gone)) => Err(Trouble::Away(format!(
            "it does not know the kind {}; are Understudy's CRDs installed?",
            Host::KIND.name()
        ))),
        Err(trouble) => Err(trouble),
    }
}
