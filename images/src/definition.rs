//! The images: what is in them, and who runs it.

/// An image: static binaries, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// The last part of its name; the chart's default.
    pub name: &'static str,
    /// For people.
    pub description: &'static str,
    /// Its binaries, which lie at its root. The first one is the entry point.
    pub binaries: &'static [&'static str],
    /// Who runs it.
    pub user: &'static str,
}

impl Image {
    /// The operator.
    pub const OPERATOR: Image = Image {
        name: "understudy-operator",
        description: "Operator of Understudy",
        binaries: &["understudy"],
        user: "65532:65532",
    };

    /// The node agent with the VMM, as the DaemonSet's Pod installs them on the host: that takes root.
    pub const AGENT: Image = Image {
        name: "understudy-node",
        description: "Node agent and VMM of Understudy, for the host that its Pod runs on",
        binaries: &["understudy-node", "understudy-vmm"],
        user: "0:0",
    };

    /// Those that are released.
    pub const ALL: [Image; 2] = [Image::OPERATOR, Image::AGENT];
}
