//! What stands aside: leaves by level and age, and what is known of nodes that most have not.

use std::collections::{BTreeMap, BTreeSet};

use super::cooling::Stamp;
use crate::ids::{CLASSES, NodeId};
use crate::retention::Level;

/// What a node has that most have not.
#[derive(Clone, Copy, Default)]
pub(super) struct Extra {
    /// When its time ends; 0 is never.
    pub expires: u64,
    /// At its end it is as any other.
    pub lapses: bool,
    /// Users' pins on it or below it, which are among `Node::pins`.
    pub keeps: u32,
    /// Hints on it or below it, which are among `Node::pins`, too.
    pub hints: u32,
}

/// All that is known of levels, empty while nobody speaks of any.
#[derive(Default)]
pub(super) struct Aside {
    /// Unpinned leaves that stand aside, by level and age.
    leaves: BTreeMap<Level, BTreeSet<(Stamp, NodeId)>>,
    /// By node; shorter than the slab.
    extras: Vec<Extra>,
    /// Nodes of the tree whose time ends.
    expiring: BTreeSet<(u64, NodeId)>,
    /// Pages that users pin, by class.
    pub kept: [u32; CLASSES],
    /// Pages that hints hold, whoever else does.
    pub hinted: usize,
}

impl Aside {
    pub(super) fn extra(&self, node: NodeId) -> Extra {
        self.extras.get(node.index()).copied().unwrap_or_default()
    }

    pub(super) fn extra_mut(&mut self, node: NodeId) -> &mut Extra {
        if self.extras.len() <= node.index() {
            self.extras.resize(node.index() + 1, Extra::default());
        }
        &mut self.extras[node.index()]
    }

    pub(super) fn contains(&self, level: Level, stamp: Stamp, node: NodeId) -> bool {
        self.leaves.get(&level).is_some_and(|leaves| leaves.contains(&(stamp, node)))
    }

    pub(super) fn num_leaves(&self) -> usize {
        self.leaves.values().map(BTreeSet::len).sum()
    }

    pub(super) fn expiring(&self) -> impl ExactSizeIterator<Item = (u64, NodeId)> {
        self.expiring.iter().copied()
    }

    /// Bytes owned, a node's entry taken as 1.5.
    pub(super) fn bytes(&self) -> usize {
        self.extras.capacity() * size_of::<Extra>()
            + (self.num_leaves() + self.expiring.len()) * size_of::<(u64, NodeId)>() * 3 / 2
    }

    pub(super) fn insert(&mut self, level: Level, stamp: Stamp, node: NodeId) {
        self.leaves.entry(level).or_default().insert((stamp, node));
    }

    pub(super) fn remove(&mut self, level: Level, stamp: Stamp, node: NodeId) {
        if let Some(leaves) = self.leaves.get_mut(&level)
            && leaves.remove(&(stamp, node))
            && leaves.is_empty()
        {
            self.leaves.remove(&level);
        }
    }

    /// The lowest level in which a leaf stands.
    pub(super) fn lowest(&self) -> Option<Level> {
        self.leaves.keys().next().copied()
    }

    /// The oldest leaf of a level.
    pub(super) fn first(&self, level: Level) -> Option<(Stamp, NodeId)> {
        self.leaves.get(&level)?.first().copied()
    }

    /// A node whose time ends by `now`.
    pub(super) fn first_to_end(&self, now: u64) -> Option<NodeId> {
        self.expiring.first().filter(|(at, _)| *at <= now).map(|(_, node)| *node)
    }

    pub(super) fn end_at(&mut self, expires: u64, node: NodeId) {
        self.expiring.insert((expires, node));
    }

    pub(super) fn end_never(&mut self, expires: u64, node: NodeId) {
        self.expiring.remove(&(expires, node));
    }

    /// A node left the tree for good.
    pub(super) fn forget(&mut self, node: NodeId) {
        if let Some(extra) = self.extras.get_mut(node.index()) {
            *extra = Extra::default();
        }
    }
}
