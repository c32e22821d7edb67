//! Exact recency: a doubly linked list over node slots, every operation O(1) and without allocation
//! once the slab has grown.

use super::{Cause, Policy};
use crate::ids::NodeId;

/// Always the least recently used: nothing to keep beside the list.
pub(crate) struct Recency;

impl Policy for Recency {
    fn cause(&self) -> Cause {
        Cause::Recency
    }
}

#[derive(Clone, Copy)]
struct Link {
    newer: NodeId,
    older: NodeId,
}

const UNLINKED: Link = Link { newer: NodeId::NONE, older: NodeId::NONE };

/// Unpinned nodes from newest to oldest.
pub(crate) struct Lru {
    links: Vec<Link>,
    newest: NodeId,
    oldest: NodeId,
}

impl Lru {
    pub(crate) fn new() -> Self {
        Self { links: Vec::new(), newest: NodeId::NONE, oldest: NodeId::NONE }
    }

    /// Make room for links of `slots` nodes.
    pub(crate) fn grow(&mut self, slots: usize) {
        self.links.resize(slots, UNLINKED);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.links.capacity() * size_of::<Link>()
    }

    pub(crate) fn oldest(&self) -> NodeId {
        self.oldest
    }

    /// The next newer node, for walking the order in `check`.
    pub(crate) fn newer(&self, node: NodeId) -> NodeId {
        self.links[node.index()].newer
    }

    pub(crate) fn push_newest(&mut self, node: NodeId) {
        self.place(node, NodeId::NONE, self.newest);
    }

    pub(crate) fn push_oldest(&mut self, node: NodeId) {
        self.place(node, self.oldest, NodeId::NONE);
    }

    /// Put `node` directly before `older` in age: the next one younger.
    pub(crate) fn push_newer_than(&mut self, node: NodeId, older: NodeId) {
        self.place(node, self.links[older.index()].newer, older);
    }

    pub(crate) fn remove(&mut self, node: NodeId) {
        let Link { newer, older } = self.links[node.index()];
        self.join(newer, older);
        self.links[node.index()] = UNLINKED;
    }

    fn place(&mut self, node: NodeId, newer: NodeId, older: NodeId) {
        self.join(newer, node);
        self.join(node, older);
    }

    fn join(&mut self, newer: NodeId, older: NodeId) {
        if newer.is_none() {
            self.newest = older;
        } else {
            self.links[newer.index()].older = older;
        }
        if older.is_none() {
            self.oldest = newer;
        } else {
            self.links[older.index()].newer = newer;
        }
    }
}
