//! The virtio socket device, multiplexed to Unix sockets.
