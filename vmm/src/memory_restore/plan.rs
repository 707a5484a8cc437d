//! Which memory is asked for: where the checkpoint has data.
//!
//! Huge blocks that are zero in the checkpoint are not registered at all. The kernel gives zeroes for them by
//! itself, as huge pages and without asking, which is most of a guest that has memory to spare. Registering
//! splits a mapping, so that their number is bounded: small gaps are registered with what surrounds them.

use understudy_checkpoint::CHUNK;

/// Chunks of a huge page.
pub(super) const BLOCK: u64 = (2 << 20) / CHUNK as u64;
/// Most ranges that are registered of one mapping; a process may have 65,530 mappings.
const MOST: usize = 256;

/// Ranges of chunks to register, of the `chunks` from number `first` on: (first, length).
pub(super) fn ranges(first: u64, chunks: u64, is_zero: impl Fn(u64) -> bool) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut start = 0;
    while start < chunks {
        let length = BLOCK.min(chunks - start);
        let block = first + start..first + start + length;
        if !block.clone().all(&is_zero) {
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == block.start => *count += length,
                _ => ranges.push((block.start, length)),
            }
        }
        start += length;
    }
    let mut gap = BLOCK;
    while ranges.len() > MOST {
        gap *= 2;
        ranges = merged(&ranges, gap);
    }
    ranges
}

/// Joins ranges that are less than `gap` apart.
fn merged(ranges: &[(u64, u64)], gap: u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, length) in ranges {
        match joined.last_mut() {
            Some((first, count)) if start - (*first + *count) < gap => *count = start + length - *first,
            _ => joined.push((*start, *length)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_whole_zero_blocks_are_left_out() {
        let data = [40, 41, 100, 200];
        let found = ranges(0, 8 * BLOCK, |chunk| !data.contains(&chunk));
        assert_eq!(
            found,
            vec![(BLOCK, BLOCK), (3 * BLOCK, BLOCK), (6 * BLOCK, BLOCK)]
        );
        assert_eq!(ranges(0, 64, |_| true), vec![]);
        assert_eq!(ranges(32, 40, |_| false), vec![(32, 40)]);
    }

    #[test]
    fn scattered_data_is_registered_in_few_ranges() {
        let chunks = 4 * MOST as u64 * BLOCK;
        let found = ranges(0, chunks, |chunk| !(chunk / BLOCK).is_multiple_of(2));
        assert!(found.len() <= MOST, "{}", found.len());
        assert_eq!(found.first().unwrap().0, 0);
    }

    proptest! {
        #[test]
        fn every_chunk_with_data_is_registered_once(first in 0..3 * BLOCK, zero in prop::collection::vec(prop::bool::weighted(0.98), 1..2000)) {
            let chunks = zero.len() as u64;
            let found = ranges(first, chunks, |chunk| zero[(chunk - first) as usize]);
            for (index, zero) in zero.iter().enumerate() {
                let chunk = first + index as u64;
                let holding = found.iter().filter(|(start, length)| (*start..start + length).contains(&chunk)).count();
                prop_assert!(holding <= 1 && (*zero || holding == 1));
            }
            prop_assert!(found.iter().all(|(start, length)| *start >= first && start + length <= first + chunks));
        }
    }
}
