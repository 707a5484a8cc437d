//! Frames: a length (u32, little-endian) and that many bytes of CBOR (RFC 8949).

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest frame body in bytes. Data chunks are at most [`crate::MAX_DATA`], which leaves room for the
/// largest entry's metadata.
pub const MAX_FRAME: usize = 512 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two frames.
    #[error("the peer closed the session")]
    Closed,
    /// The stream failed, or ended within a frame.
    #[error("the session failed: {0}")]
    Io(#[from] io::Error),
    /// The peer announced a frame beyond [`MAX_FRAME`], or ours would be.
    #[error("a frame of {0} bytes is beyond the limit of {MAX_FRAME}")]
    TooLarge(usize),
    /// The body is not what this version expects.
    #[error("a frame could not be decoded: {0}")]
    Malformed(String),
}

/// Writes one frame with a single write call.
pub fn write_frame<M: Serialize>(writer: &mut impl Write, message: &M) -> Result<(), FrameError> {
    let mut buffer = vec![0u8; 4];
    ciborium::into_writer(message, &mut buffer).map_err(|e| FrameError::Malformed(e.to_string()))?;
    let length = buffer.len() - 4;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    buffer[..4].copy_from_slice(&(length as u32).to_le_bytes());
    writer.write_all(&buffer)?;
    Ok(())
}

/// Reads one frame. Memory is bounded by [`MAX_FRAME`], whatever the peer announces.
pub fn read_frame<M: DeserializeOwned>(reader: &mut impl Read) -> Result<M, FrameError> {
    let mut header = [0u8; 4];
    let mut got = 0;
    while got < header.len() {
        match reader.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    let mut body = vec![0u8; length];
    reader.read_exact(&mut body)?;
    ciborium::de::from_reader_with_recursion_limit(body.as_slice(), 32)
        .map_err(|e| FrameError::Malformed(e.to_string()))
}
