//! The virtio socket device (virtio 1.2, 5.10), multiplexed to Unix sockets.
//!
//! A program of the host connects to the device's socket, writes `CONNECT <port>\n` and reads
//! `OK <n>\n` once the guest has accepted; what the guest connects to on CID 2, port N, goes to the
//! listener at `<socket>_<N>`. While no driver runs in the guest, connections wait unanswered; a reset of
//! the driver or machine ends all that there are.

mod connection;
mod mux;
mod packet;

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use understudy_vmm_control::config;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::mux::Mux;
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use crate::virtio::ring::{Ring, read_config_bytes};
use crate::virtio::worker::Worker;

/// Device type (virtio 1.2, 5.10.1).
const DEVICE_TYPE: u32 = 19;

/// Sizes of the receive, transmit and event queues.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

const NAME: &str = "vsock";

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
    worker: Option<Worker<Vec<ActiveQueue>>>,
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
            worker: None,
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
        } = activation;
        let got = queues.len();
        let Ok([rx, tx, event]) = <[ActiveQueue; 3]>::try_from(queues) else {
            return Err(DeviceError::Queues {
                device: NAME.into(),
                got,
                needed: QUEUE_SIZES.len(),
            });
        };
        let io = |action| {
            move |source| DeviceError::Io {
                device: NAME.into(),
                action,
                source,
            }
        };
        let mux = Mux::new(
            self.cid,
            &self.socket,
            self.listener.clone(),
            Ring::new(NAME, &memory, &interrupt, rx, features),
            Ring::new(NAME, &memory, &interrupt, tx, features),
            event,
        )
        .map_err(io("making an epoll"))?;
        let worker = Worker::spawn(NAME, move |stop| mux.run(&stop)).map_err(io("starting a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "vsock_test.rs"]
mod tests;
