//! Which unit a file belongs to, on the clone: a program must not see half of its state replaced beneath it,
//! so its unit is stopped before the first of its files is touched, and started at activation.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::rules::never_stop;
use crate::silent::writers;
use crate::systemd::{Systemd, Verb};
use crate::view::View;

/// How long a unit may take to stop.
const STOP: Duration = Duration::from_secs(30);

type Inode = ((u32, u32), u64);

/// Directories of units' own: absolute path to unit.
pub type Trees = Vec<(Vec<u8>, String)>;

/// Owners of files.
#[derive(Debug, Default)]
pub struct Owners {
    trees: Trees,
    /// Files that processes of a unit have open for writing.
    open: HashMap<Inode, String>,
}

impl Owners {
    /// Finds out which files are open for writing by which unit, as of now. `trees` are asked for once: it
    /// takes a call to systemd for every unit.
    pub fn look(views: &[Arc<View>], trees: &Trees) -> Self {
        let mut owners = Self {
            trees: trees.clone(),
            open: HashMap::new(),
        };
        for writer in writers(views) {
            if let Some(unit) = unit_of(writer.pid).filter(|u| !never_stop(u)) {
                owners.open.insert((views[writer.spot.0].dev, writer.ino), unit);
            }
        }
        owners
    }

    /// State and cache directories of the running units.
    pub fn trees() -> Result<Trees, crate::bus::BusError> {
        let mut trees = Trees::new();
        let mut systemd = Systemd::connect()?;
        for unit in systemd.units(&["active", "activating", "reloading"])? {
            if never_stop(&unit.name) {
                continue;
            }
            for (property, base) in [("StateDirectory", "/var/lib"), ("CacheDirectory", "/var/cache")] {
                for name in systemd.service_property(&unit.path, property)?.items() {
                    let Some(name) = name.as_str().filter(|n| !n.is_empty()) else {
                        continue;
                    };
                    trees.push((format!("{base}/{name}").into_bytes(), unit.name.clone()));
                    trees.push((format!("{base}/private/{name}").into_bytes(), unit.name.clone()));
                }
            }
        }
        Ok(trees)
    }

    /// Stops the running unit that owns `path` (whose inode is `inode`), if there is one; returns its name.
    pub fn stop_owner(&mut self, path: &[u8], inode: Option<Inode>) -> Result<Option<String>, String> {
        let within = |tree: &[u8]| {
            path.strip_prefix(tree)
                .is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'/'))
        };
        let by_tree = self
            .trees
            .iter()
            .find(|(tree, _)| within(tree))
            .map(|(_, unit)| unit);
        let by_file = inode.and_then(|i| self.open.get(&i));
        let Some(unit) = by_tree.or(by_file).cloned() else {
            return Ok(None);
        };
        self.trees.retain(|(_, other)| *other != unit);
        self.open.retain(|_, other| *other != unit);
        let stopped =
            Systemd::connect().and_then(|mut s| s.run_jobs(Verb::Stop, std::slice::from_ref(&unit), STOP));
        match stopped {
            Ok(results) if results.iter().all(|r| r.result == "done") => Ok(Some(unit)),
            Ok(results) => Err(format!(
                "{unit} on the clone could not be stopped before its files are replaced: {}",
                results.first().map_or("no result", |r| r.result.as_str())
            )),
            Err(error) => Err(format!(
                "{unit} on the clone could not be stopped before its files are replaced: {error}"
            )),
        }
    }
}

/// The service to whose control group a process belongs.
pub fn unit_of(pid: i32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    // Of the unified hierarchy, or systemd's own in the old one.
    let path = text
        .lines()
        .find_map(|l| l.strip_prefix("0::"))
        .filter(|p| *p != "/")
        .or_else(|| {
            text.lines()
                .find_map(|l| l.split_once(":name=systemd:").map(|(_, p)| p))
        })?;
    path.split('/')
        .rfind(|c| c.ends_with(".service"))
        .map(str::to_owned)
}
