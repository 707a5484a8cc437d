//! Runs a reconciler for each object that is told of: bounded, with errors tried again later and later.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use kube::Resource;
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::error::Error;
use crate::metrics::Metrics;
use crate::world::World;
use crate::write::{Note, Writer, Written};

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// What was written is seen sooner, and looked at then. Should that never be: this often.
const SEEN_BY: Duration = Duration::from_secs(1);
/// After how many failures in a row an error is told on the object.
const LASTING: u32 = 3;

/// What a reconciler works with.
pub struct Context {
    /// What there is.
    pub world: Arc<World>,
    /// The hand that writes.
    pub writer: Writer,
    /// The Pod that this process runs in, where it runs in one. In its namespace are the operator's Lease and Secrets.
    pub pod: PodName,
}

/// Which Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A reconciler: fetches what an object needs, builds what shall be, applies it.
pub trait Reconciler: Written + 'static {
    /// Its name in metrics.
    const NAME: &'static str;
    /// How many objects are reconciled at a time.
    const CONCURRENCY: u16;

    /// One pass over an object. What is to be looked at again without anything being told says when.
    fn reconcile(
        object: Arc<Self>,
        context: Arc<Context>,
    ) -> impl Future<Output = Result<Again, Error>> + Send;
}

/// When an object is looked at again, if nothing is told of it before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Again(pub Option<Duration>);

impl Again {
    /// The sooner of both.
    pub fn or(self, other: Again) -> Again {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Again(Some(a.min(b))),
            (a, b) => Again(a.or(b)),
        }
    }
}

struct Run<K: Resource<DynamicType = ()>> {
    context: Arc<Context>,
    metrics: Arc<Metrics>,
    failures: Mutex<HashMap<ObjectRef<K>, u32>>,
}

/// Runs the controller of a kind until its queue is closed.
pub async fn run<K: Reconciler>(
    store: Store<K>,
    queue: mpsc::Receiver<ObjectRef<K>>,
    context: Arc<Context>,
    metrics: Arc<Metrics>,
) where
    ObjectRef<K>: Hash + Eq,
{
    let run = Arc::new(Run::<K> {
        context,
        metrics,
        failures: Mutex::default(),
    });
    let queue = futures::stream::unfold(queue, async |mut queue| {
        let next = queue.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(next), queue))
    });
    let config = controller::Config::default().concurrency(K::CONCURRENCY);
    controller::applier(
        |object: Arc<K>, run: Arc<Run<K>>| pass(object, run).boxed(),
        |object, _: &Error, run: Arc<Run<K>>| {
            Action::requeue(run.retry_after(&ObjectRef::from_obj(&*object)))
        },
        run.clone(),
        store,
        Box::pin(queue),
        config,
    )
    .for_each(async |result| match result {
        Ok((object, _)) => run.succeeded(&object),
        // The pass has told of its own errors; an object that is gone needs nothing.
        Err(controller::Error::ReconcilerFailed(..)) => {}
        Err(controller::Error::ObjectNotFound(object)) => {
            tracing::trace!(%object, "gone before it was looked at");
        }
        Err(error) => tracing::error!(controller = K::NAME, %error, "a controller has failed"),
    })
    .await;
}

async fn pass<K: Reconciler>(object: Arc<K>, run: Arc<Run<K>>) -> Result<Action, Error>
where
    ObjectRef<K>: Hash + Eq,
{
    if run.context.writer.has_written_since(&*object) {
        return Ok(Action::requeue(SEEN_BY));
    }
    let begun = Instant::now();
    let result = K::reconcile(object.clone(), run.context.clone()).await;
    let outcome = result.as_ref().err().map_or("Ok", Error::reason);
    run.metrics.reconciled(K::NAME, outcome, begun.elapsed());
    let again = match result {
        Ok(again) => again,
        Err(error) => {
            let reference = ObjectRef::from_obj(&*object);
            match &error {
                // Seen anew in a moment.
                Error::Changed { .. } => tracing::debug!(object = %reference, %error, "tried again"),
                _ => tracing::warn!(object = %reference, %error, "tried again later"),
            }
            // One that lasts: a claim that was not seen yet looks like a conflict for a moment.
            if error.concerns_user() && run.failures_of(&reference) == LASTING {
                let note = Note {
                    warning: true,
                    reason: error.reason().to_owned(),
                    message: error.to_string(),
                };
                run.context.writer.note(&*object, &note);
            }
            return Err(error);
        }
    };
    Ok(again.0.map_or_else(Action::await_change, Action::requeue))
}

impl<K: Resource<DynamicType = ()>> Run<K>
where
    ObjectRef<K>: Hash + Eq,
{
    fn failures_of(&self, object: &ObjectRef<K>) -> u32 {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.get(object).copied().unwrap_or(0)
    }

    fn retry_after(&self, object: &ObjectRef<K>) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(object.clone()).or_insert(0);
        *count = count.saturating_add(1);
        FIRST_RETRY
            .saturating_mul(1 << (*count - 1).min(12))
            .min(LAST_RETRY)
    }

    fn succeeded(&self, object: &ObjectRef<K>) {
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(object);
    }
}
