//! Events: published one after the other, beside what is written, so that a burst of them holds nothing up.

use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::{self, error::TrySendError};
use understudy_api::managers::OPERATOR;

use super::Gate;
use crate::error::Error;
use crate::metrics::Metrics;

/// How many may wait to be published. What comes when there are as many is not published.
const QUEUE: usize = 4096;
/// How much of a message is published, in characters: the API server refuses one of more than 1024 bytes.
const LENGTH: usize = 1000;

/// An event to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether it is a warning.
    pub warning: bool,
    /// One of the reasons of the API.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Takes events to be published.
pub(super) struct Sender(mpsc::Sender<(ObjectReference, Note)>);

impl Sender {
    /// Never waits; what cannot be taken is logged.
    pub(super) fn send(&self, object: ObjectReference, note: Note) {
        if let Err(TrySendError::Full((object, note))) = self.0.try_send((object, note)) {
            let name = object.name.as_deref();
            tracing::warn!(
                kind = object.kind,
                name,
                reason = note.reason,
                "too many events wait: this one is not published"
            );
        }
    }
}

/// Publishes events.
pub struct Notes {
    queue: mpsc::Receiver<(ObjectReference, Note)>,
    gate: Arc<Gate>,
    recorder: Recorder,
    metrics: Arc<Metrics>,
}

impl Notes {
    pub(super) fn new(
        client: Client,
        gate: Arc<Gate>,
        identity: &str,
        metrics: Arc<Metrics>,
    ) -> (Sender, Notes) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let reporter = Reporter {
            controller: OPERATOR.to_owned(),
            instance: Some(identity.to_owned()),
        };
        let recorder = Recorder::new(client, reporter);
        let notes = Notes {
            queue,
            gate,
            recorder,
            metrics,
        };
        (Sender(sender), notes)
    }

    /// Publishes until nobody can send any more. One that cannot be published is logged: nothing depends on it.
    pub async fn publish(mut self) {
        while let Some((object, note)) = self.queue.recv().await {
            let event = Event {
                type_: if note.warning {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: note.reason.clone(),
                note: Some(note.message.chars().take(LENGTH).collect()),
                action: "Reconcile".to_owned(),
                secondary: None,
            };
            let publish = self.recorder.publish(&event, &object);
            let published = self.gate.pass("publishing an event", publish).await;
            let outcome = published.as_ref().err().map_or("Ok", Error::reason);
            self.metrics.wrote("Event", "publish", outcome);
            if let Err(error) = published {
                let name = object.name.as_deref();
                tracing::warn!(kind = object.kind, name, reason = note.reason, %error, "an event could not be published");
            }
        }
    }
}
