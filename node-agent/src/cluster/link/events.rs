//! Events for phases: what `kubectl describe` shows.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use understudy_api::ObjectMeta;
use uuid::Uuid;

use crate::cluster::kinds::Mirrored;

/// Who writes events.
pub const CONTROLLER: &str = "understudy.dev/node-agent";
/// Bounds of an Event's fields (events.k8s.io/v1).
const MAX_NOTE: usize = 1024;
const MAX_REASON: usize = 128;
/// Phases that people should look at.
const WARNINGS: [&str; 3] = ["Failed", "Aborted", "RolledBack"];

/// The event that an object has come to a phase.
pub fn of_phase<O: Mirrored>(object: &O, node: &str, now: Timestamp) -> Option<Event> {
    let phase = object.phase()?;
    let (reason, message) = object.words();
    let meta = object.meta();
    // Objects of the cluster have theirs where kubectl looks for them.
    let namespace = meta.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let note = match message.is_empty() {
        true => reason,
        false => format!("{reason}: {message}"),
    };
    let name = meta.name.clone().unwrap_or_default();
    Some(Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{}", cut(&name, 200), Uuid::new_v4().simple())),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        action: Some("Phase".to_owned()),
        reason: Some(cut(&phase, MAX_REASON).to_owned()),
        note: Some(cut(&note, MAX_NOTE).to_owned()),
        type_: Some(
            if WARNINGS.contains(&phase.as_str()) {
                "Warning"
            } else {
                "Normal"
            }
            .to_owned(),
        ),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(cut(node, MAX_REASON).to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some(understudy_api::API_VERSION.to_owned()),
            kind: Some(O::KIND.name().to_owned()),
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Event::default()
    })
}

fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use understudy_api::{Guest, Phase, SeamlessReboot};

    use super::*;

    #[test]
    fn an_event_names_its_object_and_fits_into_its_bounds() {
        let mut reboot: SeamlessReboot = serde_json::from_value(serde_json::json!({
            "apiVersion": "understudy.dev/v1alpha1", "kind": "SeamlessReboot",
            "metadata": {"name": "kernel", "namespace": "shop", "uid": "u"}, "spec": {"guestName": "web"},
        }))
        .unwrap();
        assert!(of_phase(&reboot, "alpha", Timestamp::UNIX_EPOCH).is_none());
        let status = reboot.status.get_or_insert_default();
        status.phase = Some(Phase::Failed);
        status.reason = Some("CloneDied".into());
        status.message = Some("ü".repeat(2000));
        let event = of_phase(&reboot, "alpha", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.reason.as_deref(), Some("Failed"));
        let note = event.note.unwrap();
        assert!(note.starts_with("CloneDied: ü") && note.len() <= MAX_NOTE);
        let regarding = event.regarding.unwrap();
        assert_eq!(
            (regarding.kind.as_deref(), regarding.namespace.as_deref()),
            (Some("SeamlessReboot"), Some("shop"))
        );
        assert_eq!(event.metadata.namespace.as_deref(), Some("shop"));
        let _: fn(&Guest, &str, Timestamp) -> Option<Event> = of_phase::<Guest>;
    }
}
