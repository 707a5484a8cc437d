//! The one layer of an image: a tar of its binaries whose bytes depend on nothing but them.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use jiff::Timestamp;
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::definition::Image;
use crate::elf;
use crate::error::Error;

/// The tar of `image`, from the binaries in `folder`, everything dated `epoch`.
pub fn build(image: Image, folder: &Path, epoch: Timestamp) -> Result<Vec<u8>, Error> {
    let mut tar = Builder::new(Vec::new());
    tar.mode(HeaderMode::Deterministic);
    let written = |source| Error::Io {
        action: "packing",
        path: image.name.into(),
        source,
    };
    let mut names = image.binaries.to_vec();
    names.sort_unstable();
    for name in names {
        let path = folder.join(name);
        let content = read(&path)?;
        elf::check_static(&content).map_err(|what| Error::NotStatic { path, what })?;
        append(&mut tar, EntryType::Regular, 0o755, name, &content, epoch).map_err(written)?;
    }
    tar.into_inner().map_err(written)
}

/// Appends one entry: root's, dated `epoch`.
pub(crate) fn append(
    tar: &mut Builder<Vec<u8>>,
    kind: EntryType,
    mode: u32,
    path: &str,
    content: &[u8],
    epoch: Timestamp,
) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    // The type has no time before 1970; the command line has none either.
    header.set_mtime(u64::try_from(epoch.as_second()).unwrap_or(0));
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, path, content)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::Missing {
            path: path.to_owned(),
        },
        _ => Error::Io {
            action: "reading",
            path: path.to_owned(),
            source,
        },
    };
    let mut content = Vec::new();
    fs::File::open(path)
        .map_err(failed)?
        .read_to_end(&mut content)
        .map_err(failed)?;
    Ok(content)
}
