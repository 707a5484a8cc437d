//! A dirty set as the kernel tells it: names in directories and inodes, all by handle.
//!
//! It is kept so between rounds, and looked up anew in each (see [`crate::plan`]): a directory that was moved
//! in between takes what changed in it along, deletions among it.

use std::collections::{HashMap, HashSet};

use crate::sys::handle::Handle;

/// What is known of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The name came, went or was renamed: its directory changed, too.
    pub structural: bool,
    /// The name took part in a rename: if it is a directory now, its whole tree moved with it.
    pub tree: bool,
}

impl Change {
    /// Both together.
    pub fn merge(&mut self, other: Self) {
        self.structural |= other.structural;
        self.tree |= other.tree;
    }
}

/// What is known of a changed name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// What happened to it.
    pub change: Change,
    /// Inodes that it stood for then. By now they may have other names only: a file that is written through
    /// a name that is deleted afterwards has changed under its other ones, too.
    pub inodes: HashSet<Handle>,
}

/// Changed names by name; the empty one is the directory itself.
pub type Names = HashMap<Vec<u8>, Mark>;

/// A dirty set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Per file system and directory.
    pub names: HashMap<(usize, Handle), Names>,
    /// Inodes whose name the kernel did not tell.
    pub inodes: HashSet<(usize, Handle)>,
}

impl Marks {
    /// Notes that `name` in a directory changed.
    pub fn mark(&mut self, fs: usize, folder: Handle, name: Vec<u8>, change: Change) -> &mut Mark {
        let mark = self
            .names
            .entry((fs, folder))
            .or_default()
            .entry(name)
            .or_default();
        mark.change.merge(change);
        mark
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: Self) {
        for ((fs, folder), names) in other.names {
            let known = self.names.entry((fs, folder)).or_default();
            for (name, mark) in names {
                let both = known.entry(name).or_default();
                both.change.merge(mark.change);
                both.inodes.extend(mark.inodes);
            }
        }
        self.inodes.extend(other.inodes);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.values().map(HashMap::len).sum::<usize>() + self.inodes.len()
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.names.values().all(HashMap::is_empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_merged_keeps_all_that_either_knew() {
        let handle = |byte| Handle {
            kind: 1,
            bytes: vec![byte],
        };
        let moved = Change {
            structural: true,
            tree: true,
        };
        let mut marks = Marks::default();
        marks
            .mark(0, handle(1), b"a".to_vec(), Change::default())
            .inodes
            .insert(handle(7));
        let mut other = Marks::default();
        other
            .mark(0, handle(1), b"a".to_vec(), moved)
            .inodes
            .insert(handle(8));
        other.mark(0, handle(2), Vec::new(), Change::default());
        other.inodes.insert((1, handle(9)));
        marks.merge(other);
        let mark = &marks.names[&(0, handle(1))][&b"a"[..]];
        assert_eq!(mark.change, moved);
        assert_eq!(mark.inodes, HashSet::from([handle(7), handle(8)]));
        assert_eq!(marks.len(), 3);
        assert!(!marks.is_empty() && Marks::default().is_empty());
    }
}
