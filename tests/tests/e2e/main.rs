//! End-to-end tests: real KVM in a node VM, stock Debian guests. They run one at a time on a node that
//! stays up between runs: `make e2e`, or `make e2e T=name` for one.
//!
//! Plain `cargo test` shows them as ignored, since they need root and a node: `UNDERSTUDY_E2E=1` is
//! what `make` sets.

mod cluster;
mod cluster_update;
mod guest;
mod handover;
mod host;
mod host_busy;
mod host_failures;
mod kubelet;
mod kubelet_bed;
mod kubelet_update;
mod node;
mod refusals;
mod rollback;
mod sessions;
mod vmm;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use understudy_tests::e2e::{Context, Run};

/// A test: its name and what it does.
type Test = (&'static str, fn(&Context) -> anyhow::Result<()>);

/// All of them, cheapest first.
const TESTS: &[Test] = &[
    ("node_vm_has_real_kvm", node::node_vm_has_real_kvm),
    ("vmm_boots_stock_debian", vmm::vmm_boots_stock_debian),
    (
        "a_guest_that_asks_is_rebooted_into_its_new_kernel_while_it_serves",
        handover::a_guest_that_asks_is_rebooted_into_its_new_kernel_while_it_serves,
    ),
    (
        "a_clone_that_panics_or_stays_silent_costs_nothing",
        handover::a_clone_that_panics_or_stays_silent_costs_nothing,
    ),
    ("what_cannot_work_says_why", refusals::what_cannot_work_says_why),
    (
        "the_agent_may_die_at_every_step",
        handover::the_agent_may_die_at_every_step,
    ),
    (
        "a_host_update_resumes_every_session",
        host::a_host_update_resumes_every_session,
    ),
    (
        "a_guest_of_a_cluster_is_rebooted_while_its_api_server_is_away",
        cluster::a_guest_of_a_cluster_is_rebooted_while_its_api_server_is_away,
    ),
    (
        "a_daemon_set_brings_the_agent_and_a_guest_is_rebooted_by_kubectl",
        kubelet::a_daemon_set_brings_the_agent_and_a_guest_is_rebooted_by_kubectl,
    ),
];

/// More reboots of the host, minutes each on an emulated one: `make e2e ARGS=--ignored` runs them, and with `T=name` one
/// of them.
const LONG: &[Test] = &[
    (
        "a_rehearsal_leaves_the_guest_alone_and_an_approved_cutover_is_rolled_back_while_it_serves",
        rollback::a_rehearsal_leaves_the_guest_alone_and_an_approved_cutover_is_rolled_back_while_it_serves,
    ),
    (
        "a_failed_save_says_why_and_every_guest_goes_on",
        host::a_failed_save_says_why_and_every_guest_goes_on,
    ),
    (
        "a_plain_reboot_typed_on_the_host_loses_no_session",
        host::a_plain_reboot_typed_on_the_host_loses_no_session,
    ),
    (
        "the_agent_may_die_at_every_phase_of_a_host_update",
        host::the_agent_may_die_at_every_phase_of_a_host_update,
    ),
    (
        "a_damaged_checkpoint_is_refused_and_kept",
        host_failures::a_damaged_checkpoint_is_refused_and_kept,
    ),
    (
        "a_session_needs_its_vmm_and_not_its_guest_agent",
        host_busy::a_session_needs_its_vmm_and_not_its_guest_agent,
    ),
    (
        "a_seamless_reboot_in_flight_is_aborted_or_waited_for_when_the_host_must_go",
        host_busy::a_seamless_reboot_in_flight_is_aborted_or_waited_for_when_the_host_must_go,
    ),
    (
        "a_guest_under_load_is_healthy_after_fifty_saves",
        sessions::a_guest_under_load_is_healthy_after_fifty_saves,
    ),
    (
        "a_power_cut_loses_only_sessions_that_were_not_saved",
        host_failures::a_power_cut_loses_only_sessions_that_were_not_saved,
    ),
    (
        "a_host_update_resumes_with_the_credential_that_the_operator_keeps",
        cluster_update::a_host_update_resumes_with_the_credential_that_the_operator_keeps,
    ),
    (
        "a_host_update_takes_one_node_of_a_cluster_after_the_other",
        kubelet_update::a_host_update_takes_one_node_of_a_cluster_after_the_other,
    ),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One node, one test at a time.
    arguments.test_threads = Some(1);
    let enabled = std::env::var_os("UNDERSTUDY_E2E").is_some_and(|value| !value.is_empty());
    if !enabled || arguments.list {
        let trials = TESTS
            .iter()
            .chain(LONG)
            .map(|(name, _)| Trial::test(*name, || Ok(())).with_ignored_flag(!enabled));
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        if !enabled && !arguments.list {
            println!(
                "end-to-end tests need a node VM: 'make e2e' runs them, 'make e2e T=name' one of them\n"
            );
        }
        return conclusion.exit_code();
    }
    let run = match Run::prepare() {
        Ok(run) => Arc::new(run),
        Err(error) => {
            eprintln!("error: cannot prepare the node VM: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let trial = |(name, test): &Test, long: bool| {
        let (run, name, test) = (run.clone(), *name, *test);
        Trial::test(name, move || run.test(name, test).map_err(Into::into)).with_ignored_flag(long)
    };
    let trials = TESTS.iter().map(|test| trial(test, false));
    let trials = trials.chain(LONG.iter().map(|test| trial(test, true)));
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
