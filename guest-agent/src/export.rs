//! Export: rounds of what the filter captured, out of the guest (DESIGN §5, steps 6 and 7).
//!
//! Rounds are cumulative: what the clone has not acknowledged is sent again, whole. What it has, is
//! remembered block by block, so that a later round sends only what differs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;
use understudy_channel::{Entry, Export, FrameError, Node, Refusal, RoundEnd, Transfer, write_frame};

use crate::content::{BLOCK, Sender, Sent};
use crate::filter::{Collect, Filter, FilterError, Spot, open_quietly};
use crate::info;
use crate::log::Laps;
use crate::marks::Marks;
use crate::plan::{Item, Plan, Trees, plan};
use crate::read::{Found, Inode, What, read};
use crate::service::lock;
use crate::silent::{Changes, Silent, locate};
use crate::sys::handle::{Handle, handle_of};
use crate::view::{View, is_absent, is_kind, stat_fd};

/// Most blocks that are remembered over all files: 64 GiB of content, at 24 bytes a block. Files beyond it
/// are sent whole in every round.
const MAX_BLOCKS: usize = 4 << 20;

/// So few remembered files are not worth looking for those that are gone.
const SWEEP: usize = 10_000;

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
    /// What changed could not be looked up.
    #[error("what changed in the guest could not be looked up: {0}")]
    Plan(io::Error),
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
    interlude: Mutex<Option<Interlude>>,
}

/// Points within a round at which tests let the guest go on, as it may at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It was looked up what changed; nothing was read yet.
    Planned,
    /// A path was read, and not yet looked at again.
    Read,
}

/// Called at each [`Moment`], with the path that was read.
pub type OnMoment = dyn FnMut(Moment, &[u8]) + Send;

struct Interlude(Box<OnMoment>);

impl std::fmt::Debug for Interlude {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interlude")
    }
}

#[derive(Debug, Default)]
struct Rounds {
    silent: Silent,
    last: u64,
    /// Dirty, and not in any round that counts.
    carry: Marks,
    /// Rounds that are not acknowledged.
    unacknowledged: BTreeMap<u64, Unacknowledged>,
    /// By inode: through whichever of its names a file is sent, the clone has one content of it.
    sent: HashMap<(usize, Handle), Sent>,
    blocks: usize,
    /// How many files were remembered when those that are gone were forgotten last.
    swept: usize,
}

/// A round that the clone may not have.
#[derive(Debug, Default)]
struct Unacknowledged {
    /// What it was about.
    marks: Marks,
    /// Files that were sent.
    files: Vec<(usize, Handle)>,
}

impl Rounds {
    fn acknowledge(&mut self, applied: u64) {
        let later = self.unacknowledged.split_off(&(applied + 1));
        self.unacknowledged.clear();
        for round in later.into_values() {
            for file in &round.files {
                self.forget(file);
            }
            self.carry.merge(round.marks);
        }
    }

    /// What the clone has of this file is not known any more.
    fn forget(&mut self, file: &(usize, Handle)) {
        if let Some(sent) = self.sent.remove(file) {
            self.blocks -= sent.len();
        }
    }

    fn remember(&mut self, fs: usize, sent: Sent) {
        let file = (fs, sent.handle.clone());
        if let Some(round) = self.unacknowledged.get_mut(&self.last) {
            round.files.push(file.clone());
        }
        if self.blocks + sent.len() <= MAX_BLOCKS {
            self.blocks += sent.len();
            self.sent.insert(file, sent);
        }
    }

    /// Forgets files that are gone, each time that twice as many are remembered as were left the last time.
    fn sweep(&mut self, views: &[Arc<View>]) {
        if self.sent.len() < SWEEP.max(2 * self.swept) {
            return;
        }
        self.sent
            .retain(|(fs, handle), _| !matches!(views[*fs].open_handle(handle), Ok(None)));
        self.blocks = self.sent.values().map(Sent::len).sum();
        self.swept = self.sent.len();
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
            interlude: Mutex::new(None),
        })
    }

    /// Lets `act` happen at each [`Moment`] of the rounds to come: for tests of what races with them.
    pub fn at_moments(&self, act: impl FnMut(Moment, &[u8]) + Send + 'static) {
        *lock(&self.interlude) = Some(Interlude(Box::new(act)));
    }

    fn moment(&self, moment: Moment, path: &[u8]) {
        if let Some(interlude) = lock(&self.interlude).as_mut() {
            (interlude.0)(moment, path);
        }
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
        let mut laps = Laps::begin();
        rounds.acknowledge(request.applied);
        rounds.sweep(&self.filter.views());
        let mut marks = std::mem::take(&mut rounds.carry);
        if let Err(error) = self.collect(rounds, &mut marks, request.count_only, &mut laps) {
            rounds.carry = marks;
            return Err(error);
        }
        let views = self.filter.views();
        let swap = swap_files(&views);
        if request.count_only {
            let planned = plan(&views, &marks, Trees::Leave, &swap);
            rounds.carry = marks;
            let end = estimate(&views, rounds, &planned.map_err(ExportError::Plan)?);
            laps.lap("estimated");
            info!("{} entries counted ({laps})", end.entries);
            write_frame(out, &Transfer::RoundEnd(end))?;
            return Ok(end);
        }
        rounds.last = rounds.last.max(request.applied) + 1;
        let round = rounds.last;
        let planned = plan(&views, &marks, Trees::Expand, &swap);
        let unacknowledged = Unacknowledged {
            marks,
            files: Vec::new(),
        };
        rounds.unacknowledged.insert(round, unacknowledged);
        let Plan { items, raced } = planned.map_err(ExportError::Plan)?;
        laps.lap("planned");
        self.moment(Moment::Planned, b"");
        let mut writer = RoundWriter {
            capture: self,
            views: &views,
            rounds,
            out,
            introduced: HashSet::new(),
            sent: HashSet::new(),
            left_out: raced,
            end: RoundEnd {
                round,
                last: request.last,
                ..RoundEnd::default()
            },
        };
        writer.write(&items)?;
        let (mut end, left_out) = (writer.end, writer.left_out);
        end.dirty = self.filter.pending() + left_out.len() as u64;
        rounds.carry.merge(left_out);
        write_frame(out, &Transfer::RoundEnd(end))?;
        laps.lap("sent");
        info!(
            "round {round}: {} entries, {} bytes ({laps})",
            end.entries, end.bytes
        );
        Ok(end)
    }

    /// Adds all that changed since the last round.
    ///
    /// `only_look`: the host asks behind its closed write gate, where a sync would hang until the lease ends.
    /// Nothing runs then that could still store into a shared page, so that nothing is missed.
    fn collect(
        &self,
        rounds: &mut Rounds,
        marks: &mut Marks,
        only_look: bool,
        laps: &mut Laps,
    ) -> Result<(), ExportError> {
        let views = self.filter.views();
        let looked = match only_look {
            true => rounds.silent.look_again(&views),
            false => rounds.silent.look(&views),
        };
        let (silent, doubtful) = looked.map_err(ExportError::Look)?;
        laps.lap("looked");
        mark_spots(&views, silent, marks).map_err(ExportError::Look)?;
        // See `silent`: stamps first, then out with everything, then contents are read.
        if !only_look {
            for view in &views {
                view.sync().map_err(ExportError::Look)?;
            }
            laps.lap("synced");
        }
        let differing = doubtful
            .into_iter()
            .filter(|spot| differs(&views[spot.0], spot, &rounds.sent))
            .map(|spot| (spot, Default::default()))
            .collect();
        mark_spots(&views, differing, marks).map_err(ExportError::Look)?;
        marks.merge(self.filter.drain()?);
        laps.lap("drained");
        Ok(())
    }
}

/// Adds what was found by its path. Where the directory is gone by now, that has told of itself.
fn mark_spots(views: &[Arc<View>], changes: Changes, marks: &mut Marks) -> io::Result<()> {
    for ((fs, path), change) in changes {
        match views[fs].parent(&path) {
            Ok((folder, name)) => {
                marks.mark(fs, handle_of(&folder, c"")?, name.to_vec(), change);
            }
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a file's content is another one than what the clone has of it. What cannot be compared differs.
fn differs(view: &View, spot: &Spot, sent: &HashMap<(usize, Handle), Sent>) -> bool {
    let compare = || -> Result<bool, FrameError> {
        let fd = open_quietly(view, &spot.1)?;
        let handle = handle_of(&fd, c"")?;
        let Some(known) = sent.get(&(spot.0, handle.clone())) else {
            return Ok(true);
        };
        let size = stat_fd(&fd)?.stx_size;
        let (now, _) = Sender::new(&mut io::sink(), Some(known)).send(&fd, size, handle)?;
        Ok(now.as_ref() != Some(known))
    };
    compare().unwrap_or(true)
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
fn estimate(views: &[Arc<View>], rounds: &Rounds, plan: &Plan) -> RoundEnd {
    let mut end = RoundEnd {
        round: rounds.last,
        entries: (plan.items.len() + plan.raced.len()) as u64,
        ..RoundEnd::default()
    };
    for Item { spot, .. } in &plan.items {
        let fd = views[spot.0].open_at(&spot.1, OFlags::PATH | OFlags::NOFOLLOW);
        if let Ok(fd) = fd
            && let (Ok(stat), Ok(handle)) = (stat_fd(&fd), handle_of(&fd, c""))
            && is_kind(&stat, libc::S_IFREG)
        {
            // Of a file that the clone has, at least a block is likely to be sent.
            let known = rounds
                .sent
                .get(&(spot.0, handle))
                .map_or(0, |s| (s.len() as u64 * BLOCK).saturating_sub(BLOCK));
            end.bytes += stat.stx_size.min(stat.stx_blocks * 512).saturating_sub(known);
        }
    }
    end.dirty = end.entries;
    end
}

struct RoundWriter<'a, W> {
    capture: &'a Capture,
    views: &'a [Arc<View>],
    rounds: &'a mut Rounds,
    out: &'a mut W,
    /// Directories that this round has told of.
    introduced: HashSet<(usize, Handle)>,
    /// Files that it has sent.
    sent: HashSet<(usize, Handle)>,
    /// What could not be told now, to be told in the next round.
    left_out: Marks,
    end: RoundEnd,
}

impl<W: Write> RoundWriter<'_, W> {
    /// Deletions first, so that what moved can be found among them; then the rest, directories before what
    /// is in them.
    fn write(&mut self, items: &[Item]) -> Result<(), ExportError> {
        let (present, gone): (Vec<&Item>, Vec<&Item>) = items.iter().partition(|item| item.present);
        for item in gone {
            match self.read(item)? {
                Found::Nothing => {
                    self.entry(item, Node::Gone)?;
                    self.frame(&Transfer::EntryEnd)?;
                }
                _ => self.leave_out(item),
            }
        }
        for item in present {
            let is_known =
                !item.young_folder || self.introduced.contains(&(item.spot.0, item.folder.clone()));
            match self.read(item)? {
                Found::Inode(inode) if is_known => self.inode(item, inode)?,
                _ => self.leave_out(item),
            }
        }
        Ok(())
    }

    fn read(&self, item: &Item) -> Result<Found, ExportError> {
        let view = &self.views[item.spot.0];
        let path = view.outer(&item.spot.1);
        let midway = || self.capture.moment(Moment::Read, &path);
        read(view, item, midway).map_err(|source| ExportError::Read {
            path: String::from_utf8_lossy(&path).into_owned(),
            source,
        })
    }

    fn leave_out(&mut self, item: &Item) {
        self.left_out
            .mark(item.spot.0, item.folder.clone(), item.name.clone(), item.change);
    }

    fn inode(&mut self, item: &Item, inode: Inode) -> Result<(), ExportError> {
        let Inode { handle, meta, what } = inode;
        let node = match what {
            What::File(fd, size) => {
                let file = (item.spot.0, handle.clone());
                // What moved may have been lost on the clone while it had no name there. And whether what this
                // round said of a file was taken is not known yet.
                let is_new = item.change.tree || !self.sent.insert(file.clone());
                let known = self.rounds.sent.get(&file).filter(|_| !is_new).cloned();
                self.rounds.forget(&file);
                let whole = known.is_none();
                self.entry(item, Node::File { meta, size, whole })?;
                let (sent, bytes) = Sender::new(self.out, known.as_ref()).send(&fd, size, handle)?;
                self.end.bytes += bytes;
                if let Some(sent) = sent {
                    self.rounds.remember(item.spot.0, sent);
                }
                return self.frame(&Transfer::EntryEnd);
            }
            What::Directory => {
                self.introduced.insert((item.spot.0, handle));
                Node::Directory { meta }
            }
            What::Symlink(target) => Node::Symlink { meta, target },
            What::Special(rdev) => Node::Special { meta, rdev },
        };
        self.entry(item, node)?;
        self.frame(&Transfer::EntryEnd)
    }

    fn entry(&mut self, item: &Item, node: Node) -> Result<(), ExportError> {
        let view = &self.views[item.spot.0];
        let path = view.outer(&item.spot.1);
        let leads_elsewhere = locate(
            self.views,
            std::path::Path::new(std::ffi::OsStr::new(
                <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&path),
            )),
        )
        .is_none_or(|found| found.0 != item.spot.0);
        let filesystem = if leads_elsewhere {
            std::os::unix::ffi::OsStrExt::as_bytes(view.mount_point.as_os_str()).to_vec()
        } else {
            Vec::new()
        };
        self.end.entries += 1;
        self.frame(&Transfer::Entry(Box::new(Entry {
            path,
            filesystem,
            folder: (item.folder.kind, item.folder.bytes.clone()),
            node,
        })))
    }

    fn frame(&mut self, transfer: &Transfer) -> Result<(), ExportError> {
        write_frame(self.out, transfer).map_err(Into::into)
    }
}
