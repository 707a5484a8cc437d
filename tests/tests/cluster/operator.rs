//! The operator's binary: what it says and does, with the chart's rights and no others.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use understudy_tests::chart::audit::Right;
use understudy_tests::cluster::Context;

use crate::operator_bed::{Agent, Bed, until};
use crate::{operator_assign, operator_rollout};

fn run<F: Future<Output = Result<()>>>(test: F) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(test)
}

/// Assignments and rollouts beside one another; then nothing is written any more. No right was missing, and none is needless.
pub fn operator_assigns_rolls_out_and_uses_every_right(context: &Context) -> Result<()> {
    run(async {
        let bed = Bed::start(context).await?;
        let operator = bed.operator("one")?;
        tokio::try_join!(
            async {
                operator_assign::hosts_own(&bed)
                    .await
                    .context("a host's own reboot")
            },
            async { operator_assign::guests(&bed).await.context("guests") },
            async { operator_assign::reboots(&bed).await.context("reboots") },
            async { operator_assign::lost_nodes(&bed).await.context("lost nodes") },
            async {
                operator_assign::malformed(&bed)
                    .await
                    .context("a malformed object")
            },
            async { operator_rollout::one_by_one(&bed).await.context("one by one") },
            async { operator_rollout::held_up(&bed).await.context("held up") },
            async { operator_rollout::taken_back(&bed).await.context("taken back") },
        )?;
        context.say("every scenario");
        operator_assign::steady(&bed).await.context("steady state")?;
        context.say("nothing is written where nothing changes");
        let used = bed.used()?;
        ensure!(used.missing.is_empty(), "rights are missing: {:?}", used.missing);
        let given = bed.rights().await?;
        // Used for a Host that cannot be read, which no agent writes.
        let of_invalid: Right = ["understudy.dev", "hosts/status", "patch"]
            .map(str::to_owned)
            .into();
        let needless: BTreeSet<_> = given
            .difference(&used.used)
            .filter(|right| **right != of_invalid)
            .collect();
        ensure!(needless.is_empty(), "rights that it does not use: {needless:?}");
        operator.terminate()?;
        bed.stop()
    })
}

/// The leader ends, or is killed: another takes over, and nothing is done twice.
pub fn operator_that_dies_is_followed_by_another(context: &Context) -> Result<()> {
    run(async {
        let bed = Bed::start(context).await?;
        let uid = bed.node("node", json!({})).await?;
        let agent = Agent::start(&bed, "node", &uid).await?;
        let first = bed.operator("first")?;
        leads(&bed, "first").await?;
        let second = bed.operator("second")?;
        is_assigned(&bed, &agent, "one").await?;
        first.terminate()?;
        leads(&bed, "second").await?;
        is_assigned(&bed, &agent, "two").await?;
        context.say("one that ends hands over");
        let _third = bed.operator("third")?;
        second.kill()?;
        // Made while nobody leads.
        is_assigned(&bed, &agent, "three").await?;
        leads(&bed, "third").await?;
        context.say("one that is killed is followed when its lease is over");
        for guest in ["one", "two", "three"] {
            let written = bed.writes()?;
            let finalizers = written
                .iter()
                .filter(|(_, what)| *what == format!("guests {guest}"))
                .count();
            ensure!(
                finalizers <= 4,
                "guest {guest} was written {finalizers} times: {written:?}"
            );
        }
        bed_ends(bed, agent)
    })
}

fn bed_ends(bed: Arc<Bed>, agent: Agent) -> Result<()> {
    drop(agent);
    // The agent's task holds on to the bed for a moment.
    drop(bed);
    Ok(())
}

async fn leads(bed: &Bed, identity: &str) -> Result<()> {
    until(&format!("{identity} to lead"), async || {
        let leader = bed.leader().await?;
        Ok(match leader.as_deref() == Some(identity) {
            true => Ok(()),
            false => Err(format!("{leader:?} leads")),
        })
    })
    .await
}

async fn is_assigned(bed: &Bed, agent: &Agent, guest: &str) -> Result<()> {
    bed.guest(guest, Some(&agent.node)).await?;
    bed.until("Guest", guest, "its assignment", |status| {
        status["nodeUID"] == agent.uid()
    })
    .await?;
    Ok(())
}
