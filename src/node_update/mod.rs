//! NodeUpdates: before a HostUpdate's may begin, its node is cordoned and drained; when it is over, by
//! whatever end, the node is uncordoned, unless an administrator had cordoned it. Where the operator is the credential
//! provider it keeps what opens the sessions meanwhile.

mod build;
mod credential;
mod drain;
mod secret;
mod status;

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use serde_json::json;
use understudy_api::conditions::types;
use understudy_api::{NodeUpdate, NodeUpdatePhase};

use crate::controller::{Again, Context, Reconciler};
use crate::error::Error;
use crate::place::CORDONED_FOR;
use crate::write::{self, Note};
use build::{Cordon, Found, Plan};
pub use credential::is_needed;
use drain::Pods;

/// Keeps a NodeUpdate until it has come to its end and its node is uncordoned.
pub const FINALIZER: &str = "understudy.dev/node-update";

/// Whether it is over and its node is as it was before, so that it holds nothing up. It may stay all the same, for a
/// session that waits to be resumed.
pub fn has_given_back_its_node(update: &NodeUpdate) -> bool {
    let status = update.status.clone().unwrap_or_default();
    let is_over = status.phase.is_some_and(NodeUpdatePhase::is_terminal);
    let uncordoned = status::condition(&status, types::UNCORDONED);
    is_over && uncordoned.is_some_and(|there| there.status == "True")
}

impl Reconciler for NodeUpdate {
    const NAME: &'static str = "node-update";
    const CONCURRENCY: u16 = 8;

    async fn reconcile(update: Arc<NodeUpdate>, context: Arc<Context>) -> Result<Again, Error> {
        let mut found = fetch(&update, &context);
        let task = credential::task(&update, &found.place, build::begins(&update, &found));
        found.said = secret::perform(task, &update, &found.place, &context).await?;
        if build::drains(&update, &found) {
            found.pods = Some(drain::pass(&update.spec.node_name, &context).await?);
        }
        let plan = build::build(&update, &found, Timestamp::now());
        let again = Again(plan.again);
        let note = found.said.and_then(|said| said.note);
        apply(&update, plan, note, &context).await?;
        Ok(again)
    }
}

fn fetch(update: &NodeUpdate, context: &Context) -> Found {
    let node = &update.spec.node_name;
    Found {
        place: context.world.place(node),
        others: context.world.node_updates_of(node),
        pods: None::<Pods>,
        said: None,
    }
}

async fn apply(
    update: &NodeUpdate,
    plan: Plan,
    of_credential: Option<Note>,
    context: &Context,
) -> Result<(), Error> {
    let writer = &context.writer;
    // Before anything is done to the node there is something that will undo it.
    if plan.is_kept {
        writer.metadata(update, Some(FINALIZER), &[]).await?;
    }
    if let Some(cordon) = plan.cordon {
        set_cordon(update, cordon, context).await?;
    }
    if let Some(status) = &plan.status
        && writer.status(update, status).await?
    {
        for note in plan.note.iter().chain(&of_credential) {
            writer.note(update, note);
        }
    }
    if !plan.is_kept {
        writer.metadata(update, None, &[]).await?;
    }
    Ok(())
}

/// The node's `unschedulable` and the note of whose it is, in one apply: both are the operator's, or neither.
async fn set_cordon(update: &NodeUpdate, cordon: Cordon, context: &Context) -> Result<(), Error> {
    let name = &update.spec.node_name;
    let Some(node) = context.world.nodes.get(&ObjectRef::<Node>::new(name)) else {
        return Ok(());
    };
    let mut body = write::body(&*node);
    let action = match cordon {
        Cordon::Set => {
            body["metadata"]["annotations"] = json!({CORDONED_FOR: update.name_any()});
            // Exactly the node that was seen: an administrator may have cordoned it since.
            body["metadata"]["resourceVersion"] = json!(node.resource_version());
            body["spec"] = json!({"unschedulable": true});
            format!("cordoning node {name}")
        }
        Cordon::Release => format!("uncordoning node {name}"),
    };
    tracing::info!(node = name, update = %update.name_any(), action);
    context.writer.apply(&action, &*node, &body).await.map(drop)
}
