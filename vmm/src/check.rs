//! Whether this host can run stock kernels.

use std::error::Error;

/// Tells it on stdout.
pub fn report() -> Result<bool, Box<dyn Error>> {
    Ok(false)
}
