//! Objects of the stand-alone mode: what an API server would hold, in files. Manifests come from a
//! directory ([`manifests`]), objects with UID, generation and status live in the state directory
//! ([`objects`]).

pub mod manifests;
pub mod objects;
mod source;

pub use manifests::{Problem, Scanner};
pub use objects::{Key, Mirrored, Object, Store, StoreError};
pub use source::Objects;
