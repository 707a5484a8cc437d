//! SeamlessReboots: assigned to the node of their Guest, taken away when they are over.

mod build;

use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use understudy_api::SeamlessReboot;

use crate::controller::{Again, Context, Reconciler};
use crate::error::Error;
use build::{Found, Plan};

/// Keeps a SeamlessReboot until its agent has brought it to its end.
pub const FINALIZER: &str = "understudy.dev/reboot";

impl Reconciler for SeamlessReboot {
    const NAME: &'static str = "seamless-reboot";
    // A burst of reboots is assigned within a second while each write takes tens of milliseconds.
    const CONCURRENCY: u16 = 48;

    async fn reconcile(reboot: Arc<SeamlessReboot>, context: Arc<Context>) -> Result<Again, Error> {
        let writer = &context.writer;
        let (mut reboot, mut plan) = look(reboot, &context);
        let finalizer = plan.is_kept.then_some(FINALIZER);
        if let Some(written) = writer.metadata(&*reboot, finalizer, &[]).await? {
            (reboot, plan) = look(Arc::new(written), &context);
        }
        if let Some(status) = &plan.status
            && writer.status(&*reboot, status).await?
            && let Some(note) = &plan.note
        {
            writer.note(&*reboot, note);
        }
        if plan.is_expired {
            tracing::info!(reboot = %reboot.name_any(), "deleted: ttlSecondsAfterFinished");
            writer.delete(&*reboot).await?;
        }
        Ok(Again(plan.again))
    }
}

/// The object, and what shall become of it.
fn look(reboot: Arc<SeamlessReboot>, context: &Context) -> (Arc<SeamlessReboot>, Plan) {
    let plan = build::build(&reboot, &fetch(&reboot, context), Timestamp::now());
    (reboot, plan)
}

fn fetch(reboot: &SeamlessReboot, context: &Context) -> Found {
    let mut key = ObjectRef::new(&reboot.spec.guest_name);
    key.namespace = reboot.namespace();
    let guest = context.world.guests.get(&key);
    let of_guest = guest
        .as_ref()
        .and_then(|guest| guest.status.as_ref()?.node_name.clone());
    let assigned = reboot.status.as_ref().and_then(|status| status.node_name.clone());
    Found {
        place: assigned.or(of_guest).map(|node| context.world.place(&node)),
        guest,
    }
}
