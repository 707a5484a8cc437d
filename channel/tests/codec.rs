//! The codec takes whatever bytes come: each message arrives as it was sent, and what is not a message ends
//! in an error, with bounded memory and without a panic.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;
use understudy_channel::*;

fn text() -> impl Strategy<Value = String> {
    "[a-z@.-]{0,20}"
}

fn meta() -> impl Strategy<Value = Meta> {
    (
        any::<u16>(),
        any::<(u32, u32)>(),
        any::<(i64, u32)>(),
        any::<u64>(),
        vec(any::<u8>(), 0..20),
    )
        .prop_map(|(mode, (uid, gid), (seconds, nanoseconds), ino, bytes)| Meta {
            mode: mode.into(),
            uid,
            gid,
            mtime: (seconds, nanoseconds % 1_000_000_000),
            atime: (seconds, 0),
            nlink: 1,
            ino,
            handle: (1, bytes.clone()),
            xattrs: vec![(b"user.x".to_vec(), bytes)],
        })
}

fn transfer() -> impl Strategy<Value = Transfer> {
    let entry = (vec(1u8..=255, 1..30), meta(), 0u8..5).prop_map(|(name, meta, kind)| {
        let name: Vec<u8> = name
            .into_iter()
            .map(|b| if b == b'/' || b == b'.' { b'x' } else { b })
            .collect();
        let node = match kind {
            0 => Node::Gone,
            1 => Node::Directory { meta },
            2 => Node::File {
                meta,
                size: 7,
                whole: true,
            },
            3 => Node::Symlink {
                meta,
                target: name.clone(),
            },
            _ => Node::Special { meta, rdev: 259 },
        };
        Transfer::Entry(Box::new(Entry {
            path: [b"/", &name[..]].concat(),
            filesystem: Vec::new(),
            folder: (1, name),
            node,
        }))
    });
    let data = (any::<u32>(), vec(any::<u8>(), 1..300)).prop_map(|(offset, bytes)| Transfer::Data {
        offset: offset.into(),
        bytes,
    });
    let hole = (any::<u32>(), 1u64..1 << 40).prop_map(|(offset, length)| Transfer::Hole {
        offset: offset.into(),
        length,
    });
    let end = any::<(u64, u64)>().prop_map(|(round, bytes)| {
        Transfer::RoundEnd(RoundEnd {
            round,
            entries: 1,
            bytes,
            ..RoundEnd::default()
        })
    });
    prop_oneof![entry, data, hole, end, Just(Transfer::EntryEnd)]
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Describe),
        "[a-f0-9-]{1,36}".prop_map(|operation| Request::Confirm {
            operation,
            hold: vec!["a.service".into()]
        }),
        (1u32..60_000).prop_map(|watchdog_ms| Request::FreezeUserland {
            watchdog_ms,
            stop: Vec::new()
        }),
        (text(), text()).prop_map(|(id, reason)| Request::RebootAnswer {
            id,
            answer: Err(reason)
        }),
        (1_577_836_800_000_000i64..7_258_118_400_000_000).prop_map(|real_us| Request::Resumed { real_us }),
        (1u16.., "/[!-~]{0,40}", 1u32..60_000).prop_map(|(port, path, timeout_ms)| Request::Probe {
            probe: Probe::Http { port, path },
            timeout_ms
        }),
        ("[^\0]{1,40}", "[^\0]{0,40}", 1u32..60_000).prop_map(|(program, argument, timeout_ms)| {
            Request::Probe {
                probe: Probe::Exec {
                    command: vec![program, argument],
                },
                timeout_ms,
            }
        }),
    ]
}

fn encoded<M: serde::Serialize>(message: &M) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, message).unwrap();
    bytes
}

proptest! {
    #[test]
    fn every_transfer_arrives_as_it_was_sent(transfer in transfer()) {
        let bytes = encoded(&transfer);
        prop_assert_eq!(read_message::<Transfer>(&mut bytes.as_slice()).unwrap(), transfer);
    }

    #[test]
    fn every_request_arrives_as_it_was_sent(request in request()) {
        let bytes = encoded(&request);
        prop_assert_eq!(read_message::<Request>(&mut bytes.as_slice()).unwrap(), request);
    }

    #[test]
    fn a_frame_that_is_cut_is_an_error(transfer in transfer(), cut in any::<prop::sample::Index>()) {
        let bytes = encoded(&transfer);
        let cut = cut.index(bytes.len());
        let error = read_message::<Transfer>(&mut &bytes[..cut]).unwrap_err();
        prop_assert!(matches!(error, FrameError::Closed | FrameError::Io(_)), "{error}");
        prop_assert_eq!(matches!(error, FrameError::Closed), cut == 0);
    }

    #[test]
    fn a_flipped_bit_is_never_a_panic_and_never_out_of_bounds(
        transfer in transfer(), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let mut bytes = encoded(&transfer);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(message) = read_message::<Transfer>(&mut bytes.as_slice()) {
            prop_assert!(message.validate().is_ok());
        }
    }

    #[test]
    fn arbitrary_bytes_are_never_a_panic(body in vec(any::<u8>(), 0..600)) {
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        let _ = read_message::<Hello>(&mut frame.as_slice());
        let _ = read_message::<Welcome>(&mut frame.as_slice());
        let _ = read_message::<Request>(&mut frame.as_slice());
        let _ = read_message::<Reply>(&mut frame.as_slice());
        let _ = read_message::<Transfer>(&mut frame.as_slice());
        let _ = read_message::<Imported>(&mut frame.as_slice());
        let _ = read_message::<Transfer>(&mut body.as_slice());
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_before_anything_is_read(
        length in (MAX_FRAME as u32 + 1)..=u32::MAX,
    ) {
        let error = read_message::<Reply>(&mut length.to_le_bytes().as_slice()).unwrap_err();
        prop_assert!(matches!(error, FrameError::TooLarge(_)));
    }
}

#[test]
fn a_message_beyond_the_limit_is_not_sent() {
    let huge = Transfer::Data {
        offset: 0,
        bytes: vec![0; MAX_FRAME],
    };
    let mut out = Vec::new();
    assert!(matches!(
        write_frame(&mut out, &huge),
        Err(FrameError::TooLarge(_))
    ));
    assert!(out.is_empty());
}

#[test]
fn the_largest_data_and_the_largest_entry_fit_a_frame() {
    let data = Transfer::Data {
        offset: 0,
        bytes: vec![0xff; MAX_DATA],
    };
    assert!(read_message::<Transfer>(&mut encoded(&data).as_slice()).is_ok());
    let meta = Meta {
        handle: (-1, vec![0xff; 128]),
        xattrs: vec![
            (b"user.a".to_vec(), vec![0xff; 65536]),
            (b"user.b".to_vec(), vec![0xff; 65536]),
        ],
        ..Meta::default()
    };
    let path = [&b"/"[..], &[0xff; MAX_PATH - 1]].concat();
    let node = Node::Symlink {
        meta,
        target: vec![0xff; MAX_PATH],
    };
    let entry = Transfer::Entry(Box::new(Entry {
        path: path.clone(),
        filesystem: path,
        folder: (1, vec![0xff; 128]),
        node,
    }));
    assert!(read_message::<Transfer>(&mut encoded(&entry).as_slice()).is_ok());
}
