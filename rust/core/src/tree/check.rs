//! Every promise of the tree, verified by walking it.

use std::collections::{HashMap, HashSet};

use super::Tree;
use crate::error::{Error, Result};
use crate::ids::{CLASSES, NodeId, PageId, STEPS};
use crate::retention::Level;

macro_rules! hold {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(Error::Broken(format!($($message)+)));
        }
    };
}

impl Tree {
    /// Verify the tree against the anchors of all sequences. Returns its pages.
    /// `keeps` are the anchors of users' pins and `hints` those of hints, which are among `anchors`.
    pub(crate) fn check(
        &self,
        anchors: impl Iterator<Item = NodeId>,
        keeps: impl Iterator<Item = NodeId>,
        hints: impl Iterator<Item = NodeId>,
    ) -> Result<Vec<PageId>> {
        let mut pins: HashMap<NodeId, u32> = HashMap::new();
        for anchor in anchors {
            let mut node = anchor;
            while node.is_some() {
                *pins.entry(node).or_default() += 1;
                node = self.at(node).parent;
            }
        }
        let keeps = self.check_kept(keeps)?;
        let hints = self.check_hinted(hints)?;
        let age = self.check_order()?;
        let mut waiting = self.check_cooling()?;
        let (mut pages, mut evictable, mut shared, mut linked) = (Vec::new(), 0, 0, 0);
        let (mut leaves, mut aside, mut expiring) = (0, 0, 0);
        let (mut quantized, mut given) = ([0; STEPS], [0; STEPS]);
        for root in self.roots.iter() {
            for node in self.preorder(root) {
                self.check_node(node, &age)?;
                let it = self.at(node);
                let expected = pins.remove(&node).unwrap_or(0);
                hold!(it.pins == expected, "{node:?} has {} pins for {expected} sequences", it.pins);
                self.check_level(node, keeps.get(&node).copied().unwrap_or(0), &age)?;
                let (counted, expected) = (self.aside.extra(node).hints, hints.get(&node).copied().unwrap_or(0));
                hold!(counted == expected, "{node:?} has {counted} hints for {expected}");
                leaves += usize::from(it.pins == 0 && it.is_leaf() && !it.is_root());
                aside += usize::from(it.is_aside && it.is_leaf());
                expiring += usize::from(self.aside.extra(node).expires > 0);
                pages.extend_from_slice(&it.pages);
                evictable += if it.pins == 0 { it.pages.len() } else { 0 };
                shared += if it.pins > 1 { it.pages.len() } else { 0 };
                linked += usize::from(!it.is_root());
                if it.pins == 0 {
                    for class in 0..STEPS {
                        quantized[class] += it.cooled.quantized[class] as usize;
                        let count = self.gives(node, class);
                        given[class] += count;
                        let waits = waiting.remove(&(class, node));
                        hold!(waits == (count > 0), "{node:?} gives {count} of {class} and waits: {waits}");
                        let next = self.can_cool(node, class).next().map(|(_, page)| page).or(it.pages.last().copied());
                        let is_ranked = next.is_some_and(|page| self.is_cooling_as(class, node, page));
                        let is_told = self.policy.num_cooling(class).is_none() || !waits || is_ranked;
                        hold!(is_told, "{node:?} does not stand where {next:?} does, which it gives next");
                    }
                }
            }
        }
        for (class, order) in self.cooling.iter().enumerate() {
            let (ranked, nodes) = (self.policy.num_cooling(class), order.iter().count());
            hold!(ranked.is_none_or(|ranked| ranked == nodes), "{ranked:?} nodes ranked to give {class} of {nodes}");
        }
        hold!(waiting.is_empty(), "nodes that are pinned or gone wait: {waiting:?}");
        let counted = [self.num_given(0), self.num_given(1)];
        hold!(given == counted, "{counted:?} pages counted as given of {given:?}");
        let counted = self.evictable_quantized;
        hold!(quantized == counted, "{counted:?} quantized pages counted as evictable of {quantized:?}");
        if let Some(ranked) = self.policy.num_ranked() {
            hold!(ranked == leaves, "{ranked} leaves ranked of {leaves}");
        }
        let counted = self.aside.num_leaves();
        hold!(counted == aside, "{counted} leaves stand aside of {aside}");
        let counted = self.aside.expiring().len();
        hold!(counted == expiring, "the time of {counted} nodes ends of {expiring}");
        hold!(pins.is_empty(), "sequences stand on nodes outside the tree: {pins:?}");
        hold!(self.children.len() == linked, "{} children indexed of {linked}", self.children.len());
        hold!(pages.len() == self.sealed, "{} pages counted as sealed of {}", self.sealed, pages.len());
        hold!(evictable == self.evictable, "{} pages counted as evictable of {evictable}", self.evictable);
        hold!(shared == self.shared, "{} pages counted as shared of {shared}", self.shared);
        Ok(pages)
    }

    /// Age of every unpinned node, the oldest first.
    fn check_order(&self) -> Result<HashMap<NodeId, usize>> {
        let mut age = HashMap::new();
        let mut node = self.order.oldest();
        while node.is_some() {
            hold!(age.insert(node, age.len()).is_none(), "{node:?} stands twice in the order");
            hold!(self.at(node).pins == 0, "{node:?} is pinned and may be evicted");
            node = self.order.newer(node);
        }
        Ok(age)
    }

    /// Nodes that have pages of a class to give.
    fn check_cooling(&self) -> Result<HashSet<(usize, NodeId)>> {
        let mut waiting = HashSet::new();
        for (class, order) in self.cooling.iter().enumerate() {
            for (stamp, node) in order.iter() {
                hold!(waiting.insert((class, node)), "{node:?} waits twice");
                let it = self.at(node);
                hold!(stamp == it.level.above(it.cooled.stamp), "{node:?} waits where it stood before");
            }
        }
        Ok(waiting)
    }

    /// Users' pins of every node; and the pages below them are counted.
    fn check_kept(&self, anchors: impl Iterator<Item = NodeId>) -> Result<HashMap<NodeId, u32>> {
        let keeps = self.count_paths(anchors);
        let mut kept = [0; CLASSES];
        for page in keeps.keys().flat_map(|node| &self.at(*node).pages) {
            kept[self.classes.of(*page)] += 1;
        }
        hold!(kept == self.aside.kept, "{:?} pages counted as pinned by users of {kept:?}", self.aside.kept);
        Ok(keeps)
    }

    /// Hints on every node; and the pages below them are counted.
    fn check_hinted(&self, anchors: impl Iterator<Item = NodeId>) -> Result<HashMap<NodeId, u32>> {
        let hints = self.count_paths(anchors);
        let hinted: usize = hints.keys().map(|node| self.at(*node).pages.len()).sum();
        hold!(hinted == self.aside.hinted, "{} pages counted as held by hints of {hinted}", self.aside.hinted);
        Ok(hints)
    }

    /// How many of the paths that end in the anchors go through every node.
    fn count_paths(&self, anchors: impl Iterator<Item = NodeId>) -> HashMap<NodeId, u32> {
        let mut counts: HashMap<NodeId, u32> = HashMap::new();
        for anchor in anchors {
            for node in self.path(anchor) {
                *counts.entry(node).or_default() += 1;
            }
        }
        counts
    }

    fn check_level(&self, node: NodeId, keeps: u32, age: &HashMap<NodeId, usize>) -> Result<()> {
        let (it, extra) = (self.at(node), self.aside.extra(node));
        hold!(extra.keeps == keeps, "{node:?} has {} pins of users for {keeps}", extra.keeps);
        let (level, stamp) = (it.level, it.cooled.stamp);
        let stands = self.aside.contains(level, stamp, node);
        hold!(stands == (it.is_aside && it.is_leaf()), "{node:?} at {level:?} stands aside: {stands}");
        hold!(!it.is_aside || it.pins == 0, "{node:?} is pinned and stands aside");
        hold!(level == Level::USUAL || !age.contains_key(&node), "{node:?} at {level:?} is in the order of recency");
        let expires = self.aside.expiring().any(|entry| entry == (extra.expires, node));
        hold!(expires == (extra.expires > 0), "the time of {node:?} ends at {}: {expires}", extra.expires);
        hold!(extra.expires == 0 || level != Level::EXPIRED, "the time of {node:?} is over and ends");
        Ok(())
    }

    fn is_ranked_as(&self, node: NodeId, page: PageId) -> bool {
        match self.at(node).level {
            Level::USUAL => self.policy.is_ranked_as(node, page),
            level => self.policy.is_ranked_at(level, node, page),
        }
    }

    fn is_cooling_as(&self, class: usize, node: NodeId, page: PageId) -> bool {
        match self.at(node).level {
            Level::USUAL => self.policy.is_cooling_as(class, node, page),
            level => self.policy.is_cooling_at(level, class, node, page),
        }
    }

    fn check_classes(&self, node: NodeId) -> Result<()> {
        let it = self.at(node);
        let (counted, quantized) = (it.cooled.quantized, self.classes.count(&it.pages));
        hold!(counted == quantized, "{node:?} counts {counted:?} quantized of {quantized:?}");
        let tails = it.pages.get(self.num_whole(node)..).unwrap_or(&[]);
        hold!(self.classes.count(tails) == [0; STEPS], "the tail of {node:?} is quantized");
        for class in 0..STEPS {
            let is_refused = |page: &PageId| self.classes.of(*page) == class && self.refused.contains(page);
            let (counted, refused) =
                (it.cooled.refused[class], it.pages.iter().filter(|page| is_refused(page)).count());
            hold!(counted as usize == refused, "{node:?} counts {counted} refused of {refused}");
            let seen = it.pages.get(..it.cooled.seen[class] as usize);
            hold!(seen.is_some(), "{node:?} looked past its {} pages", it.pages.len());
            let can_give = |page: &PageId| self.classes.of(*page) == class && !is_refused(page);
            hold!(!seen.is_some_and(|seen| seen.iter().any(can_give)), "{node:?} passed over a page that it can give");
        }
        Ok(())
    }

    fn check_node(&self, node: NodeId, age: &HashMap<NodeId, usize>) -> Result<()> {
        let it = self.at(node);
        if it.is_root() {
            hold!(it.run.is_empty() && it.pages.is_empty(), "root {node:?} holds tokens");
            return Ok(());
        }
        let above = self.at(it.parent);
        hold!(!it.run.is_empty(), "{node:?} has no tokens");
        hold!(it.start == above.end(), "{node:?} starts at {} below an end at {}", it.start, above.end());
        hold!(it.pins <= above.pins, "{node:?} has more pins than its parent");
        let found = self.children.get(&self.nodes, it.parent, it.run[0]);
        hold!(found == Some(node), "{node:?} is found as {found:?}");
        let full = ((it.end() >> self.shift) - (it.start >> self.shift)) as usize;
        let most = full + usize::from(it.end() & ((1 << self.shift) - 1) != 0);
        if it.is_leaf() {
            hold!(it.pages.len() <= most, "leaf {node:?} has {} pages for {most} blocks", it.pages.len());
            hold!(it.pins > 0 || !it.pages.is_empty(), "leaf {node:?} has no pages");
        } else {
            let fits = it.pages.len() == full || it.pages.len() == most;
            hold!(fits, "{node:?} has {} pages for {full} blocks", it.pages.len());
        }
        self.check_classes(node)?;
        if self.policy.num_ranked().is_some() {
            let may_leave = it.pins == 0 && it.is_leaf();
            let ranked = it.pages.last().is_some_and(|page| self.is_ranked_as(node, *page));
            hold!(ranked == may_leave, "{node:?} with {} pins is ranked: {ranked}", it.pins);
        }
        let is_listed = it.pins == 0 && !it.is_aside;
        hold!(is_listed == age.contains_key(&node), "{node:?} with {} pins is misplaced", it.pins);
        if let (Some(own), Some(parents)) = (age.get(&node), age.get(&it.parent)) {
            hold!(own < parents, "{node:?} is younger than its parent");
        }
        let next = it.next;
        hold!(next.is_none() || self.at(next).previous == node, "{next:?} does not follow {node:?}");
        Ok(())
    }
}
