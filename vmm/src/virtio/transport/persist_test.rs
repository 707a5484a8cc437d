use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::super::tests::{FEATURE, Fixture};
use super::super::{NOTIFY, PENDING, TABLE};
use super::*;
use crate::pci::bus::Function;

/// A driver's life up to a running device with both queues in use.
fn started() -> Option<Fixture> {
    let mut fixture = Fixture::new(false)?;
    fixture.negotiate(VERSION_1 | FEATURE);
    fixture.set_up_queue(0, 128, 0x10_0000);
    fixture.set_up_queue(1, 64, 0x20_0000);
    fixture.enable_msix(0x8000);
    // Memory is decoded, the bus is mastered.
    fixture.transport.write_config(4, &[6]);
    fixture.write(0x14, 1, 0xf);
    Some(fixture)
}

fn save(fixture: &mut Fixture) -> FunctionState {
    fixture.transport.suspend().unwrap();
    fixture.transport.save().unwrap().open("probe").unwrap()
}

fn restore(fixture: &mut Fixture, state: &FunctionState) -> Result<(), StateError> {
    fixture
        .transport
        .restore(&Envelope::seal("probe", state).unwrap())
}

/// Any access of a driver.
fn access(fixture: &mut Fixture, (kind, at, value): (u8, u16, u32)) {
    let value = u64::from(value);
    match kind % 8 {
        0 => fixture.write(u64::from(at % 0x38), 4, value),
        1 => fixture.write(TABLE + u64::from(at % 48), 4, value),
        2 => {
            let bytes = (value as u32).to_le_bytes();
            fixture.transport.write_config(usize::from(at % 256), &bytes);
        }
        3 => fixture.write(0x14, 1, value),
        4 => {
            fixture.negotiate(VERSION_1 | FEATURE);
            fixture.set_up_queue(u64::from(at % 2), 64, 0x10_0000);
            fixture.write(0x14, 1, 0xf);
        }
        5 => fixture.enable_msix(value as u16),
        6 => {
            let active = fixture.active.lock().unwrap();
            if let Some(active) = active.as_ref() {
                active.interrupt.signal_queue(at % 3);
                active.interrupt.signal_config();
            }
        }
        _ => {
            fixture.read(u64::from(at % 0x6000), 4);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn saved_restored_and_saved_again_a_function_is_the_same(
        accesses in prop::collection::vec(any::<(u8, u16, u32)>(), 0..40)
    ) {
        let Some(mut fixture) = Fixture::new(false) else { return Ok(()) };
        for one in accesses {
            access(&mut fixture, one);
        }
        let saved = save(&mut fixture);
        let Some(mut fresh) = Fixture::new(false) else { return Ok(()) };
        restore(&mut fresh, &saved).unwrap();
        prop_assert_eq!(save(&mut fresh), saved);
    }

    #[test]
    fn no_state_makes_the_transport_panic(
        flips in prop::collection::vec((any::<u16>(), any::<u8>()), 1..4)
    ) {
        let Some(mut fixture) = started() else { return Ok(()) };
        fixture.transport.suspend().unwrap();
        let mut bytes = fixture.transport.save().unwrap().to_bytes("probe").unwrap();
        for (at, value) in flips {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let Some(mut fresh) = Fixture::new(false) else { return Ok(()) };
        if let Ok(envelope) = Envelope::from_bytes("probe", &bytes)
            && fresh.transport.restore(&envelope).is_ok()
        {
            fresh.transport.save().unwrap();
            let _ = fresh.transport.resume();
        }
    }
}

#[test]
fn a_device_goes_on_where_it_was_with_each_queue_notified_and_its_vector_raised() {
    let Some(mut fixture) = started() else { return };
    let mut saved = save(&mut fixture);
    let active = saved.device.active.as_mut().unwrap();
    active.queues[1] = QueueProgress {
        index: 1,
        next_avail: 9,
        next_used: 7,
    };
    let Some(mut fresh) = Fixture::new(false) else {
        return;
    };
    restore(&mut fresh, &saved).unwrap();
    assert!(fresh.active.lock().unwrap().is_none(), "not before it is resumed");
    assert_eq!(fresh.read(PENDING, 8), 0);
    assert_eq!(fresh.transport.registered, fixture.transport.registered);
    assert!(
        fresh.transport.registered.is_some(),
        "KVM raises notifications again"
    );
    fresh.transport.resume().unwrap();
    {
        let active = fresh.active.lock().unwrap();
        let active = active.as_ref().unwrap();
        assert!(active.restored);
        assert_eq!(active.features, VERSION_1 | FEATURE);
        let progress: Vec<_> = active
            .queues
            .iter()
            .map(|queue| QueueProgress::of(queue.index, &queue.queue))
            .collect();
        assert_eq!(progress, saved.device.active.as_ref().unwrap().queues);
        let raised = |event: &EventFd| event.read().unwrap();
        assert!(active.queues.iter().all(|queue| raised(&queue.notify) == 1));
    }
    assert_eq!(
        fresh.read(PENDING, 8),
        0b110,
        "the vectors are masked, so that they pend"
    );
    // A driver that rings the bell reaches the device, and may reset it.
    fresh.write(NOTIFY, 2, 0);
    fresh.write(0x14, 1, 0);
    assert!(fresh.active.lock().unwrap().is_none());
}

#[test]
fn a_running_function_is_not_saved() {
    let Some(fixture) = started() else { return };
    let error = fixture.transport.save().unwrap_err().to_string();
    assert!(error.contains("probe") && error.contains("suspend"), "{error}");
}

#[test]
fn states_that_cannot_be_are_refused_by_what_does_not_fit() {
    type Damage = fn(&mut FunctionState);
    fn queue(state: &mut FunctionState) -> &mut crate::virtio::transport::QueueSetup {
        &mut state.registers.queues[0]
    }
    fn progress(state: &mut FunctionState) -> &mut Vec<QueueProgress> {
        &mut state.device.active.as_mut().unwrap().queues
    }
    let damages: [(&str, Damage); 24] = [
        ("cannot have 0 entries", |s| queue(s).size = 0),
        ("cannot have 96 entries", |s| queue(s).size = 96),
        ("cannot have 512 entries", |s| queue(s).size = 512),
        ("outside of RAM", |s| queue(s).descriptors = 0xffff_ffff_0000),
        ("outside of RAM", |s| queue(s).device = (16 << 20) - 8),
        ("wrongly", |s| queue(s).descriptors |= 8),
        ("wrongly", |s| queue(s).driver |= 1),
        ("no MSI-X vector 3 for queue 0", |s| queue(s).vector = 3),
        ("no MSI-X vector 7", |s| s.registers.config_vector = 7),
        ("progress of queue 0 is missing", |s| drop(progress(s).drain(..1))),
        ("has not enabled", |s| s.registers.queues[1].enabled = false),
        ("has not enabled", |s| {
            let again = progress(s)[1];
            progress(s).push(again);
        }),
        ("2 queues, not 1", |s| s.registers.queues.truncate(1)),
        ("features", |s| s.registers.driver_features |= 1 << 40),
        ("features", |s| s.registers.driver_features = FEATURE),
        ("status", |s| s.registers.status &= !STATUS_DRIVER_OK),
        ("status", |s| s.registers.status &= !STATUS_FEATURES_OK),
        ("status", |s| s.device.active = None),
        ("were not returned", |s| progress(s)[0].next_avail = 129),
        ("another function (offset 0x2)", |s| s.config_space[2] ^= 1),
        ("0 bytes where", |s| s.config_space.clear()),
        ("MSI-X control", |s| s.msix.control = 0),
        ("2 MSI-X vectors", |s| s.msix.entries.truncate(2)),
        ("of type 2, not 1", |s| s.device.kind = 1),
    ];
    let Some(mut fixture) = started() else { return };
    let saved = save(&mut fixture);
    let Some(mut fresh) = Fixture::new(false) else {
        return;
    };
    let before = {
        fresh.transport.suspend().unwrap();
        fresh.transport.save().unwrap()
    };
    for (reason, damage) in damages {
        let mut state = saved.clone();
        damage(&mut state);
        let error = restore(&mut fresh, &state).unwrap_err().to_string();
        assert!(
            error.contains(reason) && error.starts_with("probe: "),
            "{reason}: {error}"
        );
        assert_eq!(
            fresh.transport.save().unwrap(),
            before,
            "{reason}: nothing was changed"
        );
    }
    let mut other = saved.clone();
    other.device.config[0] ^= 1;
    let error = restore(&mut fresh, &other).unwrap_err().to_string();
    assert!(error.contains("size of the disk"), "{error}");
    let own = Envelope::seal("probe", &saved).unwrap();
    let mut foreign = saved;
    foreign.device.active.as_mut().unwrap().own = Some(own);
    let error = restore(&mut fresh, &foreign).unwrap_err().to_string();
    assert!(error.contains("nothing of its own"), "{error}");
    let newer = Envelope::raw(2, Vec::new());
    let error = fresh.transport.restore(&newer).unwrap_err().to_string();
    assert!(error.contains("version 2"), "{error}");
}
