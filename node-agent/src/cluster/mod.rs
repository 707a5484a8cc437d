//! The agent on a cluster. Objects that the operator assigns to this node are mirrored from the API server into the
//! store of files that engines read and write as they do stand-alone; what they report there is written back. So the
//! API server may be away: guests and operations go on, and what happened is told when it is back.

pub mod access;
pub mod kinds;
pub mod link;
pub mod mirror;
mod objects;
pub mod released;
pub mod reports;

pub use access::Access;
pub use link::{Health, Link};
pub use objects::{Cluster, named, orphans};
