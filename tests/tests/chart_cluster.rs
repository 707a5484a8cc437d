//! The chart on a real API server that is there already: fresh, without controllers and without the chart.
//! `UNDERSTUDY_TEST_KUBECONFIG`, `UNDERSTUDY_TEST_HELM` and `UNDERSTUDY_TEST_KUBECTL` name the administrator's
//! credentials and the programs.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "cluster/chart_access.rs"]
mod chart_access;
#[path = "cluster/chart_audit.rs"]
mod chart_audit;
#[path = "cluster/chart_render.rs"]
mod chart_render;
#[path = "cluster/chart_rights.rs"]
mod chart_rights;

use std::path::PathBuf;

#[test]
#[ignore = "needs a fresh API server"]
fn the_chart_on_an_api_server() {
    let path = |name: &str| {
        let name = format!("UNDERSTUDY_TEST_{name}");
        PathBuf::from(std::env::var(&name).unwrap_or_else(|_| panic!("{name} is not set")))
    };
    let (helm, kubectl, kubeconfig) = (path("HELM"), path("KUBECTL"), path("KUBECONFIG"));
    let tools = chart_render::Tools {
        helm: &helm,
        kubectl: &kubectl,
        kubeconfig: &kubeconfig,
    };
    let scratch = tempfile::tempdir().unwrap();
    chart_render::lint_is_clean_and_wrong_values_are_refused_by_name(&tools);
    chart_render::the_nodes_configuration_is_read_by_the_agent(&tools, scratch.path());
    chart_render::every_variant_is_taken_by_the_api_server(&tools, scratch.path());
    chart_render::the_operators_pod_is_restricted(&tools, scratch.path());
    chart_render::install(&tools, &[]);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let kubeconfig = kube::config::Kubeconfig::read_from(&kubeconfig).unwrap();
        let admin = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
            .await
            .unwrap();
        chart_rights::agents_rights_end_at_their_node(&admin).await;
    });
    chart_render::uninstalling_keeps_guests_and_installing_again_takes_them_up(&tools);
}
