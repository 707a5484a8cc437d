//! Guests: assigned to the node that they name, and let go when their agent has released them.

mod build;

use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use understudy_api::Guest;

use crate::controller::{Again, Context, Reconciler};
use crate::error::Error;
use build::{Found, Plan};

/// Keeps a Guest until nothing of it is left on its node.
pub const FINALIZER: &str = "understudy.dev/guest";
/// The last request of the guest for which a SeamlessReboot was made; one that is deleted is not made again.
pub const ANSWERED: &str = "understudy.dev/answered-reboot-request";

impl Reconciler for Guest {
    const NAME: &'static str = "guest";
    const CONCURRENCY: u16 = 16;

    async fn reconcile(guest: Arc<Guest>, context: Arc<Context>) -> Result<Again, Error> {
        let writer = &context.writer;
        let (mut guest, mut plan) = look(guest, &context);
        if let Some(reboot) = &plan.reboot
            && writer.create(reboot).await?
        {
            tracing::info!(guest = %guest.name_any(), reboot = %reboot.name_any(), "made the SeamlessReboot that the guest asked for");
        }
        // The finalizer before the assignment: no agent holds what may vanish without its word.
        let answered = plan.answered.clone();
        let annotations: Vec<(&str, String)> = answered.into_iter().map(|id| (ANSWERED, id)).collect();
        let finalizer = plan.is_kept.then_some(FINALIZER);
        if let Some(written) = writer.metadata(&*guest, finalizer, &annotations).await? {
            (guest, plan) = look(Arc::new(written), &context);
        }
        if let Some(status) = &plan.status
            && writer.status(&*guest, status).await?
            && let Some(note) = &plan.note
        {
            writer.note(&*guest, note);
        }
        // Whatever it waits for is told: nodes, hosts, and silence.
        Ok(Again::default())
    }
}

/// The object, and what shall become of it.
fn look(guest: Arc<Guest>, context: &Context) -> (Arc<Guest>, Plan) {
    let plan = build::build(&guest, &fetch(&guest, context), Timestamp::now());
    (guest, plan)
}

fn fetch(guest: &Guest, context: &Context) -> Found {
    let assigned = guest.status.as_ref().and_then(|status| status.node_name.clone());
    let node = assigned.or_else(|| guest.spec.node_name.clone());
    Found {
        place: node.map(|node| context.world.place(&node)),
    }
}
