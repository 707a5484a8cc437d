//! The images: what is in them, and who runs it.

use clap::ValueEnum;

/// An image that we make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Image {
    /// The operator.
    Operator,
    /// The node agent with the VMM, as the DaemonSet's Pod installs them on the host.
    Agent,
}

impl Image {
    /// All of them.
    pub const ALL: [Image; 2] = [Image::Operator, Image::Agent];

    /// The last part of its name; the chart's default.
    pub fn name(self) -> &'static str {
        match self {
            Image::Operator => "understudy-operator",
            Image::Agent => "understudy-node",
        }
    }

    /// For people.
    pub fn description(self) -> &'static str {
        match self {
            Image::Operator => "Operator of Understudy",
            Image::Agent => "Node agent and VMM of Understudy, for the host that its Pod runs on",
        }
    }

    /// Its binaries, which lie at its root: there is nothing else. The first one is the entry point.
    pub fn binaries(self) -> &'static [&'static str] {
        match self {
            Image::Operator => &["understudy"],
            Image::Agent => &["understudy-node", "understudy-vmm"],
        }
    }

    /// Who runs it. The agent's Pod installs the host service, which takes root.
    pub fn user(self) -> &'static str {
        match self {
            Image::Operator => "65532:65532",
            Image::Agent => "0:0",
        }
    }
}
