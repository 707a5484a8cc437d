//! `understudy-image`: an OCI layout with the images of operator and node agent.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use jiff::Timestamp;

use understudy_image::{Error, Identity, Image, Layout, layer};

/// Makes an OCI layout (a tar) with the images of operator and node agent from their static binaries.
///
/// The same binaries give the same bytes. `ctr images import`, `nerdctl load`, `podman load` and `skopeo copy
/// oci-archive:` read the file.
#[derive(Debug, Parser)]
#[command(name = "understudy-image", version)]
struct Arguments {
    /// Where the static binaries are
    #[arg(long, value_name = "DIR")]
    binaries: PathBuf,
    /// The file that is written
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Registry and path that the images' names begin with; the chart's `image.registry`
    #[arg(long, default_value = "understudy.dev")]
    registry: String,
    /// Tag of the images; the chart takes its appVersion where it is told nothing else
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Revision of the source, for the images' annotations
    #[arg(long)]
    revision: Option<String>,
    /// Seconds since 1970 that everything in the images is dated
    #[arg(long, env = "SOURCE_DATE_EPOCH", default_value = "0", value_name = "SECONDS", value_parser = seconds)]
    source_date_epoch: Timestamp,
    /// Images to make; none: all of them
    #[arg(value_enum)]
    images: Vec<Which>,
}

/// An image that is released.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Which {
    /// The operator.
    Operator,
    /// The node agent with the VMM.
    Agent,
}

impl Which {
    fn image(self) -> Image {
        match self {
            Which::Operator => Image::OPERATOR,
            Which::Agent => Image::AGENT,
        }
    }
}

fn seconds(text: &str) -> Result<Timestamp, String> {
    let seconds: u32 = text
        .parse()
        .map_err(|_| "a number of seconds since 1970".to_owned())?;
    Timestamp::from_second(seconds.into()).map_err(|error| error.to_string())
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut images: Vec<Image> = arguments.images.iter().map(|which| which.image()).collect();
    if images.is_empty() {
        images.extend(Image::ALL);
    }
    let mut layout = Layout::new(arguments.source_date_epoch);
    for image in images {
        let layer = layer::build(image, &arguments.binaries, arguments.source_date_epoch)?;
        let identity = Identity {
            reference: format!("{}/{}:{}", arguments.registry, image.name, arguments.tag),
            version: arguments.tag.clone(),
            revision: arguments.revision.clone(),
        };
        let digest = layout.add(image, layer, &identity)?;
        println!("{} {digest}", identity.reference);
    }
    layout.write(&arguments.output)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("understudy-image: {error}");
            ExitCode::FAILURE
        }
    }
}
