use proptest::prelude::*;

use super::*;

fn layer() -> Uuid {
    Uuid::from_u128(0x1234_5678)
}

fn states(seed: u8) -> Box<States> {
    let mut states = Box::new([0; STATES]);
    for i in 0..BLOCKS_PER_PAGE {
        let state = match (i + u64::from(seed)) % 3 {
            0 => State::Absent,
            1 => State::Data,
            _ => State::Zero,
        };
        set(&mut states, i, state);
    }
    states
}

fn slots(first: Option<(u64, u8)>, second: Option<(u64, u8)>) -> Vec<u8> {
    let mut bytes = vec![0; 2 * SLOT as usize];
    for (slot, content) in [first, second].into_iter().enumerate() {
        if let Some((generation, seed)) = content {
            let at = slot * SLOT as usize;
            let page = encode_page(layer(), 9, generation, &states(seed));
            bytes[at..at + SLOT as usize].copy_from_slice(&page[..]);
        }
    }
    bytes
}

fn header(generation: u64) -> MapHeader {
    MapHeader {
        generation,
        uuid: layer(),
        parent: generation.is_multiple_of(3).then(|| Uuid::from_u128(77)),
        parent_session: 4,
        size: 1 << 40,
        session: 11,
    }
}

fn header_slots(first: Option<u64>, second: Option<u64>) -> Vec<u8> {
    let mut bytes = vec![0; 2 * SLOT as usize];
    for (slot, generation) in [first, second].into_iter().enumerate() {
        if let Some(generation) = generation {
            let at = slot * SLOT as usize;
            bytes[at..at + 512].copy_from_slice(&header(generation).encode());
        }
    }
    bytes
}

#[test]
fn the_newer_slot_of_a_page_counts() {
    for (first, second, expected) in [
        (Some((1, 0)), None, (1, 0, 0)),
        (Some((3, 0)), Some((2, 1)), (3, 0, 0)),
        (Some((3, 0)), Some((4, 1)), (4, 1, 1)),
        (None, Some((7, 2)), (7, 1, 2)),
    ] {
        let page = decode_page(layer(), 9, &slots(first, second)).unwrap();
        assert_eq!(page.newest, expected.0);
        assert_eq!(page.durable, Some((expected.1, states(expected.2))));
    }
    let nothing = decode_page(layer(), 9, &slots(None, None)).unwrap();
    assert_eq!((nothing.newest, nothing.durable), (0, None));
}

#[test]
fn the_newer_slot_of_the_header_counts() {
    for (first, second, newest) in [(Some(2), None, 2), (Some(2), Some(3), 3), (Some(4), Some(3), 4)] {
        assert_eq!(
            MapHeader::decode(&header_slots(first, second)).unwrap(),
            header(newest)
        );
    }
    assert!(MapHeader::decode(&header_slots(None, None)).is_err());
}

#[test]
fn a_page_of_another_layer_or_place_is_refused() {
    let bytes = slots(Some((1, 0)), None);
    assert!(decode_page(Uuid::from_u128(1), 9, &bytes).is_err());
    assert!(decode_page(layer(), 10, &bytes).is_err());
}

#[test]
fn a_newer_version_is_told_apart_from_damage() {
    let mut bytes = header_slots(Some(2), None);
    bytes[8] = 9;
    assert_eq!(MapHeader::decode(&bytes), Err(FormatError::Version(9)));
}

#[test]
fn counting_and_setting_agree() {
    let mut states = Box::new([0; STATES]);
    set(&mut states, 5, State::Data);
    set(&mut states, 6, State::Zero);
    set(&mut states, 7, State::Data);
    set(&mut states, 7, State::Absent);
    assert_eq!(count_present(&states), 2);
    assert_eq!(
        [4, 5, 6, 7].map(|i| get(&states, i)),
        [State::Absent, State::Data, State::Zero, State::Absent]
    );
}

proptest! {
    #[test]
    fn filling_and_finding_runs_agree_with_block_by_block(
        fills in prop::collection::vec((0u64..200, 0u64..80, 0u8..3), 1..20), start in 0u64..200, len in 1u64..100
    ) {
        let state = |n| [State::Absent, State::Data, State::Zero][usize::from(n)];
        let mut states = Box::new([0; STATES]);
        let mut model = vec![State::Absent; 400];
        for (start, len, n) in fills {
            let range = start as usize..(start + len) as usize;
            let changes = model[range.clone()].iter().any(|&old| old != state(n));
            model[range].fill(state(n));
            prop_assert_eq!(fill(&mut states, start, start + len, state(n)), changes);
        }
        let same = model[start as usize..(start + len) as usize]
            .iter()
            .take_while(|&&other| other == model[start as usize])
            .count();
        prop_assert_eq!(run(&states, start, start + len), (model[start as usize], same as u64));
        let present = model.iter().filter(|&&state| state != State::Absent).count();
        prop_assert_eq!(count_present(&states), present as u32);
    }

    /// A write that was cut short anywhere leaves what was durable before it.
    #[test]
    fn a_torn_page_never_costs_what_was_durable(written in any::<u8>(), fresh in any::<bool>()) {
        let old = if fresh { None } else { Some((5, 0)) };
        // The slot being written held an older generation, or nothing.
        let before = slots(old, if fresh { None } else { Some((4, 1)) });
        let after = slots(old, Some((6, 2)));
        let mut torn = before.clone();
        for sector in 0..8 {
            if written & (1 << sector) != 0 {
                let at = SLOT as usize + sector * 512;
                torn[at..at + 512].copy_from_slice(&after[at..at + 512]);
            }
        }
        let page = decode_page(layer(), 9, &torn).unwrap();
        let durable = page.durable.map(|(_, states)| states);
        match (written, fresh) {
            (0xff, _) => prop_assert_eq!(durable, Some(states(2))),
            (_, true) => prop_assert_eq!(durable, None),
            (_, false) => prop_assert_eq!(durable, Some(states(0))),
        }
        // The next write must not be mistaken for the rest of this one.
        prop_assert_eq!(page.newest == 6, written != 0);
    }

    /// A flipped bit is found, or was in what is outdated.
    #[test]
    fn a_flipped_bit_in_a_page_is_never_passed_over(bit in 0..2 * SLOT as usize * 8, both in any::<bool>()) {
        let mut bytes = slots(if both { Some((5, 0)) } else { None }, Some((6, 2)));
        bytes[bit / 8] ^= 1 << (bit % 8);
        match decode_page(layer(), 9, &bytes) {
            Ok(page) => {
                prop_assert!(bit / 8 < SLOT as usize && both);
                prop_assert_eq!(page.durable, Some((1, states(2))));
            }
            Err(error) => prop_assert!(matches!(error, FormatError::Damaged(_))),
        }
    }

    #[test]
    fn a_flipped_bit_in_the_header_is_refused(bit in 0..512usize * 8, slot in 0..2usize) {
        let mut bytes = header_slots(Some(2), Some(3));
        bytes[slot * SLOT as usize + bit / 8] ^= 1 << (bit % 8);
        prop_assert!(MapHeader::decode(&bytes).is_err());
    }

    #[test]
    fn what_is_cut_short_is_refused(len in 0..2 * SLOT as usize) {
        prop_assert!(decode_page(layer(), 9, &slots(Some((1, 0)), None)[..len]).is_err());
        // The rest of a header's slot holds nothing.
        let header = header_slots(Some(2), Some(3));
        let decoded = MapHeader::decode(&header[..len]);
        prop_assert!(decoded.is_err() || len >= SLOT as usize + 512);
    }

    #[test]
    fn garbage_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 2 * SLOT as usize)) {
        prop_assert!(decode_page(layer(), 9, &bytes).is_err());
        prop_assert!(MapHeader::decode(&bytes).is_err());
    }
}
