//! Nodes by level, and in the order in which they were let go of, for one class of pages that they have to give.

use std::collections::BTreeSet;

use crate::ids::{NodeId, STEPS};

/// When a node was let go of: nodes of smaller stamps are colder. In the order, below its level.
pub(super) type Stamp = u64;
/// From one stamp to the next: a node that is cut in two has another between.
pub(super) const NEXT: Stamp = 2;

/// Nodes with pages of one class to give, and how many pages.
#[derive(Default)]
pub(super) struct Cooling {
    nodes: BTreeSet<(Stamp, NodeId)>,
    pages: usize,
}

impl Cooling {
    pub(super) fn coldest(&self) -> Option<NodeId> {
        self.nodes.first().map(|(_, node)| *node)
    }

    /// See to it that a node that had `before` pages to give stands here exactly while it has some now.
    pub(super) fn count(&mut self, node: NodeId, stamp: Stamp, before: usize, now: usize) {
        self.pages = self.pages + now - before;
        match (before, now) {
            (0, 1..) => drop(self.nodes.insert((stamp, node))),
            (1.., 0) => drop(self.nodes.remove(&(stamp, node))),
            _ => {}
        }
    }

    pub(super) fn num_pages(&self) -> usize {
        self.pages
    }

    /// From the coldest on, for `check`.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Stamp, NodeId)> {
        self.nodes.iter().copied()
    }

    /// Bytes owned, a node's entry taken as 1.5.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.len() * size_of::<(Stamp, NodeId)>() * 3 / 2
    }
}

/// What a node's pages are, beside full precision, and what of it was looked at.
#[derive(Clone, Copy, Default)]
pub(super) struct Cooled {
    /// How many pages are in each quantized class.
    pub quantized: [u32; STEPS],
    /// How many of each class the codec refused: they stay in it.
    pub refused: [u32; STEPS],
    /// Pages from the first on that were seen to have nothing to give to the class below.
    pub seen: [u32; STEPS],
    /// Pages counted as given of each class, while nobody pins the node.
    pub waits: [u32; STEPS],
    pub stamp: Stamp,
}
