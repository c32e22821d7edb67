//! Pins of users and hints: what they hold is counted, so that it can be bounded. What users pin never steps down.

use super::Tree;
use crate::ids::{CLASSES, NodeId, PageId};

impl Tree {
    /// Pages of each class, of a match of `matched` tokens that ended in `node`, that no user pins yet.
    pub(crate) fn num_unkept(&self, node: NodeId, matched: u32) -> [u32; CLASSES] {
        let (node, end) = self.last_used(node, matched);
        let mut counts = [0; CLASSES];
        for node in self.path(node).filter(|node| self.aside.extra(*node).keeps == 0) {
            let it = self.at(node);
            let used = ((end >> self.shift) - (it.start >> self.shift)) as usize;
            for page in &it.pages[..used.min(it.pages.len())] {
                counts[self.classes.of(*page)] += 1;
            }
        }
        counts
    }

    /// Note that a user pins a path, which is pinned already.
    pub(crate) fn keep_path(&mut self, anchor: NodeId) {
        self.change_keeps(anchor, true);
    }

    /// Note that a user lets go of a path, before it is unpinned.
    pub(crate) fn unkeep_path(&mut self, anchor: NodeId) {
        self.change_keeps(anchor, false);
    }

    fn change_keeps(&mut self, anchor: NodeId, more: bool) {
        let mut node = anchor;
        while !self.at(node).is_root() {
            if count_holder(&mut self.aside.extra_mut(node).keeps, more) {
                for page in &self.nodes[node.index()].pages {
                    let kept = &mut self.aside.kept[self.classes.of(*page)];
                    *kept = if more { *kept + 1 } else { *kept - 1 };
                }
            }
            node = self.at(node).parent;
        }
    }

    /// Pages that hints hold.
    pub(crate) fn num_hinted(&self) -> usize {
        self.aside.hinted
    }

    /// Pages of a path that no hint holds yet.
    pub(crate) fn num_unhinted(&self, anchor: NodeId) -> usize {
        let nodes = self.path(anchor).filter(|node| self.aside.extra(*node).hints == 0);
        nodes.map(|node| self.at(node).pages.len()).sum()
    }

    /// Note that a hint holds a path, which is pinned already.
    pub(crate) fn hint_path(&mut self, anchor: NodeId) {
        self.change_hints(anchor, true);
    }

    /// Note that a hint lets go of a path, before it is unpinned.
    pub(crate) fn unhint_path(&mut self, anchor: NodeId) {
        self.change_hints(anchor, false);
    }

    fn change_hints(&mut self, anchor: NodeId, more: bool) {
        let mut node = anchor;
        while !self.at(node).is_root() {
            let pages = self.at(node).pages.len();
            if count_holder(&mut self.aside.extra_mut(node).hints, more) {
                let hinted = &mut self.aside.hinted;
                *hinted = if more { *hinted + pages } else { *hinted - pages };
            }
            node = self.at(node).parent;
        }
    }

    /// A page of a node was put in another one's place, `before` and `now` by quantized class.
    pub(super) fn recount_kept(&mut self, node: NodeId, before: PageId, now: PageId) {
        if self.aside.extra(node).keeps > 0 {
            self.aside.kept[self.classes.of(before)] -= 1;
            self.aside.kept[self.classes.of(now)] += 1;
        }
    }

    /// Pages came back to a node that a user or a hint has pinned meanwhile.
    pub(super) fn gain_kept(&mut self, node: NodeId, back: &[PageId]) {
        if self.aside.extra(node).hints > 0 {
            self.aside.hinted += back.len();
        }
        if self.aside.extra(node).keeps > 0 {
            for page in back {
                self.aside.kept[self.classes.of(*page)] += 1;
            }
        }
    }

    /// True when a user pins the node: its pages stay what they are.
    pub(crate) fn is_kept(&self, node: NodeId) -> bool {
        self.aside.extra(node).keeps > 0
    }
}

/// Count one holder of a node more, or one fewer. True for the first and the last: pages are counted once.
fn count_holder(holders: &mut u32, more: bool) -> bool {
    let is_only = *holders == u32::from(!more);
    *holders = if more { *holders + 1 } else { *holders - 1 };
    is_only
}
