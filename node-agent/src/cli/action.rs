//! `understudy-node approve`, `abort` and `rollback`: they write `spec.action` of a SeamlessReboot.

use std::error::Error;

use clap::Args;
use understudy_api::Phase;
use understudy_api::SeamlessReboot;
use understudy_api::reboot::{Action, ActionType, Changes};

use super::wait::{Wait, Waited};
use crate::config::{Config, Mode};
use crate::store::{Key, Mirrored, Object, Store, StoreError};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Name of the SeamlessReboot
    name: String,
    /// Its namespace
    #[arg(long, short, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
pub(super) struct RollbackArguments {
    #[command(flatten)]
    arguments: Arguments,
    /// Really: what the guest has changed since the cutover is lost
    #[arg(long)]
    discard_changes: bool,
}

/// Why an action was not asked for, or not done.
#[derive(Debug, thiserror::Error)]
enum ActionError {
    #[error(
        "this discards what guest {guest} has changed since SeamlessReboot {reboot} cut over; say --discard-changes if that is meant"
    )]
    NotSure { guest: String, reboot: String },
    #[error(
        "SeamlessReboot {key} is its cluster's: ask there, by `kubectl patch seamlessreboot {name} -n {namespace} --type merge -p '{patch}'`",
        key = key.to_string(), name = key.name, namespace = key.namespace
    )]
    OfCluster { key: Key, patch: String },
    #[error("{action} was refused: {why}")]
    Refused { action: &'static str, why: String },
    #[error("SeamlessReboot {reboot} is {phase}: {message}")]
    Ended {
        reboot: String,
        phase: Phase,
        message: String,
    },
    #[error(
        "{action} of SeamlessReboot {reboot} is asked for, and not done after {seconds} s; is the agent running? `understudy-node status` tells"
    )]
    NotYet {
        action: &'static str,
        reboot: String,
        seconds: u64,
    },
}

pub(super) fn approve(config: &Config, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    ask(config, arguments, ActionType::Proceed, "approved")
}

pub(super) fn abort(config: &Config, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    ask(config, arguments, ActionType::Abort, "aborted")
}

pub(super) fn rollback(config: &Config, asked: &RollbackArguments) -> Result<(), Box<dyn Error>> {
    let arguments = &asked.arguments;
    if !asked.discard_changes {
        let key = Key::new(arguments.namespace.clone(), arguments.name.clone());
        let reboot = get(&Store::open(&config.state_dir)?, &key)?;
        return Err(Box::new(ActionError::NotSure {
            guest: reboot.spec.guest_name,
            reboot: key.to_string(),
        }));
    }
    ask(config, arguments, ActionType::Rollback, "rolled back")
}

fn get(store: &Store, key: &Key) -> Result<SeamlessReboot, StoreError> {
    store.get(key)?.ok_or_else(|| StoreError::NotFound {
        plural: SeamlessReboot::PLURAL,
        key: key.clone(),
    })
}

fn ask(config: &Config, arguments: &Arguments, kind: ActionType, done: &str) -> Result<(), Box<dyn Error>> {
    let store = Store::open(&config.state_dir)?;
    let key = Key::new(arguments.namespace.clone(), arguments.name.clone());
    get(&store, &key)?;
    let action = Action {
        kind,
        changes: (kind == ActionType::Rollback).then_some(Changes::Discard),
    };
    if config.mode == Mode::Cluster {
        let patch = serde_json::json!({"spec": {"action": action}}).to_string();
        return Err(Box::new(ActionError::OfCluster { key, patch }));
    }
    store.mirror::<SeamlessReboot>(&key, |there| write(there, &action))?;
    let said = match arguments.wait.until(|| is_done(&store, &key, kind))? {
        Waited::Not => "asked for",
        Waited::Done => done,
        Waited::InVain(seconds) => {
            return Err(Box::new(ActionError::NotYet {
                action: kind.as_str(),
                reboot: key.to_string(),
                seconds,
            }));
        }
    };
    println!("seamlessreboot.understudy.dev \"{}\" {said}", key.name);
    Ok(())
}

fn write(there: Option<&SeamlessReboot>, action: &Action) -> Mirrored<SeamlessReboot> {
    match there {
        Some(there) if there.spec.action.as_ref() != Some(action) => {
            let mut changed = there.clone();
            changed.spec.action = Some(action.clone());
            changed.metadata.generation = Some(there.generation() + 1);
            Mirrored::Object(Box::new(changed))
        }
        _ => Mirrored::Unchanged,
    }
}

/// Whether it is taken in and, where it ends the reboot, done.
fn is_done(store: &Store, key: &Key, kind: ActionType) -> Result<bool, Box<dyn Error>> {
    let wanted = match kind {
        ActionType::Proceed => None,
        ActionType::Abort => Some(Phase::Aborted),
        ActionType::Rollback => Some(Phase::RolledBack),
    };
    let status = get(store, key)?.status.unwrap_or_default();
    let phase = status.phase.unwrap_or_default();
    let Some(taken) = status.action.filter(|action| action.kind == kind) else {
        return Ok(false);
    };
    if let Some(why) = taken.refused {
        let action = kind.as_str();
        return Err(Box::new(ActionError::Refused { action, why }));
    }
    // A rollback that is asked for early aborts.
    if wanted.is_none_or(|wanted| phase == wanted || phase == Phase::Aborted) {
        return Ok(true);
    }
    if phase.is_terminal() && phase != Phase::Succeeded {
        return Err(Box::new(ActionError::Ended {
            reboot: key.to_string(),
            phase,
            message: status.message.unwrap_or_default(),
        }));
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::operations;
    use crate::testing::Bed;

    fn arguments() -> Arguments {
        Arguments {
            name: "kernel".to_owned(),
            namespace: "default".to_owned(),
            wait: Wait::at_most(Duration::from_secs(60)),
        }
    }

    fn rollback_arguments(discard_changes: bool) -> RollbackArguments {
        RollbackArguments {
            arguments: arguments(),
            discard_changes,
        }
    }

    /// Runs a command beside an agent.
    fn beside(
        bed: &Bed,
        command: impl FnOnce(&Config) -> Result<(), Box<dyn Error>> + Send,
    ) -> Option<String> {
        let config = bed.node.config.clone();
        std::thread::scope(|scope| {
            let command = scope.spawn(move || command(&config).err().map(|error| error.to_string()));
            bed.wait("the command to end", |bed| {
                operations::pass(&bed.node);
                command.is_finished().then_some(())
            });
            command.join().unwrap()
        })
    }

    #[test]
    fn a_reboot_is_approved_and_aborted_by_name_and_rolled_back_only_when_that_is_meant() {
        let bed = Bed::new("#!/bin/sh\nexit 1\n");
        bed.disk("web.img");
        bed.apply(&Bed::guest_manifest("web", "web.img"));
        // The guest does not run, so it waits in its preflight.
        bed.apply(&Bed::reboot_manifest("kernel", "web"));
        let action = |bed: &Bed| {
            let reboot = get(&bed.store, &Key::new("default", "kernel")).unwrap();
            reboot.status.unwrap_or_default().action
        };
        assert_eq!(beside(&bed, |config| approve(config, &arguments())), None);
        assert_eq!(action(&bed).unwrap().kind, ActionType::Proceed);

        let error = rollback(&bed.node.config, &rollback_arguments(false))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--discard-changes") && error.contains("web"),
            "{error}"
        );
        assert_eq!(action(&bed).unwrap().kind, ActionType::Proceed);

        assert_eq!(beside(&bed, |config| abort(config, &arguments())), None);
        let late = beside(&bed, |config| rollback(config, &rollback_arguments(true))).unwrap();
        assert!(late.contains("refused") && late.contains("Aborted"), "{late}");

        let mut on_cluster = bed.node.config.clone();
        on_cluster.mode = Mode::Cluster;
        let error = approve(&on_cluster, &arguments()).unwrap_err().to_string();
        assert!(
            error.contains("kubectl patch seamlessreboot kernel -n default")
                && error.contains(r#"{"spec":{"action":{"type":"Proceed"}}}"#),
            "{error}"
        );
        let unknown = Arguments {
            name: "other".to_owned(),
            ..arguments()
        };
        let error = abort(&bed.node.config, &unknown).unwrap_err().to_string();
        assert!(error.contains("other"), "{error}");
    }
}
