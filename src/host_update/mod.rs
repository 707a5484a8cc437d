//! HostUpdates: a desired state of nodes, rolled out over them a few at a time.

mod alerts;
mod blockers;
mod build;
mod history;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use understudy_api::{HostUpdate, rollout};

use crate::controller::{Again, Context, Reconciler};
use crate::error::Error;
use build::{Found, Plan};

/// Keeps a HostUpdate until its NodeUpdates have come to their end and no node is cordoned for it.
pub const FINALIZER: &str = "understudy.dev/host-update";

impl Reconciler for HostUpdate {
    const NAME: &'static str = "host-update";
    // One at a time: two HostUpdates see each other's picks.
    const CONCURRENCY: u16 = 1;

    async fn reconcile(update: Arc<HostUpdate>, context: Arc<Context>) -> Result<Again, Error> {
        let mut found = fetch(&update, &context);
        let now = Timestamp::now();
        let mut plan = build::build(&update, &found, now);
        // Nobody is asked for what blocks unless something would begin.
        if plan.picks && !update.spec.blockers.is_empty() {
            found.blocked = blockers::look(&update, &found.places, &context).await?;
            plan = build::build(&update, &found, now);
        }
        let again = Again(plan.again);
        apply(&update, plan, &context).await?;
        Ok(again)
    }
}

fn fetch(update: &HostUpdate, context: &Context) -> Found {
    let world = &context.world;
    let selector = &update.spec.node_selector;
    let mut places: Vec<_> = world
        .nodes
        .state_filter(|node| selector.selects(node.labels()))
        .iter()
        .map(|node| world.place(&node.name_any()))
        .collect();
    places.sort_by(|a, b| a.name.cmp(&b.name));
    Found {
        places,
        passes: world
            .node_updates
            .state_filter(|pass| rollout::is_pass_of(pass, update)),
        blocked: BTreeMap::new(),
    }
}

async fn apply(update: &HostUpdate, plan: Plan, context: &Context) -> Result<(), Error> {
    let writer = &context.writer;
    if plan.is_kept {
        writer.metadata(update, Some(FINALIZER), &[]).await?;
    }
    // A pick is in the status before its NodeUpdate is made, written only where nobody else has picked
    // meanwhile: two leaders never exceed maxUnavailable.
    if let Some(status) = &plan.status
        && writer.status(update, status).await?
    {
        for note in &plan.notes {
            writer.note(update, note);
        }
        if plan.picks {
            // The NodeUpdates follow when the picks are seen in the status.
            return Ok(());
        }
    }
    // After the status: that it was aborted is noted there before anything is taken back.
    for pass in &plan.delete {
        tracing::info!(update = %update.name_any(), pass = %pass.name_any(), "taken back");
        writer.delete(&**pass).await?;
    }
    for pass in &plan.forget {
        tracing::info!(update = %update.name_any(), pass = %pass.name_any(), "deleted: historyLimit");
        writer.delete(&**pass).await?;
    }
    for pass in &plan.make {
        if writer.create(pass).await? {
            tracing::info!(update = %update.name_any(), node = pass.spec.node_name, pass = %pass.name_any(), "a pass is begun");
        }
    }
    if !plan.is_kept {
        writer.metadata(update, None, &[]).await?;
    }
    Ok(())
}
