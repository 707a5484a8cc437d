//! The chart on an API server of its own: nothing else is installed there, and no controllers run.

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};

use understudy_tests::cluster::Context;
use understudy_tests::control_plane::{ControlPlane, Options, Programs};

use crate::chart_render::{self, Tools};
use crate::chart_rights;

pub fn variants_rights_and_uninstalling(context: &Context) -> Result<()> {
    let programs = Programs::build(&["helm", "kubectl"])?;
    let plane = ControlPlane::start(&context.dir.join("own"), Options::default())?;
    let kubeconfig = plane.kubeconfig();
    let tools = Tools {
        helm: programs.path("helm")?,
        kubectl: programs.path("kubectl")?,
        kubeconfig: &kubeconfig,
    };
    let scratch = tempfile::tempdir().context("cannot create a temporary folder")?;
    chart_render::lint_is_clean_and_wrong_values_are_refused_by_name(&tools);
    chart_render::the_nodes_configuration_is_read_by_the_agent(&tools, scratch.path());
    chart_render::every_variant_is_taken_by_the_api_server(&tools, scratch.path());
    chart_render::the_operators_pod_is_restricted(&tools, scratch.path());
    chart_render::install(&tools, &[]);
    let runtime = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
    runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(&kubeconfig)?;
        let admin = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        chart_rights::agents_rights_end_at_their_node(&admin).await;
        anyhow::Ok(())
    })?;
    chart_render::uninstalling_keeps_guests_and_installing_again_takes_them_up(&tools);
    plane.stop()
}
