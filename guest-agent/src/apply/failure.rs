//! Why an entry was not applied: the clone is unable, or what it builds on is not here.

use std::io;

/// Why an entry was not applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Io(io::Error),
    #[error("{0}")]
    Unit(String),
    #[error("{0}")]
    Misfit(&'static str),
    /// To be sent again, and to be taken by its path then.
    #[error("its directory is not known")]
    Stranger,
}

/// Whether an error tells that what is there is not what the entry builds on, and not that the clone is unable.
pub(super) fn is_misfit(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENOENT
                | libc::ENOTDIR
                | libc::EISDIR
                | libc::EEXIST
                | libc::ENOTEMPTY
                | libc::ELOOP
                | libc::EINVAL
                | libc::ESTALE
                | libc::EXDEV
                | libc::EBUSY
        )
    )
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
