//! Tests on a real API server: `make cluster`, or `make cluster T=name` for one. They share a control plane, each has
//! a namespace of its own.
//!
//! Plain `cargo test` shows them as ignored, since they need the programs of a cluster: `UNDERSTUDY_E2E=1` is what
//! `make` sets.

mod chart;
mod chart_access;
mod chart_render;
mod chart_rights;
mod control_plane;
mod crds;
mod link;
mod link_bed;
mod link_server;
mod operator;
mod operator_assign;
mod operator_bed;
mod operator_credential;
mod operator_lead;
mod operator_prometheus;
mod operator_rollout;
mod rules;
mod samples;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use understudy_tests::cluster::{Context, Run};

/// A test: its name and what it does.
type Test = (&'static str, fn(&Context) -> anyhow::Result<()>);

const TESTS: &[Test] = &[
    ("our_crds_are_established", crds::our_crds_are_established),
    ("the_examples_apply", crds::the_examples_apply),
    (
        "every_column_shows_what_the_status_says",
        crds::every_column_shows_what_the_status_says,
    ),
    (
        "objects_are_found_by_their_node",
        crds::objects_are_found_by_their_node,
    ),
    (
        "wait_returns_when_the_reboot_is_complete",
        crds::wait_returns_when_the_reboot_is_complete,
    ),
    (
        "explain_describes_every_field",
        crds::explain_describes_every_field,
    ),
    (
        "every_rule_refuses_in_its_own_words",
        rules::every_rule_refuses_in_its_own_words,
    ),
    (
        "every_rule_about_changes_refuses_in_its_own_words",
        rules::every_rule_about_changes_refuses_in_its_own_words,
    ),
    ("too_long_texts_are_refused", rules::too_long_texts_are_refused),
    (
        "a_token_names_the_node_of_its_pod",
        control_plane::a_token_names_the_node_of_its_pod,
    ),
    (
        "the_chart_variants_rights_and_uninstalling",
        chart::variants_rights_and_uninstalling,
    ),
    (
        "an_api_server_that_was_away_has_lost_nothing",
        control_plane::an_api_server_that_was_away_has_lost_nothing,
    ),
    (
        "link_what_is_assigned_comes_in_and_what_happens_goes_out",
        link::link_what_is_assigned_comes_in_and_what_happens_goes_out,
    ),
    (
        "link_a_phase_is_written_once_and_progress_seldom",
        link::link_a_phase_is_written_once_and_progress_seldom,
    ),
    (
        "link_what_happens_while_the_api_server_is_away_is_told_when_it_is_back",
        link::link_what_happens_while_the_api_server_is_away_is_told_when_it_is_back,
    ),
    (
        "link_a_token_that_is_refused_is_an_api_server_that_is_away",
        link::link_a_token_that_is_refused_is_an_api_server_that_is_away,
    ),
    (
        "link_somebody_elses_field_is_not_forced",
        link::link_somebody_elses_field_is_not_forced,
    ),
    (
        "link_a_deleted_guest_is_released_even_by_an_agent_that_died_in_between",
        link::link_a_deleted_guest_is_released_even_by_an_agent_that_died_in_between,
    ),
    (
        "link_absence_destroys_nothing_and_another_guest_of_the_name_waits",
        link::link_absence_destroys_nothing_and_another_guest_of_the_name_waits,
    ),
    (
        "link_a_reboot_of_the_host_is_reported_by_its_name",
        link::link_a_reboot_of_the_host_is_reported_by_its_name,
    ),
    (
        "link_what_was_over_before_the_state_was_lost_never_runs_again",
        link::link_what_was_over_before_the_state_was_lost_never_runs_again,
    ),
    (
        "operator_does_its_work_with_the_charts_rights_and_uses_each",
        operator::operator_does_its_work_with_the_charts_rights_and_uses_each,
    ),
    (
        "operator_writes_nothing_in_a_steady_state_and_another_takes_over",
        operator_lead::operator_writes_nothing_in_a_steady_state_and_another_takes_over,
    ),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Most of a test is waiting for kubectl; more of them at once wait for each other.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let enabled = std::env::var_os("UNDERSTUDY_E2E").is_some_and(|value| !value.is_empty());
    if !enabled || arguments.list {
        let trials = TESTS
            .iter()
            .map(|(name, _)| Trial::test(*name, || Ok(())).with_ignored_flag(!enabled));
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        if !enabled && !arguments.list {
            println!(
                "tests on a cluster need its programs: 'make cluster' runs them, 'make cluster T=name' one\n"
            );
        }
        return conclusion.exit_code();
    }
    let run = match Run::prepare() {
        Ok(run) => Arc::new(run),
        Err(error) => {
            eprintln!("error: cannot prepare the control plane: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let trials = TESTS.iter().map(|(name, test)| {
        let (run, name, test) = (run.clone(), *name, *test);
        Trial::test(name, move || run.test(name, test).map_err(Into::into))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // Not left to a drop: the process exits below.
    match Arc::try_unwrap(run).map(Run::finish) {
        Ok(Ok(())) => conclusion.exit_code(),
        Ok(Err(error)) => {
            eprintln!("error: the control plane did not end in order: {error:#}");
            ExitCode::FAILURE
        }
        Err(run) => {
            drop(run);
            conclusion.exit_code()
        }
    }
}
