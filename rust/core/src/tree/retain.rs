//! Levels: what leaves before what, whatever the policy says.
//!
//! A node that nobody spoke of stands in the order of recency, as if there were no levels. The others stand
//! *aside*, in an order for each level, and only leaves do: a node that others stand below cannot leave anyway,
//! so it is kept at least as long as what follows it. Nodes of the usual level below which something stands aside
//! are set aside, too, as soon as they would be the oldest: each is once for every time that it was let go of.
//!
//! Time ends lazily, before anybody is chosen and before anything is used: what is in use at its end, or used
//! after it, is as any other from then on.

use super::Tree;
use super::cooling::NEXT;
use crate::ids::{CLASSES, NodeId};
use crate::policy::Cause;
use crate::retention::{Level, Retention};

impl Tree {
    /// True when some node's time ends.
    pub(crate) fn has_expiring(&self) -> bool {
        self.aside.expiring().len() > 0
    }

    /// Pages that users pin, by class.
    pub(crate) fn num_kept(&self) -> [u32; CLASSES] {
        self.aside.kept
    }

    /// Give a node that nobody pins any more its place: the newest of its level.
    pub(super) fn seat(&mut self, node: NodeId) {
        self.stamps += NEXT;
        let it = &mut self.nodes[node.index()];
        it.is_aside = it.level != Level::USUAL;
        it.cooled.stamp = self.stamps;
        if !it.is_aside {
            self.order.push_newest(node);
        }
    }

    /// Give a victim that comes back its place again.
    pub(super) fn reseat(&mut self, node: NodeId) {
        let it = self.at_mut(node);
        it.is_aside = it.level != Level::USUAL;
        if !it.is_aside {
            self.order.push_oldest(node);
        }
        let expires = self.aside.extra(node).expires;
        if expires > 0 {
            self.aside.end_at(expires, node);
        }
    }

    /// Give what was cut off an unpinned node the place above it.
    pub(super) fn seat_above(&mut self, upper: NodeId, lower: NodeId) {
        let it = self.at(lower);
        let (is_aside, stamp) = (it.is_aside, it.cooled.stamp);
        let above = self.at_mut(upper);
        above.is_aside = is_aside;
        above.cooled.stamp = stamp + 1;
        if !is_aside {
            self.order.push_newer_than(upper, lower);
        }
    }

    /// Take a node out of the orders.
    pub(super) fn unseat(&mut self, node: NodeId) {
        let it = self.at_mut(node);
        if !std::mem::take(&mut it.is_aside) {
            self.order.remove(node);
            return;
        }
        let (level, stamp) = (it.level, it.cooled.stamp);
        self.aside.remove(level, stamp, node);
    }

    /// See to it that a node that stands aside is found there exactly while it is a leaf.
    pub(super) fn stand_aside(&mut self, node: NodeId) {
        let it = self.at(node);
        let (level, stamp) = (it.level, it.cooled.stamp);
        if it.is_leaf() {
            self.aside.insert(level, stamp, node);
        } else {
            self.aside.remove(level, stamp, node);
        }
    }

    /// The upper part of a node that was cut in two is retained as the whole was.
    pub(super) fn divide_retention(&mut self, upper: NodeId, lower: NodeId) {
        let extra = self.aside.extra(lower);
        if extra.expires > 0 || extra.keeps > 0 || extra.hints > 0 {
            *self.aside.extra_mut(upper) = extra;
        }
        if extra.expires > 0 {
            self.aside.end_at(extra.expires, upper);
        }
    }

    /// True when both are retained alike, so that they can be one.
    pub(super) fn is_retained_alike(&self, node: NodeId, other: NodeId) -> bool {
        let (own, others) = (self.aside.extra(node), self.aside.extra(other));
        self.at(node).level == self.at(other).level && (own.expires, own.lapses) == (others.expires, others.lapses)
    }

    /// A node left the tree, for now.
    pub(super) fn stop_expiring(&mut self, node: NodeId) {
        let expires = self.aside.extra(node).expires;
        if expires > 0 {
            self.aside.end_never(expires, node);
        }
    }

    /// The same, for good.
    pub(super) fn forget_retention(&mut self, node: NodeId) {
        self.stop_expiring(node);
        self.aside.forget(node);
    }

    /// Let the time of nodes end that is over at `now`.
    pub(crate) fn expire(&mut self, now: u64) {
        while let Some(node) = self.aside.first_to_end(now) {
            let lapses = self.aside.extra(node).lapses;
            let is_used = self.at(node).pins > 0;
            self.set_level(node, if lapses || is_used { Level::USUAL } else { Level::EXPIRED }, 0, false);
        }
    }

    /// Retain a node at a level, until `expires` when that is not 0.
    pub(super) fn set_level(&mut self, node: NodeId, level: Level, expires: u64, lapses: bool) {
        self.stop_expiring(node);
        if expires > 0 || self.aside.extra(node).expires > 0 {
            let extra = self.aside.extra_mut(node);
            (extra.expires, extra.lapses) = (expires, lapses);
        }
        if expires > 0 {
            self.aside.end_at(expires, node);
        }
        if self.at(node).level == level {
            return;
        }
        if self.at(node).pins > 0 || self.at(node).is_root() {
            self.at_mut(node).level = level;
            return;
        }
        self.unseat(node);
        self.warm(node);
        self.unrank(node);
        let it = self.at_mut(node);
        // It keeps its age, so it does not go back into the list, where it would be the newest.
        (it.level, it.is_aside) = (level, true);
        self.wait(node);
        self.rank(node);
    }

    /// Retain the pages from position `from` on, a block's, of a path that the caller pins.
    pub(crate) fn retain_path(&mut self, anchor: NodeId, from: u32, retention: Retention, expires: u64) {
        let mut node = anchor;
        while !self.at(node).is_root() && self.reach(node) > from {
            let start = self.at(node).start;
            if start < from {
                self.split(node, (from - start) as usize);
            }
            // Somebody else uses it at its end: it is as any other.
            let is_over = retention.level() == Level::EXPIRED && self.at(node).pins > 1;
            let level = if is_over { Level::USUAL } else { retention.level() };
            self.set_level(node, level, expires, retention.lapses);
            node = self.at(node).parent;
        }
    }

    /// A match of `matched` tokens, cut to whole blocks when its last page goes on behind it.
    pub(crate) fn in_whole_pages(&self, node: NodeId, matched: u32) -> u32 {
        let (node, _) = self.last_used(node, matched);
        if self.reach(node) > matched { matched >> self.shift << self.shift } else { matched }
    }

    /// Retain what stands before position `from` of a path that the caller pins no less than what stands behind
    /// it. What has no end does not get one.
    pub(crate) fn raise_path(&mut self, anchor: NodeId, from: u32, retention: Retention, expires: u64) {
        let mut node = anchor;
        while !self.at(node).is_root() {
            let (it, extra) = (self.at(node), self.aside.extra(node));
            let ends = (extra.expires > 0, expires > 0);
            let keeps_longer = it.level < retention.level() || extra.expires < expires;
            if it.start < from && ends.0 == ends.1 && it.level <= retention.level() && keeps_longer {
                self.set_level(node, retention.level(), expires, retention.lapses);
            }
            node = self.at(node).parent;
        }
    }

    /// Who leaves next when something stands aside or may: the lowest leaf of the lowest level.
    pub(super) fn next_of_levels(&mut self, now: u64) -> Option<NodeId> {
        let lowest = self.aside.lowest()?;
        if lowest < Level::USUAL {
            return self.lowest_at(lowest, now);
        }
        let mut oldest = self.order.oldest();
        while oldest.is_some() && !self.at(oldest).is_leaf() {
            self.order.remove(oldest);
            self.at_mut(oldest).is_aside = true;
            oldest = self.order.oldest();
        }
        if oldest.is_none() {
            return self.lowest_at(lowest, now);
        }
        let other = self.aside.first(Level::USUAL);
        self.policy.lowest(now).or(match other {
            Some((stamp, node)) if stamp < self.at(oldest).cooled.stamp => Some(node),
            _ => Some(oldest),
        })
    }

    fn lowest_at(&mut self, level: Level, now: u64) -> Option<NodeId> {
        let named = if level == Level::USUAL { self.policy.lowest(now) } else { self.policy.lowest_at(level, now) };
        named.or_else(|| self.aside.first(level).map(|(_, node)| node))
    }

    /// Why a node leaves, where that is not for the policy to say.
    pub(super) fn why(&self, node: NodeId) -> Option<Cause> {
        let level = self.at(node).level;
        if level >= Level::USUAL {
            return None;
        }
        Some(if level == Level::EXPIRED { Cause::Expired } else { Cause::Priority })
    }
}
