//! A guest's own request to be rebooted (patent US10606632B2, step 1): it becomes a SeamlessReboot in the
//! guest's name, and the guest is answered when its reboot is confirmed, or why it is not.

use std::time::Duration;

use jiff::Timestamp;
use understudy_api::guest::{OnGuestRequest, RebootRequest, asked_reboot, asked_reboot_name};
use understudy_api::{Guest, Phase, SeamlessReboot, Time};
use understudy_channel::Request;

use crate::guest_agent::Link;
use crate::node::Node;
use crate::store::{Key, Object};

const ANSWER: Duration = Duration::from_secs(5);

/// One pass over the guest's request, if it has one.
pub fn pass(node: &Node, guest: &Guest, link: &Link) {
    let Some((id, reason)) = link.heard().reboot_requested else {
        return;
    };
    let key = guest.key();
    let name = asked_reboot_name(&key.name, &id);
    let known = guest
        .status
        .as_ref()
        .and_then(|status| status.reboot_request.as_ref())
        .is_some_and(|request| request.id == id);
    if guest.spec.on_guest_request == OnGuestRequest::Deny {
        let why = "the Guest says onGuestRequest: Deny; change that, or reboot it by a SeamlessReboot";
        if !known {
            note(node, guest, &id, &reason, None, Some(why));
        }
        answer(link, &id, Err(why.to_owned()));
        return;
    }
    let reboot_key = Key::new(key.namespace.clone(), name.clone());
    let reboot = match node.objects.reboot(&reboot_key) {
        Ok(Some(reboot)) => reboot,
        // The operator was asked, and makes it.
        Ok(None) if known && !node.objects.stands_alone() => return,
        Ok(None) => {
            tracing::info!(guest = %key, id, reason, reboot = name, "the guest asks for a reboot");
            let reboot = make(guest, &name, &reason);
            if let Err(error) = node.objects.make_reboot(&reboot) {
                tracing::error!(guest = %key, %error, "the guest's request could not be taken");
                return;
            }
            note(node, guest, &id, &reason, Some(&name), None);
            return;
        }
        Err(error) => {
            tracing::error!(guest = %key, %error, "the guest's request could not be looked up");
            return;
        }
    };
    if !known {
        // The agent died between making the reboot and noting it.
        note(node, guest, &id, &reason, Some(&name), None);
    }
    let status = reboot.status.unwrap_or_default();
    match status.phase.unwrap_or(Phase::Pending) {
        Phase::Pending => {}
        Phase::Failed | Phase::Aborted => {
            let why = status.message.unwrap_or_default();
            answer(link, &id, Err(format!("SeamlessReboot {name}: {why}")));
        }
        _ => answer(link, &id, Ok(name)),
    }
}

fn answer(link: &Link, id: &str, answer: Result<String, String>) {
    let request = Request::RebootAnswer {
        id: id.to_owned(),
        answer,
    };
    match link.done(&request, ANSWER) {
        Ok(()) => link.reboot_answered(id),
        // It asks again with its next session.
        Err(error) => tracing::warn!(%error, id, "the guest's request was not answered"),
    }
}

fn note(node: &Node, guest: &Guest, id: &str, reason: &str, reboot: Option<&str>, denied: Option<&str>) {
    let reported = node
        .objects
        .report_guest(&guest.key(), &guest.uid(), true, &mut |status| {
            status.reboot_request = Some(RebootRequest {
                id: id.to_owned(),
                reason: reason.chars().filter(|c| !c.is_control()).collect(),
                requested_at: Time(Timestamp::now()),
                seamless_reboot: reboot.map(str::to_owned),
                denied: denied.map(str::to_owned),
            });
        });
    if let Err(error) = reported {
        tracing::error!(guest = %guest.key(), %error, "the guest's request could not be noted");
    }
}

fn make(guest: &Guest, name: &str, reason: &str) -> SeamlessReboot {
    let key = guest.key();
    let mut reboot = asked_reboot(&key.name, name, reason);
    reboot.metadata.namespace = Some(key.namespace);
    reboot
}
