//! The virtio socket device (virtio 1.2, 5.10), multiplexed to Unix sockets.
//!
//! A program of the host connects to the device's socket, writes `CONNECT <port>\n` and reads
//! `OK <n>\n` once the guest has accepted; what the guest connects to on CID 2, port N, goes to the
//! listener at `<socket>_<N>`. While no driver runs in the guest, connections wait unanswered; a reset of
//! the driver or machine ends all that there are. So does the resuming of a saved session: the guest is told
//! by a transport reset, connects anew, and its listeners stay.

mod connection;
mod events;
mod mux;
mod packet;

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_vmm_control::config;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::events::Events;
use self::mux::{FIRST_HOST_PORT, Mux};
use crate::persist::{Envelope, State, StateError, ensure};
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, QueueProgress, VirtioDevice};
use crate::virtio::ring::{Ring, read_config_bytes};
use crate::virtio::worker::Service;

/// Device type (virtio 1.2, 5.10.1).
const DEVICE_TYPE: u32 = 19;

/// Sizes of the receive, transmit and event queues.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

const NAME: &str = "vsock";

/// How long a resumed guest's driver may take to hear that its connections are gone, before new ones begin.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the device keeps beyond its queues' progress, version 1. Connections are not kept: the host's ends of
/// them are programs that are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockState {
    /// Host port of the next connection that the host begins. It goes on, so that a new connection does not
    /// get the ports of an old one that the guest has yet to give up.
    next_port: u32,
}

impl State for VsockState {
    const VERSION: u32 = 1;
}

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// CIDs 0 to 2 and 2^32-1 are reserved (virtio 1.2, 5.10.4).
    #[error("a guest cannot have the vsock CID {0}; use one from 3 to 4294967294")]
    Cid(u64),
    /// The listening socket.
    #[error("{action} the vsock socket {path}: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The guest's sockets to the host.
pub struct VsockDevice {
    cid: u64,
    socket: PathBuf,
    listener: Arc<UnixListener>,
    service: Service<Mux>,
    /// Of a restored session, until the device is started with it.
    restored: Option<VsockState>,
    patience: Duration,
}

impl VsockDevice {
    /// Makes the device and its listening socket, replacing one that a process before left behind.
    pub fn new(config: &config::Vsock) -> Result<VsockDevice, VsockError> {
        if config.cid < 3 || config.cid >= u64::from(u32::MAX) {
            return Err(VsockError::Cid(config.cid));
        }
        let path = &config.socket;
        let fail = |action| {
            let path = path.clone();
            move |source| VsockError::Socket { action, path, source }
        };
        // Anything but a socket is not ours to remove.
        if std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
            std::fs::remove_file(path).map_err(fail("removing the old"))?;
        }
        let listener = UnixListener::bind(path).map_err(fail("binding"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(fail("restricting access to"))?;
        listener.set_nonblocking(true).map_err(fail("setting up"))?;
        Ok(VsockDevice {
            cid: config.cid,
            socket: path.clone(),
            listener: Arc::new(listener),
            service: Service::new(NAME),
            restored: None,
            patience: PATIENCE,
        })
    }
}

impl VirtioDevice for VsockDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
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
        let Ok([rx, tx, event]) = <[ActiveQueue; 3]>::try_from(queues) else {
            return Err(DeviceError::Queues {
                device: NAME.into(),
                got,
                needed: QUEUE_SIZES.len(),
            });
        };
        let next_port = self.restored.take().map(|state| state.next_port);
        let mux = Mux::new(
            self.cid,
            &self.socket,
            self.listener.clone(),
            Ring::new(NAME, &memory, &interrupt, rx, features),
            Ring::new(NAME, &memory, &interrupt, tx, features),
            Events::new(
                Ring::new(NAME, &memory, &interrupt, event, features),
                restored.then_some(self.patience),
            ),
            next_port.unwrap_or(FIRST_HOST_PORT),
        )
        .map_err(failed("making an epoll"))?;
        self.service.start(mux).map_err(failed("starting a thread"))
    }

    fn reset(&mut self) {
        self.service.stop();
        self.restored = None;
    }

    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError> {
        let mux = self.service.suspend().map_err(|source| DeviceError::Panicked {
            device: NAME.into(),
            source,
        })?;
        Ok(mux.map(Mux::progress).unwrap_or_default())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.service.resume().map_err(failed("starting a thread"))
    }

    fn save(&self) -> Result<Option<Envelope>, StateError> {
        let state = match self.service.suspended() {
            Some(mux) => Some(VsockState {
                next_port: mux.next_port(),
            }),
            None => self.restored,
        };
        state.map(|state| Envelope::seal(NAME, &state)).transpose()
    }

    fn restore(&mut self, own: Option<&Envelope>, _queues: &[QueueProgress]) -> Result<(), StateError> {
        let own = own.ok_or_else(|| StateError::unfit(NAME, "it lacks the port of the next connection"))?;
        let state: VsockState = own.open(NAME)?;
        ensure(state.next_port >= FIRST_HOST_PORT, NAME, || {
            format!("port {} is not one of the host's connections", state.next_port)
        })?;
        self.restored = Some(state);
        Ok(())
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Io {
        device: NAME.into(),
        action,
        source,
    }
}

#[cfg(test)]
#[path = "vsock_test.rs"]
mod tests;
