//! The virtio block device, its raw files and its copy-on-write layers.
