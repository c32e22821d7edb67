//! The second order: nodes that nobody pins and that have pages to give to the next class down, by age, for each
//! class; and how many pages those are. Kept as nodes are pinned, cut, joined, condemned and restored, and the
//! policy told of it.

use super::Tree;
use super::cooling::Cooled;
use crate::ids::{NodeId, PageId, STEPS};
use crate::policy::Policy;
use crate::retention::Level;

/// Tell a policy what a node gives next.
fn cool(policy: &mut dyn Policy, level: Level, class: usize, node: NodeId, next: Option<PageId>) {
    match level {
        Level::USUAL => policy.cool(class, node, next),
        _ => policy.cool_at(level, class, node, next),
    }
}

impl Tree {
    /// Blocks that end in a node.
    pub(super) fn num_whole(&self, node: NodeId) -> usize {
        let it = self.at(node);
        ((it.end() >> self.shift) - (it.start >> self.shift)) as usize
    }

    /// Pages of a class that a node has to give to the next one.
    pub(super) fn gives(&self, node: NodeId, class: usize) -> usize {
        if !self.classes.has_below(class) {
            return 0;
        }
        let it = self.at(node);
        let Cooled { quantized, refused, .. } = it.cooled;
        let of_class = match class.checked_sub(1) {
            None => it.pages.len() - quantized.iter().sum::<u32>() as usize,
            Some(index) => quantized[index] as usize,
        };
        of_class - refused[class] as usize
    }

    /// Have a node that nobody pins wait where its level and its age say.
    pub(super) fn wait(&mut self, node: NodeId) {
        let quantized = self.at(node).cooled.quantized;
        self.count_evictable(quantized, true);
        self.recount(node);
    }

    /// The opposite: a node is pinned, or leaves.
    pub(super) fn warm(&mut self, node: NodeId) {
        if !self.classes.has_below(0) {
            return;
        }
        let it = self.at(node);
        let (level, Cooled { quantized, stamp, .. }) = (it.level, it.cooled);
        self.count_evictable(quantized, false);
        for (class, order) in self.cooling.iter_mut().enumerate() {
            let waits = std::mem::take(&mut self.nodes[node.index()].cooled.waits[class]);
            if waits > 0 {
                order.count(node, level.above(stamp), waits as usize, 0);
                cool(&mut *self.policy, level, class, node, None);
            }
        }
    }

    /// See to it that a node that nobody pins waits exactly while it has something to give.
    pub(super) fn recount(&mut self, node: NodeId) {
        if !self.classes.has_below(0) || self.at(node).pins > 0 {
            return;
        }
        for class in 0..STEPS {
            let now = self.gives(node, class);
            let it = &mut self.nodes[node.index()];
            let before = std::mem::replace(&mut it.cooled.waits[class], now as u32) as usize;
            self.cooling[class].count(node, it.level.above(it.cooled.stamp), before, now);
            self.tell(node, class);
        }
    }

    /// Let the policy know which page a node gives next, whichever of the orders rules.
    fn tell(&mut self, node: NodeId, class: usize) {
        if !self.policy.learns() {
            return;
        }
        let next = if self.at(node).cooled.waits[class] == 0 {
            None
        } else {
            let index = self.next_to_cool(node, class);
            let pages = &self.at(node).pages;
            index.map_or(pages.last(), |index| pages.get(index)).copied()
        };
        let level = self.at(node).level;
        cool(&mut *self.policy, level, class, node, next);
    }

    /// Count what the pages that were cut off a node, now `upper`, take away from what is left in it.
    pub(super) fn divide(&mut self, upper: NodeId, lower: NodeId) {
        if !self.classes.has_below(0) {
            return;
        }
        let it = self.at(lower);
        let whole = it.cooled;
        let (quantized, refused) = (self.classes.count(&it.pages), self.count_refused(&it.pages));
        let blocks = self.at(upper).pages.len() as u32;
        let mut above = Cooled { stamp: whole.stamp + 1, ..Cooled::default() };
        let mut below = Cooled { quantized, refused, ..whole };
        for class in 0..STEPS {
            above.quantized[class] = whole.quantized[class] - quantized[class];
            above.refused[class] = whole.refused[class] - refused[class];
            above.seen[class] = whole.seen[class].min(blocks);
            below.seen[class] = whole.seen[class].saturating_sub(blocks);
        }
        (self.at_mut(upper).cooled, self.at_mut(lower).cooled) = (above, below);
        self.recount(upper);
        self.recount(lower);
    }

    /// Count a leaf, which waits no more, into its parent, to which it was joined.
    pub(super) fn join(&mut self, parent: NodeId, leaf: Cooled) {
        let upper = &mut self.at_mut(parent).cooled;
        for class in 0..STEPS {
            upper.quantized[class] += leaf.quantized[class];
            upper.refused[class] += leaf.refused[class];
        }
        self.count_evictable(leaf.quantized, true);
        self.recount(parent);
    }

    /// Count pages that left an unpinned node.
    pub(super) fn lose(&mut self, node: NodeId, gone: &[PageId]) {
        let (quantized, refused) = (self.classes.count(gone), self.count_refused(gone));
        self.count_evictable(quantized, false);
        let it = self.at_mut(node);
        let pages = it.pages.len() as u32;
        for class in 0..STEPS {
            it.cooled.quantized[class] -= quantized[class];
            it.cooled.refused[class] -= refused[class];
            it.cooled.seen[class] = it.cooled.seen[class].min(pages);
        }
        self.recount(node);
    }

    /// Count pages that came back to a node.
    pub(super) fn gain(&mut self, node: NodeId, back: &[PageId]) {
        let (quantized, refused) = (self.classes.count(back), self.count_refused(back));
        let it = self.at_mut(node);
        for class in 0..STEPS {
            it.cooled.quantized[class] += quantized[class];
            it.cooled.refused[class] += refused[class];
        }
        if it.pins == 0 {
            self.count_evictable(quantized, true);
        }
        self.recount(node);
    }

    pub(super) fn count_evictable(&mut self, quantized: [u32; STEPS], more: bool) {
        for (count, change) in self.evictable_quantized.iter_mut().zip(quantized) {
            *count = if more { *count + change as usize } else { *count - change as usize };
        }
    }

    fn count_refused(&self, pages: &[PageId]) -> [u32; STEPS] {
        let mut counts = [0; STEPS];
        if !self.refused.is_empty() {
            for page in pages.iter().filter(|page| self.refused.contains(page)) {
                counts[self.classes.of(*page)] += 1;
            }
        }
        counts
    }
}
