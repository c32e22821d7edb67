//! Demotion: the page of a whole block gives its place to a quantized copy of it.
//!
//! Nodes that nobody pins and that have pages of full precision to give wait in an order of their own,
//! `cooling`, by age. A node gives its earliest pages first, and its tail, the part of a block, last: a tail
//! is never quantized, it leaves. Pages that the codec refused are not given: they stay until evicted.

use super::{Node, Tree, Victim};
use crate::ids::{NodeId, PageId};

/// What a node gives next.
pub(crate) enum Gift {
    /// A page to be demoted.
    Whole(NodeId, usize),
    /// A tail that leaves.
    Tail(NodeId),
}

impl Tree {
    /// Evictable pages that are quantized.
    pub(crate) fn num_evictable_quantized(&self) -> usize {
        self.evictable_quantized
    }

    /// Pages of full precision that unpinned nodes have to give.
    pub(crate) fn num_given(&self) -> usize {
        self.given
    }

    /// What the coldest node with pages to give gives next.
    pub(crate) fn coldest(&mut self) -> Option<Gift> {
        let node = self.cooling.oldest();
        if node.is_none() {
            return None;
        }
        Some(match self.next_to_cool(node) {
            Some(index) => Gift::Whole(node, index),
            None => Gift::Tail(node),
        })
    }

    fn next_to_cool(&mut self, node: NodeId) -> Option<usize> {
        let index = self.can_cool(node).next().map(|(index, _)| index);
        let it = self.at(node);
        let seen = index.unwrap_or(self.num_whole(node).min(it.pages.len()));
        self.at_mut(node).cooled = seen as u32;
        index
    }

    /// Pages of a node that may be demoted, the earliest first, and where they stand in it.
    pub(crate) fn can_cool(&self, node: NodeId) -> impl Iterator<Item = (usize, PageId)> + '_ {
        let it = self.at(node);
        let whole = self.num_whole(node).min(it.pages.len());
        let first = (it.cooled as usize).min(whole);
        let pages = it.pages[first..whole].iter().copied().zip(first..);
        let may = |page: PageId| !self.classes.is_quantized(page) && !self.refused.contains(&page);
        pages.filter(move |(page, _)| may(*page)).map(|(page, index)| (index, page))
    }

    /// Put `target` where a page stands, and return that.
    pub(crate) fn demote(&mut self, node: NodeId, index: usize, target: PageId) -> PageId {
        let given = self.gives(node);
        let it = self.at_mut(node);
        let source = std::mem::replace(&mut it.pages[index], target);
        it.quantized += 1;
        if it.pins == 0 {
            self.evictable_quantized += 1;
        }
        self.recount(node, given);
        source
    }

    /// Take a demotion back: `source` stands again where `target` does, for good when it was refused. False
    /// when that has left the tree.
    pub(crate) fn promote(&mut self, place: (NodeId, usize), target: PageId, source: PageId, refused: bool) -> bool {
        let Some((node, index)) = self.find_page(place, target) else { return false };
        let given = self.gives(node);
        let it = self.at_mut(node);
        it.pages[index] = source;
        it.quantized -= 1;
        it.refused += u32::from(refused);
        it.cooled = it.cooled.min(index as u32);
        if it.pins == 0 {
            self.evictable_quantized -= 1;
        }
        if refused {
            self.refused.insert(source);
        }
        self.recount(node, given);
        true
    }

    /// Where a page of the tree stands. Searches the tree when it is not where it was: runs were split or
    /// joined meanwhile.
    fn find_page(&self, (node, index): (NodeId, usize), page: PageId) -> Option<(NodeId, usize)> {
        if self.at(node).pages.get(index) == Some(&page) {
            return Some((node, index));
        }
        let at = |it: &Node| it.pages.iter().position(|other| *other == page);
        // A condemned node still names its pages, and they may be in use elsewhere.
        let is_linked = |node, it: &Node| self.children.get(&self.nodes, it.parent, it.run[0]) == Some(node);
        let mut found = (0..).zip(&self.nodes).filter_map(|(node, it)| Some((NodeId(node), it, at(it)?)));
        found.find(|(node, it, _)| is_linked(*node, it)).map(|(node, _, index)| (node, index))
    }

    /// The nodes from `node` up to the root, that one not included.
    pub(crate) fn path(&self, node: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let is_below_root = |node: &NodeId| !self.at(*node).is_root();
        std::iter::successors(Some(node), |node| Some(self.at(*node).parent)).take_while(is_below_root)
    }

    /// Which block of its text a page of a node holds.
    pub(crate) fn block_of(&self, node: NodeId, index: usize) -> u32 {
        (self.at(node).start >> self.shift) + index as u32
    }

    /// Pages that left the tree may hold something else from now on.
    pub(crate) fn forget_refused(&mut self, pages: &[PageId]) {
        if !self.refused.is_empty() {
            for page in pages {
                self.refused.remove(page);
            }
        }
    }

    /// Condemn the tail of an unpinned node.
    pub(crate) fn condemn_tail(&mut self, node: NodeId, pages: &mut Vec<PageId>, victims: &mut Vec<Victim>) {
        let it = self.at(node);
        if it.pages.len() > 1 || !it.is_leaf() {
            self.condemn_end(node, it.pages.len() - 1, pages, victims);
            return;
        }
        let mut node = self.condemn_leaf(node, pages, victims);
        while self.is_hollow(node) {
            node = self.condemn_leaf(node, pages, victims);
        }
    }
}
