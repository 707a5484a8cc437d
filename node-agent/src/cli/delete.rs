//! `understudy-node delete`.

use std::error::Error;

use clap::Args;
use understudy_api::{Guest, HostUpdate, NodeUpdate, SeamlessReboot};

use super::wait::{Wait, Waited};
use super::{Kind, kind};
use crate::cluster::{named, orphans};
use crate::config::{Config, Mode};
use crate::store::{Key, Object, Store, StoreError};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// guest, seamlessreboot, hostupdate or nodeupdate
    #[arg(value_parser = kind)]
    kind: Kind,
    /// Its name
    name: String,
    /// Its namespace
    #[arg(long, short, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    wait: Wait,
}

/// The Host would be there again in a moment.
#[derive(Debug, thiserror::Error)]
#[error("the Host is what the agent tells of this node: it cannot be deleted")]
struct OwnHost;

/// The API server has it.
#[derive(Debug, thiserror::Error)]
#[error(
    "{kind} {key:?} is assigned to this node by its cluster: delete it there (`kubectl delete {kind} {name}{namespace}`); here only what the cluster does not know any more can be deleted",
    key = key.to_string(), name = key.name,
    namespace = match key.namespace.as_str() { "" => String::new(), namespace => format!(" -n {namespace}") }
)]
struct OfCluster {
    kind: &'static str,
    key: Key,
}

/// It is still there.
#[derive(Debug, thiserror::Error)]
#[error(
    "{kind} {key:?} is marked for deletion and still there after {seconds} s; is the agent running? `understudy-node status` tells",
    key = key.to_string()
)]
struct StillThere {
    kind: &'static str,
    key: Key,
    seconds: u64,
}

pub(super) fn run(config: &Config, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let store = Store::open(&config.state_dir)?;
    let key = Key::new(arguments.namespace.clone(), arguments.name.clone());
    let of_cluster = Key::new("", arguments.name.clone());
    match arguments.kind {
        Kind::Guest => delete::<Guest>(config, &store, &key, arguments)?,
        Kind::Reboot => delete::<SeamlessReboot>(config, &store, &key, arguments)?,
        Kind::HostUpdate => delete::<HostUpdate>(config, &store, &of_cluster, arguments)?,
        Kind::NodeUpdate => delete::<NodeUpdate>(config, &store, &of_cluster, arguments)?,
        Kind::Host => return Err(Box::new(OwnHost)),
    }
    let kind = arguments.kind.singular();
    println!("{kind}.understudy.dev \"{}\" deleted", arguments.name);
    Ok(())
}

fn delete<O: Object>(
    config: &Config,
    store: &Store,
    key: &Key,
    arguments: &Arguments,
) -> Result<(), Box<dyn Error>> {
    let uid = store
        .get::<O>(key)?
        .ok_or_else(|| StoreError::NotFound {
            plural: O::PLURAL,
            key: key.clone(),
        })?
        .uid();
    if config.mode == Mode::Cluster && !orphans(&config.state_dir)?.contains(&named(O::KIND, key)) {
        return Err(Box::new(OfCluster {
            kind: arguments.kind.singular(),
            key: key.clone(),
        }));
    }
    store.delete::<O>(key)?;
    let is_gone = || -> Result<bool, StoreError> {
        let there = store.get::<O>(key)?;
        Ok(there.is_none_or(|object| object.uid() != uid))
    };
    match arguments.wait.until(is_gone)? {
        Waited::Not | Waited::Done => Ok(()),
        Waited::InVain(seconds) => Err(Box::new(StillThere {
            kind: arguments.kind.singular(),
            key: key.clone(),
            seconds,
        })),
    }
}
