//! Pins: a sequence holds every node from its anchor up to the root.

use super::Tree;
use crate::ids::NodeId;
use crate::retention::Level;

impl Tree {
    /// Find the anchor for a match of `matched` tokens that ended in `node`, and pin its path.
    ///
    /// The anchor ends with the block that the match ends in, cut off when the run goes on, so that
    /// no more is held than is used.
    pub(crate) fn anchor(&mut self, node: NodeId, matched: u32) -> NodeId {
        let (mut node, end) = self.last_used(node, matched);
        if self.reach(node) > end && !self.at(node).is_root() {
            let offset = (end - self.at(node).start) as usize;
            node = self.split(node, offset);
        }
        self.pin_path(node);
        node
    }

    /// The node that holds the page of the block that a match of `matched` tokens ends in, and where that ends.
    pub(super) fn last_used(&self, node: NodeId, matched: u32) -> (NodeId, u32) {
        let end = self.block_end(matched);
        let node = self.ancestor(node, end);
        (if end > matched { self.holder(node, end).unwrap_or(node) } else { node }, end)
    }

    /// The node at or above `node` in which position `end` is reached, the root for 0.
    fn ancestor(&self, mut node: NodeId, end: u32) -> NodeId {
        while self.at(node).start >= end && !self.at(node).is_root() {
            node = self.at(node).parent;
        }
        node
    }

    pub(crate) fn pin_path(&mut self, mut node: NodeId) {
        while node.is_some() {
            self.pin(node);
            node = self.at(node).parent;
        }
    }

    /// Let go of a path. Nodes that nobody holds any more become the newest, the deepest oldest
    /// among them.
    pub(crate) fn unpin_path(&mut self, anchor: NodeId) {
        let mut node = anchor;
        let mut bottom = NodeId::NONE;
        while node.is_some() {
            let parent = self.at(node).parent;
            if self.unpin(node) && bottom.is_none() {
                bottom = node;
            }
            node = parent;
        }
        while bottom.is_some() {
            bottom = self.merge_up(bottom).unwrap_or(NodeId::NONE);
        }
    }

    /// Let go of the nodes below position `end` and return the new anchor.
    pub(crate) fn lift(&mut self, mut anchor: NodeId, end: u32) -> NodeId {
        while self.at(anchor).start >= end && !self.at(anchor).is_root() {
            let parent = self.at(anchor).parent;
            self.unpin(anchor);
            anchor = parent;
        }
        anchor
    }

    /// Let go of everything below position `end`, a block's, and return the new anchor. A run that goes
    /// on past it is cut in two, or its pages would stay pinned for nothing.
    pub(crate) fn cut(&mut self, anchor: NodeId, end: u32) -> NodeId {
        let anchor = self.lift(anchor, end);
        if self.at(anchor).is_root() || self.reach(anchor) <= end {
            return anchor;
        }
        let upper = self.split(anchor, (end - self.at(anchor).start) as usize);
        self.unpin(anchor);
        upper
    }

    pub(super) fn pin(&mut self, node: NodeId) {
        let pinned = self.at_mut(node);
        pinned.pins += 1;
        let (pins, pages) = (pinned.pins, pinned.pages.len());
        let is_root = pinned.is_root();
        if pins == 1 && !is_root {
            self.evictable -= pages;
            self.unseat(node);
            self.warm(node);
            self.rank(node);
            if self.at(node).level == Level::EXPIRED {
                self.at_mut(node).level = Level::USUAL;
            }
        } else if pins == 2 {
            self.shared += pages;
        }
    }

    /// Take one pin off. Returns true when the node waits among the evictable ones now.
    pub(super) fn unpin(&mut self, node: NodeId) -> bool {
        let unpinned = self.at_mut(node);
        unpinned.pins -= 1;
        let (pins, pages) = (unpinned.pins, unpinned.pages.len());
        match pins {
            0 if unpinned.is_root() => self.drop_root_if_empty(node),
            0 if unpinned.is_leaf() && pages == 0 => {
                self.unlink(node);
                self.vacate(node);
            }
            0 => {
                self.evictable += pages;
                self.seat(node);
                if self.classes.has_below(0) {
                    self.wait(node);
                }
                self.rank(node);
                return true;
            }
            1 => self.shared -= pages,
            _ => {}
        }
        false
    }
}
