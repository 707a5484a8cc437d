//! What this process has written and may not have seen yet: a watch is behind for a moment, and whoever acts on what it
//! shows meanwhile does everything twice.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use understudy_api::ObjectMeta;

/// By UID: the version that the last write has made.
#[derive(Default)]
pub struct Latest(Mutex<HashMap<String, u64>>);

impl Latest {
    /// A write has made `written` of an object. One that is being deleted may never be seen again, and is not noted.
    pub fn wrote(&self, written: &ObjectMeta) {
        if let (Some(uid), Some(version), None) =
            (&written.uid, version(written), &written.deletion_timestamp)
        {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(uid.clone(), version);
        }
    }

    /// Whether `seen` is older than what was written of it; what was written is forgotten when it is not.
    pub fn is_newer_than(&self, seen: &ObjectMeta) -> bool {
        let Some(uid) = &seen.uid else { return false };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(written) = all.get(uid) else {
            return false;
        };
        // Versions of one resource are ordered as numbers; a server of which that is not true is believed.
        let is_newer = version(seen).is_some_and(|seen| seen < *written);
        if !is_newer {
            all.remove(uid);
        }
        is_newer
    }
}

fn version(meta: &ObjectMeta) -> Option<u64> {
    meta.resource_version.as_ref()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(version: &str) -> ObjectMeta {
        ObjectMeta {
            uid: Some("u".to_owned()),
            resource_version: Some(version.to_owned()),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn an_object_is_outdated_until_what_was_written_is_seen() {
        let latest = Latest::default();
        assert!(!latest.is_newer_than(&meta("9")));
        latest.wrote(&meta("10"));
        assert!(latest.is_newer_than(&meta("9")));
        assert!(!latest.is_newer_than(&meta("10")));
        assert!(latest.0.lock().unwrap().is_empty());
        latest.wrote(&meta("10"));
        assert!(
            !latest.is_newer_than(&meta("11")),
            "somebody else has written since"
        );
        latest.wrote(&meta("10"));
        assert!(
            !latest.is_newer_than(&meta("x")),
            "what is no number is taken as it is"
        );
    }

    #[test]
    fn what_is_being_deleted_is_not_waited_for() {
        let latest = Latest::default();
        let mut last = meta("10");
        last.deletion_timestamp = Some(understudy_api::Time("2026-01-01T00:00:00Z".parse().unwrap()));
        latest.wrote(&last);
        assert!(!latest.is_newer_than(&meta("9")));
    }
}
