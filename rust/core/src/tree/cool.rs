//! The second order: nodes that nobody pins and that have pages of full precision to give, by age; and how many
//! pages those are. Kept as nodes are pinned, cut, joined, condemned and restored.

use super::Tree;
use crate::ids::{NodeId, PageId};
use crate::policy::Lru;

impl Tree {
    /// Blocks that end in a node.
    pub(super) fn num_whole(&self, node: NodeId) -> usize {
        let it = self.at(node);
        ((it.end() >> self.shift) - (it.start >> self.shift)) as usize
    }

    /// Pages of full precision that a node has to give.
    pub(super) fn gives(&self, node: NodeId) -> usize {
        if self.classes.num_quantized == 0 {
            return 0;
        }
        let it = self.at(node);
        it.pages.len() - (it.quantized + it.refused) as usize
    }

    /// Have a node that nobody pins any more wait.
    pub(super) fn cool(&mut self, node: NodeId, place: impl FnOnce(&mut Lru, NodeId)) {
        let gives = self.gives(node);
        if gives > 0 {
            place(&mut self.cooling, node);
            self.given += gives;
        }
        self.evictable_quantized += self.at(node).quantized as usize;
    }

    /// The opposite: a node is pinned, or leaves.
    pub(super) fn warm(&mut self, node: NodeId) {
        let gives = self.gives(node);
        if gives > 0 {
            self.cooling.remove(node);
            self.given -= gives;
        }
        self.evictable_quantized -= self.at(node).quantized as usize;
    }

    /// Count what the pages that were cut off a node, now `upper`, take away from what is left in it.
    pub(super) fn divide(&mut self, upper: NodeId, lower: NodeId) {
        let it = self.at(lower);
        if it.quantized + it.refused == 0 {
            return;
        }
        let (quantized, refused) = (it.quantized, it.refused);
        let (deep, left) = (self.classes.count(&it.pages) as u32, self.count_refused(refused, &it.pages));
        let blocks = self.at(upper).pages.len() as u32;
        let it = self.at_mut(lower);
        it.quantized = deep;
        it.refused = left;
        let cooled = it.cooled;
        it.cooled = cooled.saturating_sub(blocks);
        let it = self.at_mut(upper);
        it.quantized = quantized - deep;
        it.refused = refused - left;
        it.cooled = cooled.min(blocks);
    }

    /// Have both parts of a node that was cut in two wait where it did.
    pub(super) fn cool_upper(&mut self, upper: NodeId, lower: NodeId) {
        if self.gives(upper) > 0 {
            self.cooling.push_newer_than(upper, lower);
            if self.gives(lower) == 0 {
                self.cooling.remove(lower);
            }
        }
    }

    /// Have a node wait for itself and the leaf that is joined to it.
    pub(super) fn cool_merged(&mut self, parent: NodeId, leaf: NodeId) {
        if self.gives(leaf) > 0 {
            if self.gives(parent) == 0 {
                self.cooling.push_newer_than(parent, leaf);
            }
            self.cooling.remove(leaf);
        }
    }

    /// Count pages that left an unpinned node, which had `given` to give before.
    pub(super) fn lose(&mut self, node: NodeId, gone: &[PageId], given: usize) {
        let quantized = self.classes.count(gone);
        let refused = self.count_refused(self.at(node).refused, gone);
        self.evictable_quantized -= quantized;
        let it = self.at_mut(node);
        it.quantized -= quantized as u32;
        it.refused -= refused;
        it.cooled = it.cooled.min(it.pages.len() as u32);
        self.recount(node, given);
    }

    /// Count pages that came back to a node, which had `given` to give before.
    pub(super) fn gain(&mut self, node: NodeId, back: &[PageId], given: usize) {
        let quantized = self.classes.count(back);
        let refused = self.count_refused(u32::MAX, back);
        let it = self.at_mut(node);
        it.quantized += quantized as u32;
        it.refused += refused;
        if it.pins == 0 {
            self.evictable_quantized += quantized;
        }
        self.recount(node, given);
    }

    /// See to it that a node waits exactly while it has something to give. One that had nothing is the oldest.
    pub(super) fn recount(&mut self, node: NodeId, before: usize) {
        if self.at(node).pins > 0 {
            return;
        }
        let now = self.gives(node);
        self.given = self.given + now - before;
        match (before, now) {
            (0, 1..) => self.cooling.push_oldest(node),
            (1.., 0) => self.cooling.remove(node),
            _ => {}
        }
    }

    fn count_refused(&self, most: u32, pages: &[PageId]) -> u32 {
        if most == 0 || self.refused.is_empty() {
            return 0;
        }
        pages.iter().filter(|page| self.refused.contains(page)).count() as u32
    }
}
