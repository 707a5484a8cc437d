//! Container images from static binaries: an OCI layout, made without a container engine. The same binaries give the same
//! bytes.
#![forbid(unsafe_code)]

mod definition;
mod elf;
mod error;
pub mod layer;
mod layout;

pub use definition::Image;
pub use error::Error;
pub use layout::{Identity, Layout};
