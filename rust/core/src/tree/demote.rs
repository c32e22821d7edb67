//! Demotion: the page of a whole block gives its place to a copy of it in the next class down.
//!
//! Nodes that nobody pins and that have pages to give wait in an order of their own, one a class, `cooling`, by
//! age; a policy may rank them by the page that each gives next, and name another than the oldest. A node gives its earliest pages first, and its tail, the part of a block, last: a tail is never
//! quantized, it leaves. Pages that the codec refused are not given: they stay in their class until evicted.

use super::{Node, Tree, Victim};
use crate::ids::{NodeId, PageId, STEPS};
use crate::retention::Level;

/// What a node gives next.
pub(crate) enum Gift {
    /// A page to be demoted.
    Whole(NodeId, usize),
    /// A tail that leaves.
    Tail(NodeId),
}

impl Tree {
    /// Evictable pages of each of the quantized classes.
    pub(crate) fn num_evictable_quantized(&self) -> [usize; STEPS] {
        self.evictable_quantized
    }

    /// Pages of a class that unpinned nodes have to give to the next one.
    pub(crate) fn num_given(&self, class: usize) -> usize {
        self.cooling[class].num_pages()
    }

    /// What the coldest node with pages of a class to give gives next.
    pub(crate) fn coldest(&mut self, class: usize, now: u64) -> Option<Gift> {
        self.expire(now);
        let first = self.cooling[class].coldest()?;
        let node = match self.at(first).level {
            Level::USUAL => self.policy.coldest(class, now),
            level => self.policy.coldest_at(level, class, now),
        };
        let node = node.unwrap_or(first);
        Some(match self.next_to_cool(node, class) {
            Some(index) => Gift::Whole(node, index),
            None => Gift::Tail(node),
        })
    }

    pub(super) fn next_to_cool(&mut self, node: NodeId, class: usize) -> Option<usize> {
        let index = self.can_cool(node, class).next().map(|(index, _)| index);
        let it = self.at(node);
        let seen = index.unwrap_or(self.num_whole(node).min(it.pages.len()));
        self.at_mut(node).cooled.seen[class] = seen as u32;
        index
    }

    /// Pages of a class that may be demoted, the node's earliest first, and where they stand in it.
    pub(crate) fn can_cool(&self, node: NodeId, class: usize) -> impl Iterator<Item = (usize, PageId)> + '_ {
        let it = self.at(node);
        let whole = self.num_whole(node).min(it.pages.len());
        let first = (it.cooled.seen[class] as usize).min(whole);
        let pages = it.pages[first..whole].iter().copied().zip(first..);
        let may = move |page: PageId| self.classes.of(page) == class && !self.refused.contains(&page);
        pages.filter(move |(page, _)| may(*page)).map(|(page, index)| (index, page))
    }

    /// Put a page of another class where one stands.
    pub(crate) fn put(&mut self, node: NodeId, index: usize, page: PageId) {
        let classes = self.classes;
        let it = self.at_mut(node);
        let source = std::mem::replace(&mut it.pages[index], page);
        let (before, now) = (classes.count(&[source]), classes.count(&[page]));
        for class in 0..STEPS {
            it.cooled.quantized[class] = it.cooled.quantized[class] + now[class] - before[class];
            it.cooled.seen[class] = it.cooled.seen[class].min(index as u32);
        }
        if it.pins == 0 {
            self.count_evictable(before, false);
            self.count_evictable(now, true);
        }
        self.recount_kept(node, source, page);
        self.recount(node);
    }

    /// Take a demotion back: `source` stands there again, for good when it was refused.
    pub(crate) fn promote(&mut self, (node, index): (NodeId, usize), source: PageId, refused: bool) {
        if refused {
            self.refused.insert(source);
            let class = self.classes.of(source);
            self.at_mut(node).cooled.refused[class] += 1;
        }
        self.put(node, index, source);
    }

    /// Where a page of the tree stands. Searches the tree when it is not where it was: runs were split or
    /// joined meanwhile.
    pub(crate) fn find_page(&self, (node, index): (NodeId, usize), page: PageId) -> Option<(NodeId, usize)> {
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

    /// The page that stands there.
    pub(crate) fn page_at(&self, node: NodeId, index: usize) -> PageId {
        self.at(node).pages[index]
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

    /// The same, and append those that the codec had refused to `refused`.
    pub(crate) fn take_refused(&mut self, pages: &[PageId], refused: &mut Vec<PageId>) {
        refused.extend(pages.iter().filter(|page| self.refused.contains(page)));
        self.forget_refused(pages);
    }

    /// These pages hold again what the codec refused.
    pub(crate) fn refuse(&mut self, pages: &[PageId]) {
        self.refused.extend(pages);
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
