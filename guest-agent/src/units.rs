//! Which unit a file belongs to, on the clone: a program must not see half of its state replaced beneath it,
//! so its unit is stopped before the first of its files is touched, and started at activation.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Statx;

use crate::filter::{Spot, open_quietly};
use crate::rules::never_stop;
use crate::silent::{Writer, writers};
use crate::sys::lease;
use crate::systemd::{Systemd, Verb};
use crate::view::{View, is_kind};

/// How long a unit may take to stop.
const STOP: Duration = Duration::from_secs(30);

type Inode = ((u32, u32), u64);

/// Directories of units' own: absolute path to unit.
pub type Trees = Vec<(Vec<u8>, String)>;

/// Owners of files.
#[derive(Debug, Default)]
pub struct Owners {
    trees: Trees,
    views: Vec<Arc<View>>,
    /// Files that processes of a unit have open for writing: looked at when the first file that is written by
    /// somebody is asked about.
    open: Option<HashMap<Inode, String>>,
}

impl Owners {
    /// Owners of files on these file systems, for one round. `trees` are asked for once: it takes a call to
    /// systemd for every unit.
    pub fn new(views: Vec<Arc<View>>, trees: &Trees) -> Self {
        Self {
            trees: trees.clone(),
            views,
            open: None,
        }
    }

    /// The unit of a process that has the file open for writing. Most files have none, which the kernel says
    /// at once; to look through all processes takes long while clients wait.
    fn writer(&mut self, spot: &Spot, stat: &Statx) -> Option<String> {
        let view = &self.views[spot.0];
        if !is_kind(stat, libc::S_IFREG) {
            return None;
        }
        if let Ok(fd) = open_quietly(view, &spot.1)
            && let Ok(false) = lease::is_written(&fd)
        {
            return None;
        }
        let inode = (view.dev, stat.stx_ino);
        let views = &self.views;
        self.open
            .get_or_insert_with(|| holders(views))
            .get(&inode)
            .cloned()
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

    /// Stops the running unit that owns `path`, if there is one; returns its name. `there` is what the clone has
    /// at that path.
    pub fn stop_owner(
        &mut self,
        path: &[u8],
        there: Option<(&Spot, &Statx)>,
    ) -> Result<Option<String>, String> {
        let within = |tree: &[u8]| {
            path.strip_prefix(tree)
                .is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'/'))
        };
        let by_tree = self
            .trees
            .iter()
            .find(|(tree, _)| within(tree))
            .map(|(_, unit)| unit.clone());
        let owner = by_tree.or_else(|| there.and_then(|(spot, stat)| self.writer(spot, stat)));
        let Some(unit) = owner else {
            return Ok(None);
        };
        self.trees.retain(|(_, other)| *other != unit);
        if let Some(open) = self.open.as_mut() {
            open.retain(|_, other| *other != unit);
        }
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

/// Which files are open for writing by which unit, as of now.
fn holders(views: &[Arc<View>]) -> HashMap<Inode, String> {
    let held = |writer: Writer| {
        let unit = unit_of(writer.pid).filter(|u| !never_stop(u))?;
        Some(((views[writer.spot.0].dev, writer.ino), unit))
    };
    writers(views).into_iter().filter_map(held).collect()
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
