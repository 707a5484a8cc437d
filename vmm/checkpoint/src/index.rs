//! The index: for every chunk of memory whether it is zero, else with which counter and tag it was sealed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::seal::TAG;

/// Bytes of an entry in the file: counter (7, little-endian), kind (1), tag (16).
pub(crate) const ENTRY: usize = 24;
/// Bytes of a change: number of the chunk (8, little-endian) and its entry.
pub(crate) const CHANGE: usize = 8 + ENTRY;
/// Counters are smaller than this.
pub(crate) const COUNTER_LIMIT: u64 = 1 << 56;

const ZERO: u8 = 0;
const DATA: u8 = 1;
/// In memory only: not written yet, or a write of it failed.
const ABSENT: u8 = 0xff;

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// All bytes are zero; its place in the file means nothing.
    Zero,
    /// Sealed in its place in the file.
    Data { counter: u64, tag: [u8; TAG] },
}

impl Entry {
    pub fn encode(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        if let Entry::Data { counter, tag } = self {
            bytes[..7].copy_from_slice(&counter.to_le_bytes()[..7]);
            bytes[7] = DATA;
            bytes[8..].copy_from_slice(&tag);
        }
        bytes
    }

    /// `None`: no entry that [`Entry::encode`] makes.
    pub fn decode(bytes: &[u8; ENTRY]) -> Option<Entry> {
        match bytes[7] {
            ZERO if *bytes == [0; ENTRY] => Some(Entry::Zero),
            DATA => {
                let mut counter = [0; 8];
                counter[..7].copy_from_slice(&bytes[..7]);
                let mut tag = [0; TAG];
                tag.copy_from_slice(&bytes[8..]);
                Some(Entry::Data {
                    counter: u64::from_le_bytes(counter),
                    tag,
                })
            }
            _ => None,
        }
    }
}

/// The index of a checkpoint. Kept as it was read: a guest with much memory is not to wait for its entries to be
/// taken apart.
pub(crate) struct Index {
    bytes: Vec<u8>,
}

impl Index {
    /// The index in `bytes` with the changes that were made to it; `None` where they are not what
    /// [`LiveIndex`] makes.
    pub fn decode(mut bytes: Vec<u8>, changes: &[u8]) -> Option<Index> {
        let (entries, rest) = bytes.as_chunks_mut::<ENTRY>();
        let (changes, more) = changes.as_chunks::<CHANGE>();
        let mut least = 0;
        for change in changes {
            let (number, entry) = change.split_first_chunk::<8>()?;
            let number = u64::from_le_bytes(*number);
            if number < least {
                return None;
            }
            *entries.get_mut(usize::try_from(number).ok()?)? = *entry.first_chunk()?;
            least = number + 1;
        }
        let is_known = |entry: &[u8; ENTRY]| Entry::decode(entry).is_some();
        let is_whole = rest.is_empty() && more.is_empty() && entries.iter().all(is_known);
        is_whole.then_some(Index { bytes })
    }

    /// Chunks that it tells of.
    pub fn chunks(&self) -> u64 {
        (self.bytes.len() / ENTRY) as u64
    }

    /// What is known of a chunk; `None` beyond the end.
    pub fn get(&self, chunk: u64) -> Option<Entry> {
        let (entries, _) = self.bytes.as_chunks::<ENTRY>();
        entries.get(usize::try_from(chunk).ok()?).and_then(Entry::decode)
    }
}

/// An index that several threads fill, each its own chunks.
///
/// Entries are three words without a lock: two threads that write one chunk at a time break the writer's
/// contract, and what would come of it does not open.
pub(crate) struct LiveIndex {
    words: Vec<[AtomicU64; ENTRY / 8]>,
    /// Chunks that hold data.
    data: AtomicU64,
    /// Since it was settled: chunks that were set, some more than once.
    changed: Option<Mutex<Vec<u64>>>,
}

impl LiveIndex {
    /// All absent.
    pub fn new(chunks: u64) -> LiveIndex {
        let absent = || AtomicU64::new(u64::from(ABSENT) << 56);
        LiveIndex {
            words: (0..chunks)
                .map(|_| [absent(), AtomicU64::new(0), AtomicU64::new(0)])
                .collect(),
            data: AtomicU64::new(0),
            changed: None,
        }
    }

    pub fn chunks(&self) -> u64 {
        self.words.len() as u64
    }

    pub fn set(&self, chunk: u64, entry: Entry) {
        let bytes = entry.encode();
        let (words, _) = bytes.as_chunks::<8>();
        let (there, mut words) = (
            &self.words[chunk as usize],
            words.iter().map(|word| u64::from_le_bytes(*word)),
        );
        self.set_first(chunk, words.next().unwrap_or_default());
        for (word, value) in there[1..].iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Its content in the file is about to change, or was never written.
    pub fn set_absent(&self, chunk: u64) {
        self.set_first(chunk, u64::from(ABSENT) << 56);
    }

    fn set_first(&self, chunk: u64, value: u64) {
        let is_data = |word: u64| word >> 56 == u64::from(DATA);
        let before = self.words[chunk as usize][0].swap(value, Ordering::Relaxed);
        match (is_data(before), is_data(value)) {
            (false, true) => self.data.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.data.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
        if let Some(changed) = &self.changed {
            changed.lock().unwrap_or_else(PoisonError::into_inner).push(chunk);
        }
    }

    /// Chunks that hold data.
    pub fn data_chunks(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// The index as it goes into its file, or the first chunk that is absent. What is set from here on is in
    /// [`LiveIndex::changes`].
    pub fn settle(&mut self) -> Result<Vec<u8>, u64> {
        let mut bytes = Vec::with_capacity(self.words.len() * ENTRY);
        for chunk in 0..self.chunks() {
            self.append(chunk, &mut bytes)?;
        }
        self.changed = Some(Mutex::default());
        Ok(bytes)
    }

    /// What was set since the index was settled, chunks in ascending order; or the first chunk that is absent.
    pub fn changes(&self) -> Result<Vec<u8>, u64> {
        let Some(changed) = &self.changed else {
            return Ok(Vec::new());
        };
        let mut changed = changed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        changed.sort_unstable();
        changed.dedup();
        let mut bytes = Vec::with_capacity(changed.len() * CHANGE);
        for chunk in changed {
            bytes.extend_from_slice(&chunk.to_le_bytes());
            self.append(chunk, &mut bytes)?;
        }
        Ok(bytes)
    }

    fn append(&self, chunk: u64, bytes: &mut Vec<u8>) -> Result<(), u64> {
        let words = &self.words[chunk as usize];
        if words[0].load(Ordering::Relaxed) >> 56 == u64::from(ABSENT) {
            return Err(chunk);
        }
        for word in words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_index_with_an_absent_chunk_is_not_written() {
        let mut index = LiveIndex::new(3);
        index.set(0, Entry::Zero);
        index.set(1, Entry::Zero);
        assert_eq!(index.settle(), Err(2));
        index.set(2, Entry::Zero);
        assert_eq!(index.settle(), Ok(vec![0; 3 * ENTRY]));
        assert_eq!(index.changes(), Ok(Vec::new()));
        index.set_absent(1);
        assert_eq!(index.changes(), Err(1));
        assert_eq!(index.settle(), Err(1));
    }

    #[test]
    fn changes_name_each_chunk_once_and_are_refused_in_another_order_or_beyond_the_end() {
        let mut index = LiveIndex::new(3);
        (0..3).for_each(|chunk| index.set(chunk, Entry::Zero));
        let base = index.settle().unwrap();
        let data = |counter| Entry::Data {
            counter,
            tag: [7; TAG],
        };
        for (chunk, counter) in [(2, 5), (0, 6), (2, 7)] {
            index.set_absent(chunk);
            index.set(chunk, data(counter));
        }
        let changes = index.changes().unwrap();
        assert_eq!(changes.len(), 2 * CHANGE);
        assert_eq!(index.data_chunks(), 2);
        let decode = |base: &[u8], changes: &[u8]| {
            let index = Index::decode(base.to_vec(), changes)?;
            Some(
                (0..index.chunks())
                    .map(|chunk| index.get(chunk).unwrap())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(decode(&base, &changes), Some(vec![data(6), Entry::Zero, data(7)]));
        let (first, second) = changes.split_at(CHANGE);
        assert_eq!(decode(&base, &[second, first].concat()), None);
        assert_eq!(decode(&base, &[first, first].concat()), None);
        assert_eq!(decode(&base[..2 * ENTRY], &changes), None);
        assert_eq!(decode(&base, &[&[0xff; 8], &first[8..]].concat()), None);
    }

    proptest! {
        #[test]
        fn bytes_decode_to_one_entry_or_none(bytes: [u8; ENTRY], kind in 0u8..3) {
            let mut bytes = bytes;
            bytes[7] = kind;
            match Entry::decode(&bytes) {
                Some(entry) => prop_assert_eq!(entry.encode(), bytes),
                None => prop_assert!(kind != DATA),
            }
        }

        #[test]
        fn a_live_index_encodes_what_was_set(counter in 0..COUNTER_LIMIT, tag: [u8; TAG]) {
            let mut index = LiveIndex::new(1);
            let entry = Entry::Data { counter, tag };
            index.set(0, entry);
            let bytes = index.settle().unwrap();
            prop_assert_eq!(Entry::decode(&bytes.try_into().unwrap()), Some(entry));
        }
    }
}
