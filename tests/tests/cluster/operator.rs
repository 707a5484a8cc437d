//! The operator's behaviour at a real API server: scenarios side by side, on one cluster, under one leader; then what it
//! was allowed to do, against what it did.

use std::collections::BTreeSet;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail, ensure};
use kube::Client;
use tokio::task::LocalSet;

use understudy_tests::cluster::Context;
use understudy_tests::operator::{Installed, USER};

use crate::chart_rights::{NAMESPACE, rights};
use crate::operator_bed::{Bed, OPERATOR, Scenario};
use crate::{operator_assign, operator_credential, operator_rollout};

/// Rights that no scenario here uses, and why the operator has them.
const UNUSED: &[(&str, &str, &str)] = &[
    // Tells of a Host that cannot be read; `operator_writes_nothing_in_a_steady_state_and_another_takes_over` has one.
    ("understudy.dev", "hosts/status", "patch"),
];

/// Every scenario; `UNDERSTUDY_SCENARIO=name` runs those alone whose name has this in it, and does not look at rights.
pub fn operator_does_its_work_with_the_charts_rights_and_uses_each(context: &Context) -> Result<()> {
    let installed = Installed::start(&context.dir.join("own"))?;
    let mut operator = installed.operator(OPERATOR, &[])?;
    operator.wait_until_it_leads()?;
    context.say("an operator leads");
    let wanted = std::env::var("UNDERSTUDY_SCENARIO").unwrap_or_default();
    let all = [
        operator_assign::SCENARIOS,
        operator_rollout::SCENARIOS,
        operator_credential::SCENARIOS,
    ]
    .concat();
    let chosen: Vec<Scenario> = all
        .into_iter()
        .filter(|(name, _)| name.contains(&wanted))
        .collect();
    ensure!(!chosen.is_empty(), "no scenario's name has {wanted:?} in it");

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let (failures, given) = runtime.block_on(async {
        let admin = Client::try_from(installed.plane.admin().await?)?;
        let failures = play(context, &Rc::new(Bed::new(admin.clone())), chosen).await;
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let mut given = rights(&admin, &format!("{rbac}/clusterroles/understudy-operator")).await;
        let role = format!("{rbac}/namespaces/{NAMESPACE}/roles/understudy-operator");
        given.extend(rights(&admin, &role).await);
        anyhow::Ok((failures, given))
    })?;
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    ensure!(
        operator.metric("understudy_operator_invalid_objects_total")? == 0.0,
        "an object was not read"
    );
    ensure!(operator.terminate()?.success(), "it did not end in order");
    let used = installed.audit()?.used_by(USER);
    ensure!(
        used.missing.is_empty(),
        "the operator was forbidden: {:?}",
        used.missing
    );
    if wanted.is_empty() {
        let known: BTreeSet<_> = UNUSED
            .iter()
            .map(|(group, resource, verb)| ((*group).to_owned(), (*resource).to_owned(), (*verb).to_owned()))
            .collect();
        let unused: BTreeSet<_> = given.difference(&used.used).cloned().collect();
        ensure!(
            unused == known,
            "rights that it never used: {unused:?}, known are {known:?}"
        );
    }
    installed.plane.stop()
}

/// Plays scenarios side by side; what failed.
async fn play(context: &Context<'_>, bed: &Rc<Bed>, scenarios: Vec<Scenario>) -> Vec<String> {
    let local = LocalSet::new();
    let mut running = Vec::new();
    for (name, scenario) in scenarios {
        running.push((name, local.spawn_local(scenario(bed.clone()))));
    }
    local
        .run_until(async {
            let mut failures = Vec::new();
            for (name, task) in running {
                match task.await {
                    Ok(Ok(())) => context.say(name),
                    Ok(Err(error)) => failures.push(format!("{name}: {error:#}")),
                    Err(panic) => failures.push(format!("{name}: {panic}")),
                }
            }
            failures
        })
        .await
}
