//! The index: for every chunk of memory whether it is zero, else with which counter and tag it was sealed.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::seal::TAG;

/// Bytes of an entry in the file: counter (7, little-endian), kind (1), tag (16).
pub(crate) const ENTRY: usize = 24;
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

/// An index that several threads fill, each its own chunks.
///
/// Entries are three words without a lock: two threads that write one chunk at a time break the writer's
/// contract, and what would come of it does not open.
pub(crate) struct LiveIndex {
    words: Vec<[AtomicU64; ENTRY / 8]>,
}

impl LiveIndex {
    /// All absent.
    pub fn new(chunks: u64) -> LiveIndex {
        let absent = || AtomicU64::new(u64::from(ABSENT) << 56);
        LiveIndex {
            words: (0..chunks)
                .map(|_| [absent(), AtomicU64::new(0), AtomicU64::new(0)])
                .collect(),
        }
    }

    pub fn chunks(&self) -> u64 {
        self.words.len() as u64
    }

    pub fn set(&self, chunk: u64, entry: Entry) {
        let bytes = entry.encode();
        for (word, bytes) in self.words[chunk as usize].iter().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
    }

    /// Its content in the file is about to change, or was never written.
    pub fn set_absent(&self, chunk: u64) {
        self.words[chunk as usize][0].store(u64::from(ABSENT) << 56, Ordering::Relaxed);
    }

    /// Chunks that hold data.
    pub fn data_chunks(&self) -> u64 {
        let is_data =
            |words: &&[AtomicU64; ENTRY / 8]| words[0].load(Ordering::Relaxed) >> 56 == u64::from(DATA);
        self.words.iter().filter(is_data).count() as u64
    }

    /// The index as it goes into its file, or the first chunk that is absent.
    pub fn encode(&self) -> Result<Vec<u8>, u64> {
        let mut bytes = Vec::with_capacity(self.words.len() * ENTRY);
        for (chunk, words) in self.words.iter().enumerate() {
            let [first, ..] = words;
            if first.load(Ordering::Relaxed) >> 56 == u64::from(ABSENT) {
                return Err(chunk as u64);
            }
            for word in words {
                bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_index_with_an_absent_chunk_is_not_written() {
        let index = LiveIndex::new(3);
        index.set(0, Entry::Zero);
        index.set(1, Entry::Zero);
        assert_eq!(index.encode(), Err(2));
        index.set(2, Entry::Zero);
        assert_eq!(index.encode(), Ok(vec![0; 3 * ENTRY]));
        index.set_absent(1);
        assert_eq!(index.encode(), Err(1));
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
            let index = LiveIndex::new(1);
            let entry = Entry::Data { counter, tag };
            index.set(0, entry);
            let bytes = index.encode().unwrap();
            prop_assert_eq!(Entry::decode(&bytes.try_into().unwrap()), Some(entry));
        }
    }
}
