//! Export: rounds of what the filter captured, out of the guest (DESIGN §5, steps 6 and 7).
//!
//! Rounds are cumulative: what the clone has not acknowledged is sent again, whole. What it has, is
//! remembered block by block, so that a later round sends only what differs.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex};

use understudy_channel::{Entry, Export, FrameError, Node, Refusal, RoundEnd, Transfer, write_frame};

use crate::content::{BLOCK, Sender, Sent};
use crate::filter::{Change, Changes, Collect, Filter, FilterError, Spot, open_quietly, walk};
use crate::meta::{self, Named};
use crate::rules::{Rule, rule};
use crate::service::lock;
use crate::silent::{Silent, locate};
use crate::sys::handle::Handle;
use crate::view::{self, View, is_absent, is_kind, stat_fd};

/// Most blocks that are remembered over all files: 256 GiB of content, at 24 bytes a block. Files beyond it
/// are sent whole in every round.
const MAX_BLOCKS: usize = 4 << 20;

/// Why a round could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The session failed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The capture is incomplete.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A path could not be read.
    #[error("{path} could not be read: {source}")]
    Read {
        /// Path in the guest.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Files open for writing could not be looked at.
    #[error("files that are open for writing could not be looked at: {0}")]
    Look(io::Error),
}

/// Capturing for one operation.
#[derive(Debug)]
pub struct Capture {
    /// UID of the SeamlessReboot.
    pub operation: String,
    /// The filter.
    pub filter: Arc<Filter>,
    rounds: Mutex<Rounds>,
}

#[derive(Debug, Default)]
struct Rounds {
    silent: Silent,
    last: u64,
    /// Dirty, and not in any round that counts.
    carry: Changes,
    /// Per round that is not acknowledged: what was in it.
    unacknowledged: BTreeMap<u64, Changes>,
    sent: BTreeMap<Spot, Sent>,
    blocks: usize,
}

impl Rounds {
    fn acknowledge(&mut self, applied: u64) {
        let later = self.unacknowledged.split_off(&(applied + 1));
        self.unacknowledged.clear();
        for changes in later.into_values() {
            for (spot, change) in changes {
                self.forget(&spot);
                self.carry.entry(spot).or_default().merge(change);
            }
        }
    }

    /// The clone does not have this file any more, nor what is below it.
    fn forget(&mut self, spot: &Spot) {
        if let Some(sent) = self.sent.remove(spot) {
            self.blocks -= sent.len();
        }
        let first = (spot.0, [&spot.1[..], b"/"].concat());
        let after = (spot.0, [&spot.1[..], b"0"].concat());
        let below: Vec<Spot> = if spot.1.is_empty() {
            self.sent.keys().filter(|s| s.0 == spot.0).cloned().collect()
        } else {
            self.sent.range(first..after).map(|(s, _)| s.clone()).collect()
        };
        for spot in below {
            if let Some(sent) = self.sent.remove(&spot) {
                self.blocks -= sent.len();
            }
        }
    }

    fn remember(&mut self, spot: &Spot, sent: Sent) {
        if self.blocks + sent.len() <= MAX_BLOCKS {
            self.blocks += sent.len();
            self.sent.insert(spot.clone(), sent);
        }
    }
}

impl Capture {
    /// Begins to capture; `only` as in [`Filter::begin`]. When this returns every later change is seen.
    pub fn begin(operation: &str, only: Option<Vec<View>>) -> Result<Self, ExportError> {
        let filter = Filter::begin(only, Collect::Names)?;
        let views = filter.views();
        let silent = Silent::begin(&views).map_err(ExportError::Look)?;
        // Cleans shared pages, so that a store from now on renews its file's times.
        for view in &views {
            view.sync().map_err(ExportError::Look)?;
        }
        let rounds = Rounds {
            silent,
            ..Rounds::default()
        };
        Ok(Self {
            operation: operation.to_owned(),
            filter,
            rounds: Mutex::new(rounds),
        })
    }

    /// Sends one round to its end, or what the round would be where only that was asked. What goes wrong on
    /// this side is told to the peer before it is returned.
    pub fn export(&self, request: &Export, stream: &mut impl Write) -> Result<RoundEnd, ExportError> {
        let mut out = BufWriter::with_capacity(128 * 1024, stream);
        let mut rounds = lock(&self.rounds);
        let result = self.round(&mut rounds, request, &mut out);
        if let Err(error) = &result
            && !matches!(error, ExportError::Frame(_))
        {
            let refusal = Refusal {
                reason: error.to_string(),
            };
            write_frame(&mut out, &Transfer::Failed(refusal))?;
        }
        out.flush().map_err(FrameError::from)?;
        result
    }

    fn round(
        &self,
        rounds: &mut Rounds,
        request: &Export,
        out: &mut impl Write,
    ) -> Result<RoundEnd, ExportError> {
        rounds.acknowledge(request.applied);
        let mut changes = std::mem::take(&mut rounds.carry);
        if let Err(error) = self.collect(rounds, &mut changes, request.count_only) {
            rounds.carry = changes;
            return Err(error);
        }
        let views = self.filter.views();
        if request.count_only {
            let end = estimate(&views, rounds, &changes);
            rounds.carry = changes;
            write_frame(out, &Transfer::RoundEnd(end))?;
            return Ok(end);
        }
        rounds.last = rounds.last.max(request.applied) + 1;
        let round = rounds.last;
        rounds.unacknowledged.insert(round, changes.clone());
        let plan = expand(&views, &changes)?;
        let mut writer = RoundWriter {
            views: &views,
            rounds,
            out,
            end: RoundEnd {
                round,
                ..RoundEnd::default()
            },
        };
        writer.write(plan)?;
        let mut end = writer.end;
        end.dirty = self.filter.pending();
        write_frame(out, &Transfer::RoundEnd(end))?;
        Ok(end)
    }

    /// Adds all that changed since the last round.
    ///
    /// `only_look`: the host asks behind its closed write gate, where a sync would hang until the lease ends.
    /// Nothing runs then that could still store into a shared page, so that nothing is missed.
    fn collect(
        &self,
        rounds: &mut Rounds,
        changes: &mut Changes,
        only_look: bool,
    ) -> Result<(), ExportError> {
        let views = self.filter.views();
        let (silent, doubtful) = rounds.silent.look(&views).map_err(ExportError::Look)?;
        // See `silent`: stamps first, then out with everything, then contents are read.
        if !only_look {
            for view in &views {
                view.sync().map_err(ExportError::Look)?;
            }
        }
        for spot in doubtful {
            if differs(&views[spot.0], &spot, rounds.sent.get(&spot)) {
                changes.entry(spot).or_default().merge(Change::default());
            }
        }
        let swap = swap_files(&views);
        for (spot, change) in silent.into_iter().chain(self.filter.drain()?) {
            let exempt = rule(&views[spot.0].outer(&spot.1)) == Rule::Exempt;
            if !exempt && !swap.contains(&spot) {
                changes.entry(spot).or_default().merge(change);
            }
        }
        Ok(())
    }
}

/// Whether a file's content is another one than what the clone has of it. What cannot be compared differs.
fn differs(view: &View, spot: &Spot, sent: Option<&Sent>) -> bool {
    let compare = |known: &Sent| -> Result<bool, FrameError> {
        let fd = open_quietly(view, &spot.1)?;
        let handle = crate::sys::handle::handle_of(&fd, c"")?;
        if handle != known.handle {
            return Ok(true);
        }
        let size = stat_fd(&fd)?.stx_size;
        let (now, _) = Sender::new(&mut io::sink(), Some(known)).send(&fd, size, handle)?;
        Ok(now != *known)
    };
    sent.is_none_or(|known| compare(known).unwrap_or(true))
}

/// Files that are in use as swap: their content means nothing to the clone.
fn swap_files(views: &[Arc<View>]) -> Vec<Spot> {
    let text = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let files = text
        .lines()
        .skip(1)
        .filter(|l| l.split_whitespace().nth(1) == Some("file"));
    files
        .filter_map(|l| locate(views, std::path::Path::new(l.split_whitespace().next()?)))
        .collect()
}

/// What a round would be.
fn estimate(views: &[Arc<View>], rounds: &Rounds, changes: &Changes) -> RoundEnd {
    let mut end = RoundEnd {
        round: rounds.last,
        ..RoundEnd::default()
    };
    for spot in changes.keys() {
        end.entries += 1;
        if let Ok(Some(stat)) = views[spot.0].stat(&spot.1)
            && is_kind(&stat, libc::S_IFREG)
        {
            // Of a file that the clone has, at least a block is likely to be sent.
            let known = rounds
                .sent
                .get(spot)
                .map_or(0, |s| (s.len() as u64 * BLOCK).saturating_sub(BLOCK));
            end.bytes += stat.stx_size.min(stat.stx_blocks * 512).saturating_sub(known);
        }
    }
    end.dirty = end.entries;
    end
}

/// One path of a round.
#[derive(Clone, Copy, Debug, Default)]
struct Planned {
    change: Change,
    present: bool,
}

/// Adds what a change implies: trees that moved, and directories whose names changed.
fn expand(views: &[Arc<View>], changes: &Changes) -> Result<BTreeMap<Spot, Planned>, ExportError> {
    let mut plan: BTreeMap<Spot, Planned> = BTreeMap::new();
    for (spot, change) in changes {
        let view = &views[spot.0];
        let failed = |source| ExportError::Read {
            path: lossy(view, &spot.1),
            source,
        };
        let stat = view.stat(&spot.1).map_err(failed)?;
        plan.entry(spot.clone()).or_default().change.merge(*change);
        if change.structural {
            let folder = (spot.0, view::split(&spot.1).0.to_vec());
            plan.entry(folder).or_default();
        }
        if change.tree && stat.is_some_and(|s| is_kind(&s, libc::S_IFDIR)) {
            let moved = Change {
                structural: false,
                tree: true,
            };
            walk(view, &spot.1, &mut |path, _| {
                plan.entry((spot.0, path.to_vec()))
                    .or_default()
                    .change
                    .merge(moved);
            })
            .map_err(failed)?;
        }
    }
    plan.retain(|spot, _| rule(&views[spot.0].outer(&spot.1)) != Rule::Exempt);
    for (spot, planned) in &mut plan {
        let view = &views[spot.0];
        let failed = |source| ExportError::Read {
            path: lossy(view, &spot.1),
            source,
        };
        planned.present = view.stat(&spot.1).map_err(failed)?.is_some();
    }
    Ok(plan)
}

fn lossy(view: &View, path: &[u8]) -> String {
    String::from_utf8_lossy(&view.outer(path)).into_owned()
}

struct RoundWriter<'a, W> {
    views: &'a [Arc<View>],
    rounds: &'a mut Rounds,
    out: &'a mut W,
    end: RoundEnd,
}

impl<W: Write> RoundWriter<'_, W> {
    /// Deletions first, so that what moved can be found among them; then the rest, directories before what
    /// is in them.
    fn write(&mut self, plan: BTreeMap<Spot, Planned>) -> Result<(), ExportError> {
        let mut above: Option<&Spot> = None;
        for (spot, _) in plan.iter().filter(|(_, p)| !p.present) {
            self.rounds.forget(spot);
            if above.is_some_and(|a| a.0 == spot.0 && is_below(&spot.1, &a.1)) {
                continue;
            }
            above = Some(spot);
            self.entry(spot, Node::Gone)?;
            self.frame(&Transfer::EntryEnd)?;
        }
        for (spot, planned) in plan.iter().filter(|(_, p)| p.present) {
            if planned.change.tree {
                self.rounds.forget(spot);
            }
            match self.present(spot) {
                Ok(()) => {}
                // It went away or was replaced since: then it is dirty again.
                Err(ExportError::Read { source, .. }) if is_absent(&source) || is_stale(&source) => {}
                Err(error) => return Err(error),
            }
        }
        // What was deleted within a tree that moved could not be found under its new path before the tree
        // had moved on the clone, too.
        let moved: Vec<&Spot> = plan
            .iter()
            .filter(|(_, p)| p.present && p.change.tree)
            .map(|(s, _)| s)
            .collect();
        for (spot, _) in plan.iter().filter(|(_, p)| !p.present) {
            if moved.iter().any(|m| m.0 == spot.0 && is_below(&spot.1, &m.1)) {
                self.entry(spot, Node::Gone)?;
                self.frame(&Transfer::EntryEnd)?;
            }
        }
        Ok(())
    }

    fn present(&mut self, spot: &Spot) -> Result<(), ExportError> {
        let view = Arc::clone(&self.views[spot.0]);
        let failed = |source| ExportError::Read {
            path: lossy(&view, &spot.1),
            source,
        };
        let (folder, name) = view.parent(&spot.1).map_err(failed)?;
        let named = Named {
            folder: std::os::fd::AsFd::as_fd(&folder),
            name,
        };
        let fd = view
            .open_at(&spot.1, rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW)
            .map_err(failed)?;
        let stat = stat_fd(&fd).map_err(failed)?;
        let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
        if kind == libc::S_IFREG {
            return self.file(spot, named);
        }
        let meta = meta::read(named, &stat).map_err(failed)?;
        let node = match kind {
            libc::S_IFDIR => Node::Directory { meta },
            libc::S_IFLNK => {
                let target = rustix::fs::readlinkat(&fd, c"", Vec::new()).map_err(|e| failed(e.into()))?;
                Node::Symlink {
                    meta,
                    target: target.into_bytes(),
                }
            }
            _ => Node::Special {
                meta,
                rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
            },
        };
        self.entry(spot, node)?;
        self.frame(&Transfer::EntryEnd)
    }

    fn file(&mut self, spot: &Spot, named: Named<'_>) -> Result<(), ExportError> {
        let view = Arc::clone(&self.views[spot.0]);
        let failed = |source| ExportError::Read {
            path: lossy(&view, &spot.1),
            source,
        };
        let fd = open_quietly(&view, &spot.1).map_err(failed)?;
        let stat = stat_fd(&fd).map_err(failed)?;
        let meta = meta::read(named, &stat).map_err(failed)?;
        let handle = Handle {
            kind: meta.handle.0,
            bytes: meta.handle.1.clone(),
        };
        let opened = crate::sys::handle::handle_of(&fd, c"").map_err(failed)?;
        if opened != handle || !is_kind(&stat, libc::S_IFREG) {
            return Err(failed(io::Error::from_raw_os_error(libc::ESTALE)));
        }
        let known = self.rounds.sent.get(spot).filter(|s| s.handle == handle).cloned();
        self.rounds.forget(spot);
        let size = stat.stx_size;
        self.entry(
            spot,
            Node::File {
                meta,
                size,
                whole: known.is_none(),
            },
        )?;
        let (sent, bytes) = Sender::new(self.out, known.as_ref()).send(&fd, size, handle)?;
        self.end.bytes += bytes;
        self.rounds.remember(spot, sent);
        self.frame(&Transfer::EntryEnd)
    }

    fn entry(&mut self, spot: &Spot, node: Node) -> Result<(), ExportError> {
        let view = &self.views[spot.0];
        let path = view.outer(&spot.1);
        let leads_elsewhere = locate(
            self.views,
            std::path::Path::new(std::ffi::OsStr::new(
                <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&path),
            )),
        )
        .is_none_or(|found| found.0 != spot.0);
        let filesystem = if leads_elsewhere {
            std::os::unix::ffi::OsStrExt::as_bytes(view.mount_point.as_os_str()).to_vec()
        } else {
            Vec::new()
        };
        self.end.entries += 1;
        self.frame(&Transfer::Entry(Box::new(Entry {
            path,
            filesystem,
            node,
        })))
    }

    fn frame(&mut self, transfer: &Transfer) -> Result<(), ExportError> {
        write_frame(self.out, transfer).map_err(Into::into)
    }
}

fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESTALE)
}

fn is_below(path: &[u8], folder: &[u8]) -> bool {
    folder.is_empty()
        || path
            .strip_prefix(folder)
            .is_some_and(|rest| rest.first() == Some(&b'/'))
}
