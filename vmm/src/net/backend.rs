//! Where an interface leads to now, and how that is changed while the guest runs.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};
use vmm_sys_util::eventfd::EventFd;

use super::NetError;
use super::handover::{GivenTap, into_tap};
use super::isolated::Isolated;
use super::tap::{HEADER, TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, Tap};
use crate::virtio::buffers::Buffers;

/// Where frames go.
#[derive(Debug)]
pub(super) enum Backend {
    /// To the guest's network.
    Tap(Tap),
    /// To the agent's responder.
    Isolated(Isolated),
    /// Nowhere: the tap belongs to another VMM, and is kept so that it can be given again, or taken back.
    Given(Tap),
}

impl Backend {
    /// What is polled for frames.
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Backend::Tap(tap) => Some(tap.fd()),
            Backend::Isolated(isolated) => Some(isolated.fd()),
            Backend::Given(_) => None,
        }
    }
}

/// What the device, its thread and its handle share.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) tap_name: String,
    pub(super) index: u16,
    pub(super) mac: [u8; 6],
    /// Held while frames are moved, so that a change of the backend is complete when it returns.
    backend: Mutex<Arc<Backend>>,
    /// Tells the thread that the backend has changed.
    pub(super) changed: EventFd,
    /// Features the driver negotiated; 0 while there is none.
    pub(super) features: AtomicU64,
    first_sent: AtomicU64,
    last_sent: AtomicU64,
}

impl Shared {
    pub(super) fn new(
        index: u16,
        tap_name: &str,
        mac: [u8; 6],
        backend: Backend,
        changed: EventFd,
    ) -> Shared {
        Shared {
            name: format!("net{index}"),
            tap_name: tap_name.to_owned(),
            index,
            mac,
            backend: Mutex::new(Arc::new(backend)),
            changed,
            features: AtomicU64::new(0),
            first_sent: AtomicU64::new(0),
            last_sent: AtomicU64::new(0),
        }
    }

    pub(super) fn backend(&self) -> MutexGuard<'_, Arc<Backend>> {
        // The lock guards a pointer, which is whole at any time.
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies what the driver has negotiated to the tap.
    pub(super) fn configure(&self) -> io::Result<()> {
        match self.backend().as_ref() {
            Backend::Tap(tap) => tap.configure(offloads(self.features.load(Ordering::Acquire))),
            _ => Ok(()),
        }
    }

    /// Sends a frame in the guest's name, so that bridges learn at once where its address lives now, even
    /// before the guest says anything.
    pub(super) fn announce(&self) {
        if let Backend::Tap(tap) = self.backend().as_ref() {
            let mut frame = rarp(self.mac);
            if let Err(error) = tap.send(&Buffers::from_slice(&mut frame)) {
                tracing::warn!(device = self.name, %error, "cannot announce the interface");
            }
        }
    }

    /// Notes that the guest has sent a frame.
    pub(super) fn note_sent(&self) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros() as u64);
        // The first since the backend was attached.
        let _ = self
            .first_sent
            .compare_exchange(0, now, Ordering::AcqRel, Ordering::Relaxed);
        self.last_sent.store(now, Ordering::Release);
    }
}

/// What the guest can take, in the tap's words.
fn offloads(features: u64) -> libc::c_uint {
    [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    ]
    .into_iter()
    .filter(|(bit, _)| features & (1 << bit) != 0)
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// The control API's hold of an interface; the device itself belongs to the transport.
#[derive(Clone)]
pub struct NetHandle {
    pub(super) shared: Arc<Shared>,
}

impl NetHandle {
    /// Index among the guest's interfaces.
    pub fn index(&self) -> u16 {
        self.shared.index
    }

    /// Whether frames go to the agent's responder.
    pub fn is_isolated(&self) -> bool {
        matches!(self.shared.backend().as_ref(), Backend::Isolated(_))
    }

    /// When the guest sent its first frame since the interface was attached, and its latest one, in
    /// microseconds of CLOCK_REALTIME; `None` before that.
    pub fn frames_sent_at(&self) -> Option<(u64, u64)> {
        let first = self.shared.first_sent.load(Ordering::Acquire);
        (first != 0).then(|| (first, self.shared.last_sent.load(Ordering::Acquire)))
    }

    /// Attaches a tap that the old owner has given.
    pub fn attach(&self, given: GivenTap) -> Result<(), NetError> {
        if given.mac != self.shared.mac {
            return Err(self.error("attaching", "the tap of another MAC address was given"));
        }
        let tap = into_tap(given).map_err(|source| self.error("attaching", source))?;
        self.attach_tap(tap)
    }

    /// Opens the tap by its name, where the old owner is gone.
    pub fn open(&self) -> Result<(), NetError> {
        let tap = Tap::open(&self.shared.tap_name).map_err(|source| self.error("opening", source))?;
        self.attach_tap(tap)
    }

    fn attach_tap(&self, tap: Tap) -> Result<(), NetError> {
        let offloads = offloads(self.shared.features.load(Ordering::Acquire));
        tap.configure(offloads)
            .map_err(|source| self.error("setting up", source))?;
        self.replace(Backend::Tap(tap));
        self.shared.announce();
        Ok(())
    }

    /// Makes the interface's tap ready to be given away: no frame passes any more when this returns.
    pub fn detach(&self) -> Result<GivenTap, NetError> {
        let current = self.shared.backend().clone();
        let tap = match current.as_ref() {
            Backend::Tap(tap) | Backend::Given(tap) => tap,
            Backend::Isolated(_) => return Err(self.error("giving away", "it is isolated and has no tap")),
        };
        let duplicate = || {
            tap.try_clone()
                .map_err(|source| self.error("giving away", source))
        };
        let (fd, kept) = (duplicate()?, duplicate()?);
        let kept = Tap::from_fd(kept).map_err(|source| self.error("giving away", source))?;
        self.replace(Backend::Given(kept));
        Ok(GivenTap {
            index: self.shared.index,
            mac: self.shared.mac,
            features: self.shared.features.load(Ordering::Acquire),
            fd,
        })
    }

    /// Uses the tap again that was given away, and is not used by whom it was given to any more. `false` where
    /// none was given.
    pub fn take_back(&self) -> Result<bool, NetError> {
        let current = self.shared.backend().clone();
        let Backend::Given(kept) = current.as_ref() else {
            return Ok(false);
        };
        let tap = kept
            .try_clone()
            .and_then(Tap::from_fd)
            .map_err(|source| self.error("taking back", source))?;
        self.attach_tap(tap)?;
        Ok(true)
    }

    fn replace(&self, backend: Backend) {
        self.shared.first_sent.store(0, Ordering::Release);
        *self.shared.backend() = Arc::new(backend);
        // An eventfd refuses a write only when it is raised already.
        let _ = self.shared.changed.write(1);
    }

    fn error(
        &self,
        action: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> NetError {
        NetError {
            action,
            interface: self.shared.name.clone(),
            tap: PathBuf::from(&self.shared.tap_name),
            source: io::Error::other(source),
        }
    }
}

/// A reverse ARP request for one's own address (RFC 903), as hypervisors send it after a migration: a
/// broadcast that says nothing but where the MAC address is. With the virtio-net header.
fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x80, 0x35]);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.resize(HEADER + 60, 0);
    frame
}
