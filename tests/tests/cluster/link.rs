//! The link of an agent to a real API server: what is assigned comes in, what happens goes out, and nothing is lost,
//! doubled or written needlessly while either side is away. The engines' part is played by the tests, through the
//! same trait.
#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use understudy_api::conditions::types;
use understudy_api::guest::{DeletionPolicy, GuestPhase};
use understudy_api::managers::{AGENT, OPERATOR};
use understudy_api::node_update::Origin;
use understudy_api::{Guest, NodeUpdate, NodeUpdatePhase, NodeUpdateSpec, Phase, SeamlessReboot};
use understudy_node::cluster::access;
use understudy_node::store::{Object, Objects};

use understudy_tests::cluster::Context as Test;

use crate::link_bed::{Bed, OURS, has, until};
use crate::link_server::{Server, api, apply_status, make};

async fn what_is_assigned_comes_in_and_what_happens_goes_out(server: Arc<Server<'_>>) -> Result<()> {
    let bed = Bed::new(&server, "flow").await?;
    let host = until("the Host", async || {
        let host = bed.api("Host").get_opt("flow").await?;
        Ok(host)
    })
    .await?;
    ensure!(host.data["spec"] == json!({}), "{:?}", host.data);
    bed.cluster.report_host("flow", &mut |status| {
        status.heartbeat = Some(understudy_api::Time(Timestamp::now()));
    })?;
    until("the heartbeat", async || {
        let host = bed.api("Host").get("flow").await?;
        let status = &host.data["status"];
        Ok(
            (status["heartbeat"].is_string() && status["nodeUID"] == bed.access.node_uid.as_str())
                .then_some(()),
        )
    })
    .await?;

    let guest = bed.guest("flow").await?;
    ensure!(guest.metadata.finalizers.is_none() && guest.spec.memory == "512Mi");
    bed.tell_guest(&guest, GuestPhase::Booting, None)?;
    let claimed = bed.reported("Guest", "flow", "Booting").await?;
    ensure!(has(&claimed, "Accepted"), "the operator's conditions stay");
    // The operator sees the claim and lets go; then nobody forces, and all goes on.
    apply_status(
        &bed.api("Guest"),
        "Guest",
        "flow",
        OPERATOR,
        false,
        bed.assignment(),
    )
    .await?;
    bed.tell_guest(&guest, GuestPhase::Running, Some("10.0.0.7"))?;
    let running = bed.reported("Guest", "flow", "Running").await?;
    ensure!(has(&running, "Ready") && has(&running, "Accepted"));
    ensure!(running.data["status"]["nodeName"] == "flow");

    // A change of the spec, and of what the operator says, comes in; our status stays.
    let patch = json!({"spec": {"memory": "1Gi"}, "metadata": {"labels": {"a": "b"}}});
    bed.api("Guest")
        .patch("flow", &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    let changed: Guest = until("the change", async || {
        let guest: Option<Guest> = bed.cluster.guest(&guest.key())?;
        Ok(guest.filter(|guest| guest.spec.memory == "1Gi"))
    })
    .await?;
    ensure!(changed.generation() == 2 && changed.metadata.labels.is_some());
    ensure!(changed.status.context("a status")?.phase == Some(GuestPhase::Running));

    // What describe shows.
    let events = api(&bed.admin, "events.k8s.io/v1", "Event", Some("default"));
    until("events", async || {
        let events = events.list(&Default::default()).await?.items;
        let reasons: Vec<Value> = events
            .into_iter()
            .filter(|event| {
                event.data["regarding"]["name"] == "flow" && event.data["regarding"]["kind"] == "Guest"
            })
            .map(|event| event.data["reason"].clone())
            .collect();
        Ok((reasons.contains(&json!("Booting")) && reasons.contains(&json!("Running"))).then_some(()))
    })
    .await
}

async fn a_phase_is_written_once_and_progress_seldom(server: Arc<Server<'_>>) -> Result<()> {
    let bed = Bed::new(&server, "pace").await?;
    let guest = bed.guest("pace").await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    bed.reported("Guest", "pace", "Running").await?;
    apply_status(
        &bed.api("Guest"),
        "Guest",
        "pace",
        OPERATOR,
        false,
        bed.assignment(),
    )
    .await?;
    // The claim is over once the agent has seen that; from here on writes are counted.
    until("the end of the claim", async || {
        let guest = bed.api("Guest").get("pace").await?;
        let (version, writes) = (guest.metadata.resource_version.clone(), bed.writes());
        tokio::time::sleep(Duration::from_millis(500)).await;
        let again = bed.api("Guest").get("pace").await?.metadata.resource_version;
        Ok((again == version && writes == bed.writes()).then_some(()))
    })
    .await?;
    let before = bed.writes();
    let began = Instant::now();
    for number in 0..40 {
        bed.tell_guest(&guest, GuestPhase::Running, Some(&format!("10.0.0.{number}")))?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    until("the last progress", async || {
        let guest = bed.api("Guest").get("pace").await?;
        Ok((guest.data["status"]["addresses"] == json!(["10.0.0.39"])).then_some(()))
    })
    .await?;
    let (written, seconds) = (bed.writes() - before, began.elapsed().as_secs());
    ensure!(
        written <= 2 + seconds / 5,
        "40 changes of progress made {written} writes in {seconds} s"
    );
    // Nothing changes: nothing is written, by an agent that starts again as well.
    let version = bed.api("Guest").get("pace").await?.metadata.resource_version;
    let mut bed = bed;
    bed.stop();
    bed.start()?;
    until("a complete list", async || {
        Ok((bed.link.as_ref().context("started")?.health().lists >= 3).then_some(()))
    })
    .await?;
    let now = bed.api("Guest").get("pace").await?.metadata.resource_version;
    ensure!(now == version);
    // What changes next is the first that is written.
    bed.tell_guest(&guest, GuestPhase::Saving, Some("10.0.0.39"))?;
    bed.reported("Guest", "pace", "Saving").await?;
    // A write is there to be read before its answer is, and it is the answer that is counted.
    until("the answer to the write", async || {
        Ok((bed.writes() > 0).then_some(()))
    })
    .await?;
    let writes = bed.writes();
    ensure!(writes == 1, "{writes} writes, and one thing has changed");
    Ok(())
}

async fn what_happens_while_the_api_server_is_away_is_told_when_it_is_back(
    server: Arc<Server<'_>>,
) -> Result<()> {
    let bed = Bed::new(&server, "away").await?;
    let guest = bed.guest("away").await?;
    let reboot = bed.reboot("away", "away").await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    bed.reported("Guest", "away", "Running").await?;
    bed.server.stop_api()?;
    until("the agent to notice", async || {
        Ok((!bed.is_connected()).then_some(()))
    })
    .await?;
    let key = reboot.key();
    for phase in [Phase::Confirmed, Phase::Cloning, Phase::Rebooting] {
        bed.cluster
            .report_reboot(&key, &reboot.uid(), true, &mut |status| {
                status.phase = Some(phase)
            })?;
    }
    bed.tell_guest(&guest, GuestPhase::Saving, None)?;
    let before = bed.writes();
    bed.server.start_api()?;
    bed.reported("SeamlessReboot", "away", "Rebooting").await?;
    bed.reported("Guest", "away", "Saving").await?;
    ensure!(bed.is_connected());
    ensure!(
        bed.writes() - before <= 3,
        "each object is written once, not each phase"
    );
    Ok(())
}

async fn a_token_that_is_refused_is_an_api_server_that_is_away(server: Arc<Server<'_>>) -> Result<()> {
    let bed = Bed::new(&server, "token").await?;
    let guest = bed.guest("token").await?;
    bed.tell_guest(&guest, GuestPhase::Booting, None)?;
    bed.reported("Guest", "token", "Booting").await?;
    let mut stale = bed.access.clone();
    stale.token.replace_range(stale.token.len() - 8.., "AAAAAAAA");
    access::write(bed.dir.path(), &stale)?;
    until("401", async || {
        let health = bed.link.as_ref().context("started")?.health();
        Ok((!health.connected && health.message.is_some_and(|why| why.contains("401"))).then_some(()))
    })
    .await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    access::write(bed.dir.path(), &bed.access)?;
    bed.reported("Guest", "token", "Running").await?;
    Ok(())
}

async fn somebody_elses_field_is_not_forced(server: Arc<Server<'_>>) -> Result<()> {
    let bed = Bed::new(&server, "conflict").await?;
    let guest = bed.guest("conflict").await?;
    bed.tell_guest(&guest, GuestPhase::Booting, None)?;
    bed.reported("Guest", "conflict", "Booting").await?;
    let guests = bed.api("Guest");
    apply_status(&guests, "Guest", "conflict", OPERATOR, false, bed.assignment()).await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    bed.reported("Guest", "conflict", "Running").await?;
    // Somebody owns a field of ours beside us, and so it cannot be changed without force.
    let theirs = json!({"phase": "Running"});
    apply_status(&guests, "Guest", "conflict", "somebody", false, theirs).await?;
    bed.tell_guest(&guest, GuestPhase::Saving, None)?;
    until("a conflict", async || {
        let health = bed.link.as_ref().context("started")?.health();
        Ok((health.conflicts >= 2).then_some(()))
    })
    .await?;
    ensure!(guests.get("conflict").await?.data["status"]["phase"] == "Running");
    apply_status(&guests, "Guest", "conflict", "somebody", false, json!({})).await?;
    let saved = bed.reported("Guest", "conflict", "Saving").await?;
    let owners: Vec<_> = saved
        .metadata
        .managed_fields
        .into_iter()
        .flatten()
        .filter(|entry| {
            let fields = entry.fields_v1.as_ref();
            fields.is_some_and(|fields| fields.0["f:status"]["f:phase"].is_object())
        })
        .filter_map(|entry| entry.manager)
        .collect();
    ensure!(owners == [AGENT], "{owners:?}");
    Ok(())
}

async fn a_deleted_guest_is_released_even_by_an_agent_that_died_in_between(
    server: Arc<Server<'_>>,
) -> Result<()> {
    let mut bed = Bed::new(&server, "delete").await?;
    let guest = bed.guest("delete").await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    bed.reported("Guest", "delete", "Running").await?;
    bed.api("Guest")
        .delete("delete", &DeleteParams::default())
        .await?;
    until("the deletion time", async || {
        Ok(bed.cluster.guest(&guest.key())?.filter(Object::is_deleting))
    })
    .await?;
    // The worker has powered it off; nobody is there to tell.
    bed.stop();
    bed.cluster.guest_gone(&guest.key(), &guest.uid())?;
    ensure!(bed.cluster.guest(&guest.key())?.is_none());
    bed.start()?;
    let released = until("Released", async || {
        let guest = bed.api("Guest").get("delete").await?;
        Ok(has(&guest, types::RELEASED).then_some(guest))
    })
    .await?;
    ensure!(has(&released, "Accepted") && bed.cluster.guest(&guest.key())?.is_none());
    ensure!(bed.cluster.released().has(&guest.uid()));
    let patch = json!({"metadata": {"finalizers": null}});
    bed.api("Guest")
        .patch("delete", &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    until("the record to go", async || {
        Ok((!bed.cluster.released().has(&guest.uid())).then_some(()))
    })
    .await
}

async fn absence_destroys_nothing_and_another_guest_of_the_name_waits(server: Arc<Server<'_>>) -> Result<()> {
    let mut bed = Bed::new(&server, "absent").await?;
    let guest = bed.guest("absent").await?;
    bed.tell_guest(&guest, GuestPhase::Running, None)?;
    bed.reported("Guest", "absent", "Running").await?;
    // Somebody takes the finalizer away.
    let patch = json!({"metadata": {"finalizers": null}});
    let guests = bed.api("Guest");
    guests
        .patch("absent", &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    guests.delete("absent", &DeleteParams::default()).await?;
    until("the orphan to be told", async || {
        Ok(bed
            .cluster
            .orphans()
            .contains("Guest default/absent")
            .then_some(()))
    })
    .await?;
    let there = bed.cluster.guest(&guest.key())?.context("the guest goes on")?;
    ensure!(!there.is_deleting());
    bed.cluster.report_host("absent", &mut |_| {})?;
    until("the Host to tell", async || {
        Ok(has(&bed.api("Host").get("absent").await?, "Orphans").then_some(()))
    })
    .await?;

    // And makes it anew, while the agent is away.
    bed.stop();
    let object = json!({"metadata": {"name": "absent", "namespace": "default"},
        "spec": {"nodeName": "absent", "memory": "1Gi", "deletionPolicy": "Delete",
            "disks": [{"name": "root", "role": "Root", "source": "absent.img"}]}});
    let new = make(&bed.admin, OURS, "Guest", object).await?;
    bed.assign("Guest", "absent").await?;
    bed.start()?;
    let displaced: Guest = until("the old one to end", async || {
        Ok(bed.cluster.guest(&guest.key())?.filter(Object::is_deleting))
    })
    .await?;
    ensure!(displaced.uid() == guest.uid());
    ensure!(displaced.spec.deletion_policy == DeletionPolicy::Retain);
    bed.cluster.guest_gone(&guest.key(), &guest.uid())?;
    until("the new one", async || {
        let guest = bed.cluster.guest(&guest.key())?;
        Ok(guest.filter(|guest| Some(guest.uid()) == new.metadata.uid))
    })
    .await?;
    Ok(())
}

async fn a_reboot_of_the_host_is_reported_by_its_name(server: Arc<Server<'_>>) -> Result<()> {
    let bed = Bed::new(&server, "hostgoes").await?;
    let spec = |origin| NodeUpdateSpec {
        node_name: "hostgoes".into(),
        origin,
        host_update: None,
        reason: Some("reboot".into()),
        drain: None,
        update: None,
        expect: None,
        reboot: Default::default(),
        sessions: Default::default(),
    };
    ensure!(
        bed.cluster
            .make_node_update(&NodeUpdate::new("kernel-1", spec(Origin::HostUpdate)))?
            .is_none(),
        "those of HostUpdates are the operator's"
    );
    let local = NodeUpdate::new("host-0123456789", spec(Origin::Host));
    let local = bed.cluster.make_node_update(&local)?.context("made")?;
    bed.cluster
        .report_node_update(&local.key().name, &local.uid(), true, &mut |status| {
            status.phase = Some(NodeUpdatePhase::Saving);
        })?;
    let object = serde_json::to_value(NodeUpdate::new("host-0123456789", spec(Origin::Host)))?;
    let made = make(&bed.admin, OURS, "NodeUpdate", object).await?;
    ensure!(made.metadata.uid != Some(local.uid()));
    bed.reported("NodeUpdate", "host-0123456789", "Saving").await?;
    bed.cluster
        .report_node_update(&local.key().name, &local.uid(), true, &mut |status| {
            status.phase = Some(NodeUpdatePhase::Resumed);
        })?;
    bed.reported("NodeUpdate", "host-0123456789", "Resumed").await?;
    let there = bed.cluster.node_update("host-0123456789")?.context("kept")?;
    ensure!(there.uid() == local.uid(), "the local one stays the truth");
    bed.api("NodeUpdate")
        .delete("host-0123456789", &DeleteParams::default())
        .await?;
    until("the local one to go", async || {
        Ok(bed
            .cluster
            .node_update("host-0123456789")?
            .is_none()
            .then_some(()))
    })
    .await
}

async fn what_was_over_before_the_state_was_lost_never_runs_again(server: Arc<Server<'_>>) -> Result<()> {
    let mut bed = Bed::new(&server, "lost").await?;
    let over = bed.reboot("lost-over", "lost").await?;
    let begun = bed.reboot("lost-begun", "lost").await?;
    for (reboot, phases) in [
        (&over, &[Phase::Confirmed, Phase::Succeeded][..]),
        (&begun, &[Phase::Confirmed, Phase::Cloning]),
    ] {
        for phase in phases {
            let told = bed
                .cluster
                .report_reboot(&reboot.key(), &reboot.uid(), true, &mut |status| {
                    status.phase = Some(*phase);
                });
            told?;
        }
    }
    bed.reported("SeamlessReboot", "lost-over", "Succeeded").await?;
    bed.reported("SeamlessReboot", "lost-begun", "Cloning").await?;
    bed.stop();
    bed.dir = tempfile::tempdir()?;
    access::write(bed.dir.path(), &bed.access)?;
    bed.start()?;
    let over: SeamlessReboot = bed.local(&over.key()).await?;
    ensure!(over.status.context("a status")?.phase == Some(Phase::Succeeded));
    bed.local::<SeamlessReboot>(&begun.key()).await?;
    let failed = bed.reported("SeamlessReboot", "lost-begun", "Failed").await?;
    let message = failed.data["status"]["message"].to_string();
    ensure!(message.contains("no record"), "{message}");
    Ok(())
}

fn run(future: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?
        .block_on(future)
}

/// Tests of the target: each on the control plane that all share, or, where it stops the API server, on its own.
macro_rules! tests {
    ($($plane:ident $name:ident = $scenario:ident;)*) => {
        $(pub fn $name(test: &Test) -> Result<()> {
            run(async { $scenario(Arc::new(Server::$plane(test).await?)).await })
        })*
    };
}

tests! {
    shared link_what_is_assigned_comes_in_and_what_happens_goes_out = what_is_assigned_comes_in_and_what_happens_goes_out;
    shared link_a_phase_is_written_once_and_progress_seldom = a_phase_is_written_once_and_progress_seldom;
    own link_what_happens_while_the_api_server_is_away_is_told_when_it_is_back = what_happens_while_the_api_server_is_away_is_told_when_it_is_back;
    shared link_a_token_that_is_refused_is_an_api_server_that_is_away = a_token_that_is_refused_is_an_api_server_that_is_away;
    shared link_somebody_elses_field_is_not_forced = somebody_elses_field_is_not_forced;
    shared link_a_deleted_guest_is_released_even_by_an_agent_that_died_in_between = a_deleted_guest_is_released_even_by_an_agent_that_died_in_between;
    shared link_absence_destroys_nothing_and_another_guest_of_the_name_waits = absence_destroys_nothing_and_another_guest_of_the_name_waits;
    shared link_a_reboot_of_the_host_is_reported_by_its_name = a_reboot_of_the_host_is_reported_by_its_name;
    shared link_what_was_over_before_the_state_was_lost_never_runs_again = what_was_over_before_the_state_was_lost_never_runs_again;
}
