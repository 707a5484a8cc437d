//! The virtio network device (virtio 1.2, 5.1): on a tap, or isolated while its guest is a clone.
//!
//! [`NetDevice`] belongs to the transport, a [`NetHandle`] to the control API, which moves the interface
//! from the agent's responder to the guest's tap at activation, and gives the tap away when the guest is
//! dormant ([`handover`]).

mod backend;
mod frames;
pub mod handover;
mod isolated;
mod tap;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use understudy_vmm_control::api::ActivateReport;
use understudy_vmm_control::config::{self, Role};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::backend::NetHandle;
use self::backend::{Backend, Shared};
use self::frames::Frames;
pub use self::handover::Handover;
use self::isolated::Isolated;
pub use self::tap::Tap;
use crate::gate::{Counters, Gates};
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, QueueProgress, VirtioDevice};
use crate::virtio::ring::{Ring, read_config_bytes};
use crate::virtio::worker::Service;

/// Device type (virtio 1.2, 5.1.1).
const DEVICE_TYPE: u32 = 1;

/// Sizes of the receive and transmit queues.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// An interface could not be made, attached or given away.
#[derive(Debug, thiserror::Error)]
#[error("{action} interface {interface} (tap {tap}): {source}")]
pub struct NetError {
    /// What was tried.
    pub action: &'static str,
    /// The interface.
    pub interface: String,
    /// Its tap.
    pub tap: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

/// One interface of the guest.
pub struct NetDevice {
    shared: Arc<Shared>,
    gates: Gates,
    counters: Arc<Counters>,
    config: [u8; 8],
    service: Service<Frames>,
}

/// Reads `aa:bb:cc:dd:ee:ff`; `None` when it is not the address of one interface.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // The lowest bit of the first byte makes it the address of a group.
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

impl NetDevice {
    /// The guest's interface number `index`: an owner's is on its tap, a clone's is isolated.
    pub fn new(
        config: &config::Network,
        index: u16,
        role: Role,
        gates: Gates,
        counters: Arc<Counters>,
    ) -> Result<NetDevice, NetError> {
        let fail = |action| {
            let (interface, tap) = (format!("net{index}"), PathBuf::from(&config.tap));
            move |source| NetError {
                action,
                interface,
                tap,
                source,
            }
        };
        let mac = parse_mac(&config.mac).ok_or_else(|| {
            fail("reading the MAC address of")(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{:?} is not a unicast MAC address such as 52:54:00:12:34:56",
                    config.mac
                ),
            ))
        })?;
        let backend = match role {
            Role::Active => Backend::Tap(Tap::open(&config.tap).map_err(fail("opening"))?),
            Role::Clone => {
                Backend::Isolated(Isolated::new(config.isolated_peer.as_deref()).map_err(fail("isolating"))?)
            }
        };
        Self::with_backend(config, index, mac, backend, gates, counters).map_err(fail("making an event for"))
    }

    fn with_backend(
        config: &config::Network,
        index: u16,
        mac: [u8; 6],
        backend: Backend,
        gates: Gates,
        counters: Arc<Counters>,
    ) -> io::Result<NetDevice> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        // MAC, then the status: the link is up.
        let mut space = [0; 8];
        space[..6].copy_from_slice(&mac);
        space[6] = 1;
        let shared = Arc::new(Shared::new(index, &config.tap, mac, backend, changed));
        Ok(NetDevice {
            service: Service::new(&shared.name),
            shared,
            gates,
            counters,
            config: space,
        })
    }

    /// The control API's hold of it.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: self.shared.clone(),
        }
    }
}

impl VirtioDevice for NetDevice {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        // The same on a tap and in isolation: the guest keeps what it negotiated when the backend changes.
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            interrupt,
            queues,
            features,
            restored,
        } = activation;
        let got = queues.len();
        let device = self.shared.name.clone();
        let Ok([rx, tx]) = <[ActiveQueue; 2]>::try_from(queues) else {
            return Err(DeviceError::Queues {
                device,
                got,
                needed: QUEUE_SIZES.len(),
            });
        };
        let io = |action| self.failed(action);
        self.shared.features.store(features, Ordering::Release);
        self.shared
            .configure()
            .map_err(io("setting the tap's offloads"))?;
        if restored {
            self.shared.announce();
        }
        let duplicate = |queue: &ActiveQueue| queue.notify.try_clone().map_err(io("duplicating an event"));
        let open_rx = self.gates.receive.subscribe(duplicate(&rx)?);
        let open_tx = self.gates.transmit.subscribe(duplicate(&tx)?);
        let frames = Frames::new(
            self.shared.clone(),
            self.gates.clone(),
            self.counters.clone(),
            Ring::new(&device, &memory, &interrupt, rx, features),
            Ring::new(&device, &memory, &interrupt, tx, features),
            features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
            [open_rx, open_tx],
        );
        let no_thread = io("starting a thread");
        self.service.start(frames).map_err(no_thread)
    }

    fn reset(&mut self) {
        self.service.stop();
        self.shared.features.store(0, Ordering::Release);
    }

    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError> {
        let frames = self.service.suspend().map_err(|source| DeviceError::Panicked {
            device: self.shared.name.clone(),
            source,
        })?;
        Ok(frames.map(Frames::progress).unwrap_or_default())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.service.resume().map_err(self.failed("starting a thread"))
    }
}

impl NetDevice {
    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> DeviceError + use<> {
        let device = self.shared.name.clone();
        move |source| DeviceError::Io {
            device: device.clone(),
            action,
            source,
        }
    }
}

/// Gives the taps of all interfaces to the new owner's handover socket. Afterwards no frame passes here;
/// asked again, the same taps are given again.
pub fn give_all(interfaces: &[NetHandle], socket: &Path) -> Result<(), NetError> {
    let taps = interfaces
        .iter()
        .map(NetHandle::detach)
        .collect::<Result<Vec<_>, _>>()?;
    handover::give(socket, &taps).map_err(|source| NetError {
        action: "giving away",
        interface: format!("all ({} taps to {})", taps.len(), socket.display()),
        tap: PathBuf::new(),
        source,
    })
}

/// Puts every isolated interface on its tap: the one that has arrived, or with `open` by its name.
pub fn attach_all(
    interfaces: &[NetHandle],
    handover: &Handover,
    open: bool,
) -> Result<ActivateReport, NetError> {
    let mut report = ActivateReport {
        taps_received: 0,
        taps_opened: 0,
    };
    for interface in interfaces {
        match handover.take(interface.index()) {
            Some(given) => {
                interface.attach(given)?;
                report.taps_received += 1;
            }
            None if open && interface.is_isolated() => {
                interface.open()?;
                report.taps_opened += 1;
            }
            None if interface.is_isolated() => {
                return Err(NetError {
                    action: "attaching",
                    interface: interface.shared.name.clone(),
                    tap: PathBuf::from(&interface.shared.tap_name),
                    source: io::Error::new(
                        io::ErrorKind::NotFound,
                        "its tap has not arrived; have the old owner give it, or ask with openTaps when that one is gone",
                    ),
                });
            }
            None => {}
        }
    }
    Ok(report)
}

/// Puts every interface back on the tap that it has given away; one that has kept none is left as it is, or with
/// `open` opened by its name.
pub fn take_back_all(interfaces: &[NetHandle], open: bool) -> Result<ActivateReport, NetError> {
    let mut report = ActivateReport {
        taps_received: 0,
        taps_opened: 0,
    };
    for interface in interfaces {
        if interface.take_back()? {
            report.taps_received += 1;
        } else if open && interface.is_isolated() {
            interface.open()?;
            report.taps_opened += 1;
        }
    }
    Ok(report)
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;
