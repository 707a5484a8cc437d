//! Why an image could not be made.

use std::io;
use std::path::PathBuf;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A binary is missing.
    #[error("{path} is missing: build it first, `make image` does")]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A file is no static binary.
    #[error(
        "{path} {what}: the images hold nothing but static binaries; build with `-C target-feature=+crt-static`, as `make image` does"
    )]
    NotStatic {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A part of the image is not as its specification has it.
    #[error("describing the image {image}: {source}")]
    Spec {
        /// Name of the image.
        image: &'static str,
        /// Why.
        source: oci_spec::OciSpecError,
    },
    /// A part of the image could not be written as JSON.
    #[error("writing a description as JSON: {0}")]
    Json(#[from] serde_json::Error),
}
