//! Eviction in two steps: condemn takes victims out of sight and hands over their pages; after
//! that they are either finished, or restored to where they stood.

use super::{Node, Tree};
use crate::ids::{NodeId, PageId};
use crate::policy::Cause;

/// What must be remembered to restore a victim. Its pages are in the caller's list, in order.
pub(crate) enum Victim {
    /// A leaf left the tree. Its slot keeps tokens and pages until the end.
    Whole { node: NodeId, epoch: u32, parent_epoch: u32, count: usize, why: Option<Cause> },
    /// A leaf lost its last `count` pages and keeps its stale tokens until the end.
    Part { node: NodeId, epoch: u32, kept: usize, count: usize, why: Option<Cause> },
}

impl Victim {
    /// Its pages.
    pub(crate) fn count(&self) -> usize {
        let (Self::Whole { count, .. } | Self::Part { count, .. }) = *self;
        count
    }

    /// Why it leaves, where that was not for the policy to say.
    pub(crate) fn why(&self) -> Option<Cause> {
        let (Self::Whole { why, .. } | Self::Part { why, .. }) = *self;
        why
    }
}

impl Tree {
    /// Take `want` pages from the leaves that rank lowest at `now`, by the policy: the
    /// deepest of each leaf first. The caller checked that so many are evictable.
    pub(crate) fn condemn(&mut self, mut want: usize, now: u64, pages: &mut Vec<PageId>, victims: &mut Vec<Victim>) {
        while want > 0 {
            let (leaf, most) = self.next_victim(now);
            debug_assert!(self.at(leaf).is_leaf(), "the oldest node is always a leaf");
            let have = self.at(leaf).pages.len();
            let take = most.min(want);
            if have > take {
                self.condemn_end(leaf, have - take, pages, victims);
                want -= take;
                continue;
            }
            want -= have;
            let mut parent = self.condemn_leaf(leaf, pages, victims);
            while self.is_hollow(parent) {
                parent = self.condemn_leaf(parent, pages, victims);
            }
        }
    }

    /// Condemn the pages of a leaf from the `kept`-th on; of an inner node, a last one that it can spare.
    pub(super) fn condemn_end(
        &mut self,
        node: NodeId,
        kept: usize,
        pages: &mut Vec<PageId>,
        victims: &mut Vec<Victim>,
    ) {
        let (first, it) = (pages.len(), self.at_mut(node));
        let (epoch, count) = (it.epoch, it.pages.len() - kept);
        pages.extend(it.pages.drain(kept..));
        victims.push(Victim::Part { node, epoch, kept, count, why: self.why(node) });
        self.evictable -= count;
        self.sealed -= count;
        self.lose(node, &pages[first..]);
        self.rank(node);
    }

    /// The leaf to take from, and how many of its pages at most: those that rank alike.
    fn next_victim(&mut self, now: u64) -> (NodeId, usize) {
        self.expire(now);
        if let Some(leaf) = self.next_of_levels(now) {
            return (leaf, self.policy.alike(&self.at(leaf).pages));
        }
        let Some(leaf) = self.policy.lowest(now) else {
            let oldest = self.order.oldest();
            return (oldest, self.at(oldest).pages.len());
        };
        (leaf, self.policy.alike(&self.at(leaf).pages))
    }

    /// Condemn every unpinned node below `root`.
    pub(crate) fn condemn_below(&mut self, root: NodeId, pages: &mut Vec<PageId>, victims: &mut Vec<Victim>) {
        for node in self.preorder(root).into_iter().rev() {
            let it = self.at(node);
            if !it.is_root() && it.is_leaf() && it.pins == 0 {
                self.condemn_leaf(node, pages, victims);
            }
        }
    }

    /// Forget the victims for good.
    pub(crate) fn finish(&mut self, victims: &mut Vec<Victim>) {
        for victim in victims.drain(..) {
            match victim {
                Victim::Whole { node, parent_epoch, .. } => {
                    let parent = self.at(node).parent;
                    self.vacate(node);
                    if self.at(parent).epoch == parent_epoch {
                        self.drop_root_if_empty(parent);
                    }
                }
                Victim::Part { node, epoch, kept, .. } => {
                    if self.is_as_left(node, epoch, kept) {
                        self.trim(node);
                    }
                }
            }
        }
    }

    /// Put the victims back, the last condemned first, so that parents stand before their children
    /// come and stay younger. Where the place is gone or taken, the pages go to `orphans`.
    pub(crate) fn restore(&mut self, victims: &mut Vec<Victim>, pages: &[PageId], orphans: &mut Vec<PageId>) {
        let mut end = pages.len();
        for victim in victims.drain(..).rev() {
            let count = victim.count();
            let own = &pages[end - count..end];
            end -= count;
            let is_back = match victim {
                Victim::Whole { node, epoch, parent_epoch, .. } => self.relink(node, epoch, parent_epoch),
                Victim::Part { node, epoch, kept, .. } => self.regrow(node, epoch, kept, own),
            };
            if !is_back {
                orphans.extend_from_slice(own);
            }
        }
    }

    pub(super) fn condemn_leaf(&mut self, leaf: NodeId, pages: &mut Vec<PageId>, victims: &mut Vec<Victim>) -> NodeId {
        self.unlink(leaf);
        self.unseat(leaf);
        self.warm(leaf);
        self.unrank(leaf);
        self.stop_expiring(leaf);
        let (gone, why) = (self.next_epoch(), self.why(leaf));
        let node = self.at_mut(leaf);
        let epoch = std::mem::replace(&mut node.epoch, gone);
        let (parent, count) = (node.parent, node.pages.len());
        pages.extend_from_slice(&node.pages);
        self.evictable -= count;
        self.sealed -= count;
        let parent_epoch = self.at(parent).epoch;
        victims.push(Victim::Whole { node: leaf, epoch, parent_epoch, count, why });
        parent
    }

    /// An unpinned leaf without pages: the start of a block whose children all left.
    pub(super) fn is_hollow(&self, node: NodeId) -> bool {
        let node = self.at(node);
        node.is_leaf() && !node.is_root() && node.pages.is_empty() && node.pins == 0
    }

    fn relink(&mut self, node: NodeId, epoch: u32, parent_epoch: u32) -> bool {
        let Node { parent, start, ref run, ref pages, .. } = *self.at(node);
        let above = self.at(parent);
        let full = (above.end() >> self.shift) - (above.start >> self.shift);
        let stands = above.epoch == parent_epoch && above.end() == start && above.pages.len() as u32 >= full;
        if !stands || self.children.get(&self.nodes, parent, run[0]).is_some() {
            self.vacate(node);
            return false;
        }
        let count = pages.len();
        self.at_mut(node).epoch = epoch;
        self.link(node);
        self.reseat(node);
        self.wait(node);
        self.evictable += count;
        self.sealed += count;
        self.rank(node);
        true
    }

    fn regrow(&mut self, node: NodeId, epoch: u32, kept: usize, pages: &[PageId]) -> bool {
        if !self.is_as_left(node, epoch, kept) {
            return false;
        }
        let grown = self.at_mut(node);
        grown.pages.extend_from_slice(pages);
        let pins = grown.pins;
        self.gain(node, pages);
        self.gain_kept(node, pages);
        self.sealed += pages.len();
        match pins {
            0 => self.evictable += pages.len(),
            1 => {}
            _ => self.shared += pages.len(),
        }
        self.rank(node);
        true
    }

    fn is_as_left(&self, node: NodeId, epoch: u32, kept: usize) -> bool {
        let is_spare = self.num_whole(node) == kept;
        let node = self.at(node);
        node.epoch == epoch && (node.is_leaf() || is_spare) && node.pages.len() == kept
    }

    /// Nodes from `root` down, parents before children.
    pub(super) fn preorder(&self, root: NodeId) -> Vec<NodeId> {
        let mut order = vec![root];
        let mut next = 0;
        while let Some(node) = order.get(next) {
            let mut child = self.at(*node).first_child;
            while child.is_some() {
                order.push(child);
                child = self.at(child).next;
            }
            next += 1;
        }
        order
    }
}
