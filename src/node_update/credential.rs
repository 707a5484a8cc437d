//! The credential of a NodeUpdate whose provider is the operator: what is to be done for it, and who is given it.
//! Pure.
//!
//! The credential is the private half of a key pair, in a Secret of its own. Its public half goes to the agent before
//! anything is saved: so nothing that the host keeps opens its sessions, and when the Secret is gone nobody does.

use kube::ResourceExt;
use understudy_api::conditions::{reasons, types};
use understudy_api::node_update::{Credential, CredentialRequest};
use understudy_api::{NodeUpdate, NodeUpdatePhase};

use super::status::condition;
use crate::place::{Owned, Place, Standing};
use crate::write::Note;

/// How many boots of a host it is released to, at most: one that goes down as often before its sessions go on has
/// another trouble, and what is released without end is not kept.
const MOST_BOOTS: usize = 16;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Nothing.
    Nothing,
    /// It is made, before the agent begins.
    Make,
    /// The agent asks for it.
    Answer(CredentialRequest),
    /// Nobody needs it any more.
    Destroy,
}

/// What the operator says of it in the status.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// The field.
    pub credential: Option<Credential>,
    /// The condition.
    pub condition: Owned,
    /// Told when the status changes.
    pub note: Option<Note>,
}

/// For whom the credential was made, and to whom it was released: the Secret has it beside the key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// UID of the Node.
    pub node_uid: String,
    /// Machine ID of the host.
    pub machine_id: String,
    /// Boots it was released to, each with the public key that it was sealed to.
    pub releases: Vec<CredentialRequest>,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is released to a boot that had not asked before: recorded first.
    Release,
    /// It was released to exactly this key already: whether that was read is not known, so it is said again.
    Again,
    /// Not yet: the host has not said what must be known.
    Wait,
    /// It is not released to this key.
    Refuse(String),
}

/// What is to be done for a NodeUpdate. `begins`: node and agent are there, and the agent has not begun.
pub fn task(update: &NodeUpdate, place: &Place, begins: bool) -> Task {
    if !update.is_kept_by_operator() {
        return Task::Nothing;
    }
    let status = update.status.clone().unwrap_or_default();
    let asks = match (&status.credential, &status.credential_request) {
        (Some(credential), Some(request)) if !is_answered(credential, request) => Some(request.clone()),
        _ => None,
    };
    if !is_needed(update, place) {
        let kept = condition(&status, types::CREDENTIAL_KEPT);
        let is_destroyed = kept.is_some_and(|there| there.reason == reasons::DESTROYED);
        return match asks {
            _ if !is_destroyed => Task::Destroy,
            // Who asks for what is gone is told so, and does not wait.
            Some(request) => Task::Answer(request),
            None => Task::Nothing,
        };
    }
    match asks {
        Some(request) => Task::Answer(request),
        None if begins && status.credential.is_none() => Task::Make,
        None => Task::Nothing,
    }
}

/// Whether the credential must stay: a session that was saved with it may still be resumed. That holds a NodeUpdate
/// that was deleted, too; unless its node is out of service or gone, so that nobody will ever ask.
pub fn is_needed(update: &NodeUpdate, place: &Place) -> bool {
    if !update.is_kept_by_operator() {
        return false;
    }
    let Some(status) = &update.status else { return true };
    let standing = status.node_uid.as_deref().map(|uid| place.standing(uid));
    let is_over = status.phase.is_some_and(NodeUpdatePhase::is_terminal);
    if is_over && update.metadata.deletion_timestamp.is_some() && standing.is_none_or(Standing::releases) {
        return false;
    }
    // Where the operator has ended what an agent had begun, nobody knows how far that has come since.
    let mut phases = status.phase_transitions.iter().map(|transition| transition.phase);
    let has_begun = phases.any(|phase| phase != NodeUpdatePhase::Pending && !phase.is_terminal());
    status.needs_keys() || (has_begun && standing.is_some_and(Standing::is_lost))
}

fn is_answered(credential: &Credential, request: &CredentialRequest) -> bool {
    let of_release = credential.release.as_ref();
    let of_refusal = credential.refusal.as_ref();
    of_release.is_some_and(|there| there.boot_id == request.boot_id && there.public_key == request.public_key)
        || of_refusal
            .is_some_and(|there| there.boot_id == request.boot_id && there.public_key == request.public_key)
}

/// Whether it is released to who asks.
pub fn judge(update: &NodeUpdate, place: &Place, kept: &Kept, request: &CredentialRequest) -> Verdict {
    let node = &place.name;
    let status = update.status.as_ref();
    let saving = status
        .and_then(|status| status.result.as_ref()?.before.as_ref())
        .map(|before| before.boot_id.as_str());
    if saving.is_none_or(|saving| saving == request.boot_id) {
        let message = "the credential is released after the host's reboot only".to_owned();
        return Verdict::Refuse(message);
    }
    let (Some(there), Some(boot)) = (&place.node, &place.boot_id) else {
        return Verdict::Wait;
    };
    if there.uid != kept.node_uid {
        return Verdict::Refuse(format!(
            "the credential was made for another Node {node} (UID {}) than there is now ({})",
            kept.node_uid, there.uid
        ));
    }
    if place.machine_id.as_deref().unwrap_or_default() != kept.machine_id {
        return Verdict::Refuse(format!(
            "the credential was made for another machine than the one that is node {node} now"
        ));
    }
    // The agent tells its Host of the same boot, a moment before or after.
    if *boot != request.boot_id {
        return Verdict::Wait;
    }
    match kept.releases.iter().find(|there| there.boot_id == request.boot_id) {
        Some(there) if there.public_key == request.public_key => Verdict::Again,
        Some(_) => Verdict::Refuse(
            "in this boot of the host the credential was released already, to another key; it is released once to each boot: reboot the host to ask again".to_owned(),
        ),
        None if kept.releases.len() >= MOST_BOOTS => Verdict::Refuse(format!(
            "the credential was released to {MOST_BOOTS} boots of the host already"
        )),
        None => Verdict::Release,
    }
}

/// It is kept, and was released to nobody.
pub fn made(public_key: String, secret: &str) -> Said {
    let message = format!("Secret {secret} has the credential; it is released to the node after its reboot");
    Said {
        credential: Some(Credential {
            public_key,
            release: None,
            refusal: None,
        }),
        condition: Owned::new(types::CREDENTIAL_KEPT, true, reasons::KEPT, message),
        note: None,
    }
}

/// It was released.
pub fn released(before: &Credential, release: understudy_api::node_update::CredentialRelease) -> Said {
    let times = match release.count {
        1 => String::new(),
        count => format!(", the {count}. boot that it was released to"),
    };
    let message = format!("the credential was released to boot {}{times}", release.boot_id);
    Said {
        credential: Some(Credential {
            release: Some(release),
            refusal: None,
            ..before.clone()
        }),
        condition: Owned::new(
            types::CREDENTIAL_KEPT,
            true,
            reasons::RELEASED,
            format!("{message}; it is kept until no session needs it any more"),
        ),
        note: Some(Note {
            warning: false,
            reason: reasons::RELEASED.to_owned(),
            message,
        }),
    }
}

/// A request was refused. `is_there`: whether the Secret is.
pub fn refused(before: &Credential, request: &CredentialRequest, message: String, is_there: bool) -> Said {
    Said {
        credential: Some(Credential {
            refusal: Some(understudy_api::node_update::CredentialRefusal {
                boot_id: request.boot_id.clone(),
                public_key: request.public_key.clone(),
                message: message.clone(),
            }),
            ..before.clone()
        }),
        condition: Owned::new(
            types::CREDENTIAL_KEPT,
            is_there,
            reasons::CREDENTIAL_REFUSED,
            message.clone(),
        ),
        note: Some(Note {
            warning: true,
            reason: reasons::CREDENTIAL_REFUSED.to_owned(),
            message,
        }),
    }
}

/// It is gone. What was said of it stays.
pub fn destroyed(update: &NodeUpdate) -> Said {
    let message = "no session needs the credential any more: it was destroyed".to_owned();
    Said {
        credential: update
            .status
            .as_ref()
            .and_then(|status| status.credential.clone()),
        condition: Owned::new(types::CREDENTIAL_KEPT, false, reasons::DESTROYED, message),
        note: None,
    }
}

/// Name of the Secret.
pub fn secret_name(update: &NodeUpdate) -> String {
    format!("understudy-credential-{}", update.uid().unwrap_or_default())
}

#[cfg(test)]
#[path = "credential_test.rs"]
mod tests;
