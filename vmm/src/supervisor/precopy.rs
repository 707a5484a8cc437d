//! Writing guest RAM into a checkpoint while the guest runs, in rounds.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use understudy_checkpoint::{CHUNK, SaveError, Writer};
use understudy_vmm_control::session::SaveState;

use super::save_job::{Failure, Job};
use crate::block::Disk;
use crate::machine::dirty::{DirtyLog, PageSet};
use crate::machine::memory::GuestRam;

/// Most rounds while the guest runs; a guest that writes faster than the disk is paused then.
const MAX_ROUNDS: u32 = 30;
/// Most rounds once the guest may be paused that was ready, and has written more since than fits.
const LAST_ROUNDS: u32 = 4;
/// How long a guest that is ready writes before that is written again.
const HOLD_ROUND: Duration = Duration::from_secs(1);
/// What the disk is taken to write in a second until it was measured.
const ASSUMED_RATE: f64 = 200e6;
/// Least bytes of a round by which the disk is measured.
const MEASURED: u64 = 4 << 20;

/// What a save looks at while the guest runs.
pub(super) struct Source {
    /// Number of the boot that is saved.
    pub(super) boots: u64,
    /// Its RAM.
    pub(super) ram: Arc<GuestRam>,
    /// What is written to it.
    pub(super) log: DirtyLog,
    /// Its disks.
    pub(super) disks: Vec<Arc<Disk>>,
}

/// Writes all memory while the guest runs, and again what it has written meanwhile, until what is left fits
/// the pause, and the guest may be paused. Returns what is left.
pub(super) fn pre_copy(job: &Job, writer: &Writer, source: &Source) -> Result<PageSet, Failure> {
    // After the log was switched on: what is touched from now on is in the log.
    let touched = source.ram.touched(CHUNK as u64).map_err(Failure::Touched)?;
    let (mut chunks, mut zero) = (Vec::new(), Vec::new());
    for (chunk, touched) in (0..).zip(&touched) {
        match touched {
            true => chunks.push(chunk),
            false => zero.push(chunk),
        }
    }
    for run in runs(&zero) {
        writer.zero(run);
    }
    job.update(|info| info.remaining_bytes = (chunks.len() * CHUNK) as u64);
    let mut rounds = Rounds {
        job,
        writer,
        source,
        rate: ASSUMED_RATE,
        round: 0,
    };
    let mut dirty = rounds.until_enough(&chunks, MAX_ROUNDS)?;
    if job.may_pause() {
        return Ok(dirty);
    }
    job.update(|info| info.state = SaveState::Ready);
    loop {
        job.wait_to_pause(HOLD_ROUND)?;
        // What was written since belongs to what is left.
        source.log.collect(&source.ram, &mut dirty)?;
        let chunks = dirty.chunks(CHUNK as u64);
        if job.may_pause() {
            return match rounds.fits(&chunks) {
                true => Ok(dirty),
                false => rounds.until_enough(&chunks, LAST_ROUNDS),
            };
        }
        // Kept small, but not at the price of a disk that others are saved to as well.
        if !chunks.is_empty() {
            dirty = rounds.write(&chunks)?;
        }
    }
}

/// Rounds of one save.
struct Rounds<'a> {
    job: &'a Job,
    writer: &'a Writer,
    source: &'a Source,
    /// Bytes that were written in a second.
    rate: f64,
    round: u32,
}

impl Rounds<'_> {
    /// Writes these chunks, and in further rounds what was written meanwhile, until what is left fits the pause
    /// or rounds shrink no more.
    fn until_enough(&mut self, chunks: &[u64], most: u32) -> Result<PageSet, Failure> {
        let mut dirty = self.write(chunks)?;
        let mut before = u64::MAX;
        for round in 1..most {
            let chunks = dirty.chunks(CHUNK as u64);
            let left = bytes(&chunks);
            if is_enough(left, before, self.rate, self.target()) {
                break;
            }
            tracing::debug!(round, left, rate = self.rate, "another round");
            before = left;
            dirty = self.write(&chunks)?;
        }
        Ok(dirty)
    }

    /// One round: writes these chunks, and returns what was written meanwhile.
    fn write(&mut self, chunks: &[u64]) -> Result<PageSet, Failure> {
        let (job, writer, source) = (self.job, self.writer, self.source);
        if self.round > 0 {
            writer.begin_round();
        }
        let (begun, written) = (Instant::now(), writer.progress().written_bytes);
        write(writer, &runs(chunks), &source.ram, || {
            let now = writer.progress().written_bytes;
            job.update(|info| info.written_bytes = now);
            job.check()
        })?;
        let wrote = writer.progress().written_bytes - written;
        if wrote >= MEASURED {
            self.rate = wrote as f64 / begun.elapsed().as_secs_f64();
        }
        let mut dirty = PageSet::empty(source.ram.size());
        source.log.collect(&source.ram, &mut dirty)?;
        self.round += 1;
        let left = bytes(&dirty.chunks(CHUNK as u64));
        job.update(|info| {
            info.rounds = self.round;
            info.remaining_bytes = left;
        });
        job.check()?;
        Ok(dirty)
    }

    fn fits(&self, chunks: &[u64]) -> bool {
        fits(bytes(chunks), self.rate, self.target())
    }

    fn target(&self) -> Duration {
        Duration::from_millis(self.job.request.target_pause_ms)
    }
}

fn bytes(chunks: &[u64]) -> u64 {
    (chunks.len() * CHUNK) as u64
}

/// Whether the guest is to be paused now, with `left` bytes to be written at `rate` bytes a second; `before`
/// were left after the round before.
fn is_enough(left: u64, before: u64, rate: f64, target: Duration) -> bool {
    // Less than an eighth less than after the round before.
    let stuck = left > before - before / 8;
    fits(left, rate, target) || stuck
}

fn fits(left: u64, rate: f64, target: Duration) -> bool {
    left as f64 / rate <= target.as_secs_f64()
}

/// Writes these chunks as they are now.
pub(super) fn write(
    writer: &Writer,
    ranges: &[Range<u64>],
    ram: &GuestRam,
    check: impl Fn() -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    // A thread costs more than a few chunks.
    let threads = threads.min(bytes.div_ceil(32).max(1) as usize);
    let result = writer.write(ranges, threads, |chunk, buffer| {
        check().map_err(|_| io::Error::from(io::ErrorKind::Interrupted))?;
        ram.copy_out(chunk * CHUNK as u64, buffer)
    });
    match result {
        Err(SaveError::Fill { .. }) => {
            check()?;
            Ok(result?)
        }
        result => Ok(result?),
    }
}

/// Ascending numbers as ranges.
pub(super) fn runs(numbers: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_joined_into_ranges() {
        assert_eq!(runs(&[]), Vec::<Range<u64>>::new());
        assert_eq!(runs(&[1, 2, 3, 7, 9, 10]), vec![1..4, 7..8, 9..11]);
    }

    #[test]
    fn the_guest_is_paused_when_the_rest_fits_the_pause_or_shrinks_no_more() {
        let target = Duration::from_millis(100);
        let enough = |left, before| is_enough(left, before, 1e9, target);
        assert!(enough(1 << 20, u64::MAX), "fits");
        assert!(!enough(1 << 30, u64::MAX), "one round more");
        assert!(!enough(1 << 29, 1 << 30), "shrinks");
        assert!(enough(1 << 29, 1 << 29), "shrinks no more");
    }
}
