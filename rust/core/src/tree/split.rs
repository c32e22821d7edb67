//! Cutting a run in two, joining two runs into one, and dropping stale tokens.

use super::{Node, Tree};
use crate::ids::NodeId;

impl Tree {
    /// Split `node` so that the first `offset` tokens of its run become a node of their own, and
    /// return that. The deeper part keeps the id: sequences and children that name it stay right.
    ///
    /// Costs the deeper part: the upper one keeps the vectors.
    pub(super) fn split(&mut self, node: NodeId, offset: usize) -> NodeId {
        self.unlink(node);
        let shift = self.shift;
        let lower = self.at_mut(node);
        let mut run = std::mem::take(&mut lower.run);
        let mut pages = std::mem::take(&mut lower.pages);
        let start = lower.start;
        let middle = start + offset as u32;
        let blocks = ((middle >> shift) - (start >> shift)) as usize;
        lower.run = run.split_off(offset);
        lower.pages = pages.split_off(blocks);
        lower.start = middle;
        run.shrink_to_fit();
        pages.shrink_to_fit();
        let (parent, pins, level) = (lower.parent, lower.pins, lower.level);
        let upper = self.insert(Node { run, pages, start, parent, pins, level, ..Node::default() });
        self.divide_retention(upper, node);
        self.divide(upper, node);
        self.at_mut(node).parent = upper;
        self.link(upper);
        self.link(node);
        if pins == 0 {
            self.seat_above(upper, node);
            self.rank(node);
        }
        upper
    }

    /// Append an unpinned leaf to its unpinned parent when it is the only child and not the longer
    /// part, so that a conversation stays one run and the copying is amortised. A parent with a page
    /// for the block that its child completes keeps that to itself. Returns the parent.
    pub(super) fn merge_up(&mut self, leaf: NodeId) -> Option<NodeId> {
        let Node { parent, next, previous, pins, ref run, .. } = *self.at(leaf);
        let upper = self.at(parent);
        let alone = next.is_none() && previous.is_none() && pins == 0 && self.at(leaf).is_leaf();
        let alone = alone && self.is_retained_alike(leaf, parent);
        if !alone || upper.is_root() || upper.pins > 0 || run.len() > upper.run.len() || self.has_tail(parent) {
            return None;
        }
        self.trim(leaf);
        self.unlink(leaf);
        self.unseat(leaf);
        self.warm(leaf);
        self.unrank(leaf);
        let Node { run, pages, cooled, .. } = std::mem::take(self.at_mut(leaf));
        let upper = self.at_mut(parent);
        upper.run.extend_from_slice(&run);
        upper.pages.extend_from_slice(&pages);
        self.join(parent, cooled);
        self.vacate(leaf);
        self.rank(parent);
        Some(parent)
    }

    /// Drop the tokens of a leaf that no page of its own holds. A leaf without pages (pinned, about
    /// to go) is left alone: it would have no token to be found by.
    pub(super) fn trim(&mut self, leaf: NodeId) {
        let reach = self.reach(leaf);
        let node = self.at(leaf);
        if !node.is_leaf() || node.pages.is_empty() || node.end() <= reach {
            return;
        }
        let epoch = self.next_epoch();
        let node = self.at_mut(leaf);
        node.epoch = epoch;
        node.run.truncate((reach - node.start) as usize);
        if node.run.capacity() > 2 * node.run.len() {
            node.run.shrink_to_fit();
            node.pages.shrink_to_fit();
        }
    }
}
