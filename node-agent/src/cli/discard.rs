//! `understudy-node discard-session`.

use std::error::Error;
use std::time::{Duration, Instant};

use clap::Args;
use understudy_api::Guest;
use uuid::Uuid;

use crate::config::Config;
use crate::sessions::{Records, Standing};
use crate::store::{Key, Object, Store, StoreError};
use crate::vmm::Instances;

const LOOK: Duration = Duration::from_millis(200);
/// How long the agent may take.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The guest, as NAMESPACE/NAME
    #[arg(value_parser = key)]
    guest: Key,
    /// Really: what was in the guest's memory is lost
    #[arg(long)]
    yes: bool,
}

/// Why nothing was discarded.
#[derive(Debug, thiserror::Error)]
enum DiscardError {
    #[error("guest {0} has no saved session")]
    None(Key),
    #[error(
        "this gives up the session of guest {guest} (checkpoint {checkpoint}, saved for NodeUpdate {update}): what was in its memory is lost, and it boots anew; say --yes if that is meant"
    )]
    NotSure {
        guest: Key,
        checkpoint: Uuid,
        update: String,
    },
    #[error(
        "the session of guest {guest} runs: there is nothing to be discarded; to end it, delete the guest or set its runStrategy to Halted"
    )]
    Runs { guest: Key },
}

fn key(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(Key::new(namespace, name)),
        _ => Err(format!("{text:?} is not NAMESPACE/NAME")),
    }
}

pub(super) fn run(config: &Config, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let guest = &arguments.guest;
    let store = Store::open(&config.state_dir)?;
    let object = store.get::<Guest>(guest)?.ok_or_else(|| StoreError::NotFound {
        plural: Guest::PLURAL,
        key: guest.clone(),
    })?;
    let records = Records::open(&config.state_dir);
    let uid = object.uid();
    let mut waiting = Vec::new();
    for record in records.of(&uid)? {
        if records.standing(&record)? == Standing::Saved {
            waiting.push(record);
        }
    }
    let record = waiting.pop().ok_or_else(|| DiscardError::None(guest.clone()))?;
    let checkpoint = record.identity.checkpoint;
    if record.vmm(&Instances::open(&config.state_dir)).is_alive() {
        return Err(DiscardError::Runs { guest: guest.clone() }.into());
    }
    if !arguments.yes {
        return Err(DiscardError::NotSure {
            guest: guest.clone(),
            checkpoint,
            update: record.node_update,
        }
        .into());
    }
    records.ask_to_discard(&uid, checkpoint)?;
    let deadline = Instant::now() + LIMIT;
    while records.get(&uid, checkpoint)?.is_some() {
        if Instant::now() >= deadline {
            println!("the session of {guest} is discarded by the agent when it runs next");
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    println!("the session of {guest} is discarded");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bed;

    fn arguments(yes: bool) -> Arguments {
        Arguments {
            guest: key("default/web").unwrap(),
            yes,
        }
    }

    #[test]
    fn a_session_is_discarded_by_name_and_when_that_is_meant_only() {
        let bed = Bed::new("#!/bin/sh\nexit 1\n");
        let (guest, instance) = bed.running_guest();
        let config = &bed.node.config;
        let error = run(config, &arguments(true)).unwrap_err().to_string();
        assert!(error.contains("has no saved session"), "{error}");
        let record = bed.saved_session(&guest, &instance);
        let checkpoint = record.identity.checkpoint;
        let error = run(config, &arguments(false)).unwrap_err().to_string();
        assert!(
            error.contains("--yes") && error.contains(&checkpoint.to_string()),
            "{error}"
        );
        let records = &bed.node.sessions.records;
        assert!(!records.is_to_be_discarded(&guest.uid(), checkpoint));
        // The agent does what is asked.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                bed.wait("the session to be discarded", |bed| {
                    let unused = crate::sessions::unused(&bed.node, &guest.uid(), |_| false);
                    unused.unwrap().is_none().then_some(())
                });
            });
            run(config, &arguments(true)).unwrap();
        });
        assert!(records.of(&guest.uid()).unwrap().is_empty());
        assert!(key("web").is_err());
    }
}
