//! Which pages of guest RAM were written: KVM's log of what vCPUs write (KVM API, 4.8 and 7.17), which is on
//! only while a session is saved, because each first write to a page costs an exit while it is.
//!
//! What device emulation writes into guest RAM is *not* in that log: [`crate::virtio`] notes it in the
//! bitmap of the memory itself, and [`DirtyLog::collect`] joins both.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::ioctl;
use super::memory::GuestRam;
use super::slots;

/// Unit of KVM's log.
pub const PAGE: u64 = 4096;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: reading the log does not clear it, so that pages are protected
/// again in small steps and not all at once under KVM's lock.
const MANUAL_PROTECT: u64 = 1;
/// Pages that one step clears: a multiple of 64.
const STEP: u64 = 64 * 1024;

/// A set of pages of guest RAM, counted through all its ranges without the holes between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set within `bytes` of RAM.
    pub fn empty(bytes: u64) -> PageSet {
        let pages = bytes.div_ceil(PAGE);
        PageSet {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
        }
    }

    /// All pages.
    pub fn all(bytes: u64) -> PageSet {
        let mut set = PageSet::empty(bytes);
        for page in 0..set.pages {
            set.insert(page);
        }
        set
    }

    /// Adds a page.
    pub fn insert(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    /// Adds the pages of a bitmap whose first bit is page `first`, a multiple of 64.
    pub(super) fn join_words(&mut self, first: u64, words: &[u64]) {
        let at = (first / 64) as usize;
        for (to, from) in self.words.iter_mut().skip(at).zip(words) {
            *to |= from;
        }
    }

    /// Adds all of another set.
    pub fn join(&mut self, other: &PageSet) {
        self.join_words(0, &other.words);
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The chunks of `chunk` bytes, a multiple of 64 pages or a divisor of it in whole pages, that hold any
    /// of the pages, in ascending order.
    pub fn chunks(&self, chunk: u64) -> Vec<u64> {
        let pages = chunk / PAGE;
        let mut chunks = Vec::new();
        for (index, word) in self.words.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let page = index as u64 * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                let chunk = page / pages;
                if chunks.last() != Some(&chunk) {
                    chunks.push(chunk);
                }
            }
        }
        chunks
    }
}

/// Why the log could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {source}")]
pub struct DirtyLogError {
    action: &'static str,
    source: kvm_ioctls::Error,
}

fn failed(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> DirtyLogError {
    move |source| DirtyLogError { action, source }
}

/// The log of one machine, on from [`DirtyLog::begin`] until it is dropped.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    ram: Vec<slots::Slot>,
    manual: bool,
}

impl DirtyLog {
    /// Switches the log on. What was written before is not in it.
    pub fn begin(vm: &Arc<VmFd>, ram: &GuestRam) -> Result<DirtyLog, DirtyLogError> {
        let manual = enable_manual_protect(vm);
        let log = DirtyLog {
            vm: vm.clone(),
            ram: slots::of(ram),
            manual,
        };
        ram.take_device_writes(&mut PageSet::empty(ram.size()));
        log.set(KVM_MEM_LOG_DIRTY_PAGES)
            .map_err(failed("switching on KVM's log of written pages"))?;
        Ok(log)
    }

    fn set(&self, flags: u32) -> Result<(), kvm_ioctls::Error> {
        for slot in &self.ram {
            slots::set(&self.vm, slot, flags)?;
        }
        Ok(())
    }

    /// Adds to `set` what was written since the last call, by vCPUs and by devices. What is collected is
    /// gone from the log: a caller that fails to write it must keep it for the next round.
    pub fn collect(&self, ram: &GuestRam, set: &mut PageSet) -> Result<(), DirtyLogError> {
        self.read(ram, set, self.manual)
    }

    /// As [`DirtyLog::collect`], of a guest that does not run and will not be asked again: nothing is cleared, which
    /// would cost time that the guest waits for.
    pub fn collect_last(&self, ram: &GuestRam, set: &mut PageSet) -> Result<(), DirtyLogError> {
        self.read(ram, set, false)
    }

    fn read(&self, ram: &GuestRam, set: &mut PageSet, clear: bool) -> Result<(), DirtyLogError> {
        for slot in &self.ram {
            let words = self
                .vm
                .get_dirty_log(slot.slot, slot.length as usize)
                .map_err(failed("reading KVM's log of written pages"))?;
            // Joined before it is cleared: what is written in between is either in `words` or stays logged.
            set.join_words(slot.offset / PAGE, &words);
            if clear {
                self.clear(slot, &words)
                    .map_err(failed("clearing KVM's log of written pages"))?;
            }
        }
        ram.take_device_writes(set);
        Ok(())
    }

    /// Clears what was read, and nothing that came after it, where there is any.
    fn clear(&self, slot: &slots::Slot, words: &[u64]) -> Result<(), kvm_ioctls::Error> {
        let pages = slot.length / PAGE;
        let mut first = 0;
        for part in words.chunks((STEP / 64) as usize) {
            let count = STEP.min(pages - first);
            if part.iter().any(|word| *word != 0) {
                let mut part = part.to_vec();
                let mut request = kvm_clear_dirty_log {
                    slot: slot.slot,
                    num_pages: count as u32,
                    first_page: first,
                    __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                        dirty_bitmap: part.as_mut_ptr().cast(),
                    },
                };
                // SAFETY: the bitmap has a bit for each of the pages, and lives as long as the call.
                unsafe { ioctl::call(&*self.vm, ioctl::KVM_CLEAR_DIRTY_LOG, &raw mut request) }?;
            }
            first += count;
        }
        Ok(())
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            tracing::warn!(%error, "KVM's log of written pages stays on: the guest runs slower");
        }
    }
}

/// An old KVM has no manual protection: then reading clears.
fn enable_manual_protect(vm: &VmFd) -> bool {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    if offered <= 0 || offered as u64 & MANUAL_PROTECT == 0 {
        return false;
    }
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    capability.args[0] = MANUAL_PROTECT;
    vm.enable_cap(&capability).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_gathered_into_the_chunks_that_hold_them() {
        let mut set = PageSet::empty(1 << 20);
        for page in [0, 1, 15, 16, 200, 255] {
            set.insert(page);
        }
        assert_eq!(set.len(), 6);
        assert_eq!(set.chunks(64 << 10), vec![0, 1, 12, 15]);
        assert_eq!(PageSet::all(1 << 20).chunks(64 << 10).len(), 16);
        assert!(PageSet::empty(1 << 20).is_empty());
    }

    #[test]
    fn sets_are_joined_at_the_place_of_their_range() {
        let mut set = PageSet::empty(4 << 20);
        set.join_words(64, &[1]);
        let mut other = PageSet::empty(4 << 20);
        other.insert(3);
        set.join(&other);
        assert_eq!(set.chunks(PAGE), vec![3, 64]);
    }
}
