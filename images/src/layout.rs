//! An OCI image layout (image-spec v1, "image-layout"), as one tar.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use jiff::Timestamp;
use oci_spec::OciSpecError;
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, HistoryBuilder, ImageConfiguration,
    ImageConfigurationBuilder, ImageIndexBuilder, ImageManifest, ImageManifestBuilder, MediaType,
    OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};

use crate::definition::Image;
use crate::error::Error;
use crate::layer::append;

/// What an image is called, and what it was made from.
pub struct Identity {
    /// Full reference: registry, name and tag.
    pub reference: String,
    /// Version of what is in it.
    pub version: String,
    /// Revision of the source.
    pub revision: Option<String>,
}

/// Images and their blobs, to be written as one tar.
pub struct Layout {
    epoch: Timestamp,
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Descriptor>,
}

impl Layout {
    /// An empty one whose every part is dated `epoch`.
    pub fn new(epoch: Timestamp) -> Layout {
        Layout {
            epoch,
            blobs: BTreeMap::new(),
            manifests: Vec::new(),
        }
    }

    /// Adds an image with its layer; returns its digest.
    pub fn add(&mut self, image: Image, layer: Vec<u8>, identity: &Identity) -> Result<String, Error> {
        let spec = |source| Error::Spec {
            image: image.name,
            source,
        };
        let layer = self.blob(MediaType::ImageLayer, layer).map_err(spec)?;
        let config = json(&configuration(image, &layer, identity, self.epoch).map_err(spec)?)?;
        let config = self.blob(MediaType::ImageConfig, config).map_err(spec)?;
        let manifest = json(&manifest(image, config, layer, identity).map_err(spec)?)?;
        let mut described = self.blob(MediaType::ImageManifest, manifest).map_err(spec)?;
        described.set_platform(Some(
            PlatformBuilder::default()
                .os(Os::Linux)
                .architecture(Arch::Amd64)
                .build()
                .map_err(spec)?,
        ));
        // containerd reads the first one, podman and skopeo the second.
        described.set_annotations(Some(HashMap::from([
            ("io.containerd.image.name".to_owned(), identity.reference.clone()),
            (
                "org.opencontainers.image.ref.name".to_owned(),
                identity.reference.clone(),
            ),
        ])));
        let digest = described.digest().to_string();
        self.manifests.push(described);
        Ok(digest)
    }

    fn blob(&mut self, kind: MediaType, content: Vec<u8>) -> Result<Descriptor, OciSpecError> {
        let digest: String = Sha256::digest(&content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let descriptor = DescriptorBuilder::default()
            .media_type(kind)
            .size(content.len() as u64)
            .digest(digest.parse::<Sha256Digest>()?)
            .build()?;
        self.blobs.insert(digest, content);
        Ok(descriptor)
    }

    /// Writes it.
    pub fn write(self, path: &Path) -> Result<(), Error> {
        let content = self.tar()?;
        let failed = |source| Error::Io {
            action: "writing",
            path: path.to_owned(),
            source,
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        // A reader sees the old file or the new one.
        let part = path.with_extension("part");
        fs::write(&part, content).map_err(failed)?;
        fs::rename(&part, path).map_err(failed)
    }

    /// Its bytes.
    pub fn tar(self) -> Result<Vec<u8>, Error> {
        let spec = |source| Error::Spec {
            image: "index",
            source,
        };
        let marker = OciLayoutBuilder::default()
            .image_layout_version("1.0.0")
            .build()
            .map_err(spec)?;
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(self.manifests)
            .build()
            .map_err(spec)?;
        let written = |source| Error::Io {
            action: "packing",
            path: "the layout".into(),
            source,
        };
        let mut tar = Builder::new(Vec::new());
        append(
            &mut tar,
            EntryType::Regular,
            0o644,
            "oci-layout",
            &json(&marker)?,
            self.epoch,
        )
        .map_err(written)?;
        append(
            &mut tar,
            EntryType::Regular,
            0o644,
            "index.json",
            &json(&index)?,
            self.epoch,
        )
        .map_err(written)?;
        for directory in ["blobs/", "blobs/sha256/"] {
            append(&mut tar, EntryType::Directory, 0o755, directory, &[], self.epoch).map_err(written)?;
        }
        for (digest, content) in &self.blobs {
            let path = format!("blobs/sha256/{digest}");
            append(&mut tar, EntryType::Regular, 0o644, &path, content, self.epoch).map_err(written)?;
        }
        tar.into_inner().map_err(written)
    }
}

fn configuration(
    image: Image,
    layer: &Descriptor,
    identity: &Identity,
    epoch: Timestamp,
) -> Result<ImageConfiguration, OciSpecError> {
    let created = epoch.to_string();
    let program = image.binaries.first().copied().unwrap_or_default();
    ImageConfigurationBuilder::default()
        .created(&created)
        .os(Os::Linux)
        .architecture(Arch::Amd64)
        .config(
            ConfigBuilder::default()
                .user(image.user)
                .entrypoint([format!("/{program}")])
                .working_dir("/")
                .labels(labels(image, identity))
                .build()?,
        )
        .rootfs(
            // The layer is not compressed, so its digest is that of its content as well.
            RootFsBuilder::default()
                .typ("layers")
                .diff_ids([layer.digest().to_string()])
                .build()?,
        )
        .history([HistoryBuilder::default()
            .created(&created)
            .created_by("understudy-image")
            .build()?])
        .build()
}

fn manifest(
    image: Image,
    config: Descriptor,
    layer: Descriptor,
    identity: &Identity,
) -> Result<ImageManifest, OciSpecError> {
    ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers([layer])
        .annotations(labels(image, identity))
        .build()
}

fn labels(image: Image, identity: &Identity) -> HashMap<String, String> {
    let mut labels = HashMap::from([
        ("org.opencontainers.image.title".to_owned(), image.name.to_owned()),
        (
            "org.opencontainers.image.description".to_owned(),
            image.description.to_owned(),
        ),
        (
            "org.opencontainers.image.version".to_owned(),
            identity.version.clone(),
        ),
        (
            "org.opencontainers.image.licenses".to_owned(),
            env!("CARGO_PKG_LICENSE").to_owned(),
        ),
    ]);
    if let Some(revision) = &identity.revision {
        labels.insert("org.opencontainers.image.revision".to_owned(), revision.clone());
    }
    labels
}

/// As JSON whose bytes depend on nothing but the values: the maps of the types have no order.
fn json(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(value)?;
    value.sort_all_objects();
    serde_json::to_vec(&value)
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
