//! Control API of the VMM.
