//! The virtio network device on taps.
