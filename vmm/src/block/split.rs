//! Splitting a disk: from then on the guest writes to a layer of its own, and a clone to another one, and
//! what is beneath both does not change any more.

use std::time::Instant;

use understudy_vmm_control::api::SplitReport;
use uuid::Uuid;

use super::disk::{Control, Disk, read_owner};
use super::error::DiskError;
use super::layer::{self, Below, Layer};
use super::storage::{Access, Lock};

/// What was prepared and what was done.
#[derive(Default)]
pub(super) struct Splits {
    /// The next top, open and locked, and the pair of layers as they were asked for.
    prepared: Option<(Layer, Uuid, Uuid)>,
    /// The pair that was split last, and how long requests waited.
    done: Option<(Uuid, Uuid, SplitReport)>,
}

impl Disk {
    /// Makes both layers of a split, empty above the current top, durably. A merge that runs is stopped
    /// first. Asked again it answers as before; asked for another pair it forgets the one before. The
    /// caller names `guest` in `owner.json` next: from then on it may be opened in place of the current top.
    pub fn prepare_split(&self, guest: Uuid, clone: Uuid) -> Result<(), DiskError> {
        let mut control = self.control();
        if self.read_only {
            return Err(self.conflict("a read-only disk cannot be split"));
        }
        if guest == clone {
            return Err(self.conflict("guestLayer and cloneLayer must be two layers"));
        }
        if let Some((g, c, _)) = control.splits.done
            && (g, c) == (guest, clone)
        {
            return Ok(());
        }
        if let Some((_, g, c)) = &control.splits.prepared
            && (*g, *c) == (guest, clone)
        {
            return Ok(());
        }
        self.take_up()?;
        self.stop_merge();
        control.splits.prepared = None;
        let below = {
            let mut chain = self.chain();
            if chain
                .layers
                .iter()
                .any(|layer| [guest, clone].contains(&layer.uuid()))
            {
                return Err(
                    self.conflict("a layer of the disk's chain cannot be made anew; choose other UUIDs")
                );
            }
            match chain.layers.first() {
                Some(top) => Below {
                    parent: Some(top.uuid()),
                    session: top.header.session,
                    size: chain.size,
                },
                None => {
                    // Before any layer exists: without owner.json nobody may take the source for the disk.
                    let mut record = chain.source.record.clone();
                    record.layered = true;
                    chain.source.store(self.directory.as_ref(), record)?;
                    Below {
                        parent: None,
                        session: chain.source.record.session,
                        size: chain.size,
                    }
                }
            }
        };
        let directory = self.directory.as_ref();
        Layer::create(directory, clone, below)?;
        Layer::create(directory, guest, below)?;
        let mut top = Layer::open(directory, guest, Access::Write)?;
        top.lock(directory, Lock::Exclusive)?;
        top.begin_session(directory)?;
        control.splits.prepared = Some((top, guest, clone));
        Ok(())
    }

    /// Switches the guest's writes to the prepared layer, in time that does not depend on the disk's size:
    /// what was written before is flushed, and a pointer changes. Requests in flight are completed before,
    /// those that come meanwhile wait.
    pub fn split(&self, guest: Uuid) -> Result<SplitReport, DiskError> {
        let mut control = self.control();
        if let Some((g, _, report)) = control.splits.done
            && g == guest
        {
            return Ok(report);
        }
        match &control.splits.prepared {
            Some((_, g, _)) if *g == guest => {}
            Some((_, g, _)) => {
                return Err(self.conflict(format!("layer {guest} was not prepared, {g} was")));
            }
            None => {
                return Err(self.conflict(format!(
                    "layer {guest} was not prepared; ask for prepare-split first"
                )));
            }
        }
        let path = || self.directory.source_path();
        // Most of what is dirty is written while requests go on.
        self.flush()
            .map_err(DiskError::io("flushing before a split", path()))?;
        let began = Instant::now();
        self.flush_and(|chain| {
            let Some((top, guest, clone)) = control.splits.prepared.take() else {
                return;
            };
            // What was the top is read-only now, and a clone may open it.
            let lowered = match chain.layers.first() {
                Some(old) => old.lock(self.directory.as_ref(), Lock::Shared),
                None => chain.source.lock(self.directory.as_ref(), Lock::Shared),
            };
            if let Err(error) = lowered {
                tracing::error!(disk = self.name, %error, "cannot share the lock of what was the top");
            }
            chain.push(top);
            let report = SplitReport {
                held_us: began.elapsed().as_micros() as u64,
            };
            control.splits.done = Some((guest, clone, report));
        })
        .map_err(DiskError::io("flushing for a split", path()))?;
        match control.splits.done {
            Some((_, _, report)) => Ok(report),
            None => Err(self.conflict("the split was not prepared")),
        }
    }

    /// Gives up a split that was prepared and not made: `owner.json` names the current top again. One that
    /// was made is history.
    pub(super) fn forget_splits(&self, control: &mut Control) -> Result<(), DiskError> {
        control.splits.done = None;
        let Some((_, guest, _)) = &control.splits.prepared else {
            return Ok(());
        };
        let (guest, directory) = (*guest, self.directory.as_ref());
        if let Some(mut owner) = read_owner(directory)?
            && owner.layer == Some(guest)
        {
            owner.layer = self.chain().layers.first().map(Layer::uuid);
            directory
                .replace("owner.json", &owner.encode())
                .map_err(DiskError::io("replacing", directory.path("owner.json")))?;
        }
        control.splits.prepared = None;
        // Nothing was ever written to it.
        layer::remove(directory, guest)
    }
}
