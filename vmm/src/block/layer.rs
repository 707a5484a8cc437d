//! One copy-on-write layer: a sparse data file at identical offsets and a map of its blocks.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::error::DiskError;
use super::map::BlockMap;
use super::map_format::{FormatError, MAP_VERSION, MapHeader, SLOT, file_size};
use super::storage::{Access, Directory, Lock, Storage};
use crate::virtio::buffers::Buffers;

/// An open layer.
pub(super) struct Layer {
    pub(super) header: MapHeader,
    pub(super) data: Arc<dyn Storage>,
    pub(super) map: BlockMap,
}

/// What a new layer lies upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Below {
    /// The layer below; `None`: the source.
    pub(super) parent: Option<Uuid>,
    /// Its write session.
    pub(super) session: u64,
    /// Size of the disk.
    pub(super) size: u64,
}

fn data_name(uuid: Uuid) -> String {
    format!("{uuid}.layer")
}

fn map_name(uuid: Uuid) -> String {
    format!("{uuid}.map")
}

impl Layer {
    /// Makes an empty layer durably, in time that does not depend on the disk's size. One that exists already
    /// is replaced if nothing was ever written to it, and refused otherwise.
    pub(super) fn create(directory: &dyn Directory, uuid: Uuid, below: Below) -> Result<(), DiskError> {
        let (data, map) = (data_name(uuid), map_name(uuid));
        let temporary = format!("{map}.new");
        let path = directory.path(&map);
        let io = |action| DiskError::io(action, path.clone());
        match Self::open(directory, uuid, Access::Read) {
            Ok(layer) if layer.below() == below && layer.map.present() == 0 => return Ok(()),
            Ok(layer) if layer.map.present() > 0 => {
                return Err(DiskError::Conflict {
                    disk: directory.source_path().display().to_string(),
                    reason: format!(
                        "layer {uuid} exists and holds data; choose a UUID that was not used yet"
                    ),
                });
            }
            Ok(_) => {}
            Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // The map is renamed into place last, so that a map which exists belongs to a whole layer.
        for name in [&map, &data, &temporary] {
            directory.remove(name).map_err(io("removing the remains of"))?;
        }
        directory
            .create(&data, below.size)
            .and_then(|file| file.sync())
            .map_err(DiskError::io("creating", directory.path(&data)))?;
        let header = MapHeader {
            generation: 1,
            uuid,
            parent: below.parent,
            parent_session: below.session,
            size: below.size,
            session: 0,
        };
        directory
            .create(&temporary, file_size(below.size))
            .and_then(|file| write_header(file.as_ref(), &header))
            .map_err(io("creating"))?;
        directory.rename(&temporary, &map).map_err(io("creating"))?;
        directory.sync().map_err(io("creating"))
    }

    /// Opens a layer and checks its map.
    pub(super) fn open(directory: &dyn Directory, uuid: Uuid, access: Access) -> Result<Layer, DiskError> {
        let path = directory.path(&map_name(uuid));
        let io = |action| DiskError::io(action, path.clone());
        let storage = directory
            .open(&map_name(uuid), access)
            .map_err(io("opening the map of a layer"))?;
        let mut slots = vec![0; 2 * SLOT as usize];
        let damaged = |reason: String| DiskError::Damaged {
            path: path.clone(),
            reason,
        };
        match storage.read(&Buffers::from_slice(&mut slots), 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(damaged("it is cut short".into()));
            }
            other => other.map_err(io("reading"))?,
        }
        let header = MapHeader::decode(&slots).map_err(|error| match error {
            FormatError::Damaged(reason) => damaged(reason),
            FormatError::Version(found) => DiskError::Version {
                path: path.clone(),
                found,
                known: MAP_VERSION,
            },
        })?;
        if header.uuid != uuid {
            return Err(damaged(format!("it is the map of layer {}", header.uuid)));
        }
        let size = storage.size().map_err(io("finding the size of"))?;
        if size != file_size(header.size) {
            return Err(damaged(format!(
                "it has {size} bytes where {} are needed",
                file_size(header.size)
            )));
        }
        let data_path = directory.path(&data_name(uuid));
        let data = directory
            .open(&data_name(uuid), access)
            .map_err(DiskError::io("opening the data of a layer", data_path.clone()))?;
        let size = data
            .size()
            .map_err(DiskError::io("finding the size of", data_path.clone()))?;
        if size != header.size {
            return Err(DiskError::Damaged {
                path: data_path,
                reason: format!("it has {size} bytes where {} are needed", header.size),
            });
        }
        let map = BlockMap::open(storage, uuid, header.size).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidData => damaged(source.to_string()),
            _ => io("reading")(source),
        })?;
        Ok(Layer { header, data, map })
    }

    pub(super) fn uuid(&self) -> Uuid {
        self.header.uuid
    }

    fn below(&self) -> Below {
        Below {
            parent: self.header.parent,
            session: self.header.parent_session,
            size: self.header.size,
        }
    }

    pub(super) fn lock(&self, directory: &dyn Directory, lock: Lock) -> Result<(), DiskError> {
        self.data
            .lock(lock)
            .map_err(DiskError::lock(directory.path(&data_name(self.uuid()))))
    }

    /// Begins a write session; to be called before the first write of an opening.
    pub(super) fn begin_session(&mut self, directory: &dyn Directory) -> Result<(), DiskError> {
        let header = MapHeader {
            session: self.header.session + 1,
            ..self.header.clone()
        };
        self.replace_header(directory, header)
    }

    /// Has the layer lie directly upon the source.
    pub(super) fn set_parent_source(
        &mut self,
        directory: &dyn Directory,
        session: u64,
    ) -> Result<(), DiskError> {
        let header = MapHeader {
            parent: None,
            parent_session: session,
            ..self.header.clone()
        };
        self.replace_header(directory, header)
    }

    /// Replaces the header durably; whatever happens, the old one or the new one is found.
    fn replace_header(&mut self, directory: &dyn Directory, header: MapHeader) -> Result<(), DiskError> {
        let header = MapHeader {
            generation: self.header.generation + 1,
            ..header
        };
        write_header(self.map.storage().as_ref(), &header).map_err(DiskError::io(
            "writing the header of",
            directory.path(&map_name(self.uuid())),
        ))?;
        self.header = header;
        Ok(())
    }
}

fn write_header(map: &dyn Storage, header: &MapHeader) -> io::Result<()> {
    map.write(&Buffers::from_slice(&mut header.encode()), header.offset())?;
    map.sync()
}

/// Removes the files of a layer that nothing refers to any more.
pub(super) fn remove(directory: &dyn Directory, uuid: Uuid) -> Result<(), DiskError> {
    // The map first: without it the layer does not exist.
    for name in [map_name(uuid), data_name(uuid)] {
        directory
            .remove(&name)
            .map_err(DiskError::io("removing", directory.path(&name)))?;
    }
    directory
        .sync()
        .map_err(DiskError::io("syncing", directory.path("")))
}

/// Whether a layer exists and holds anything.
pub(super) fn holds_data(directory: &dyn Directory, uuid: Uuid) -> Result<bool, DiskError> {
    match Layer::open(directory, uuid, Access::Read) {
        Ok(layer) => Ok(layer.map.present() > 0),
        Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
