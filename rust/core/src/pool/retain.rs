//! What users say of texts: that they are pinned, until when they are wanted, and before which others they leave.

use std::ops::Range;

use super::pins::{Pin, PinId};
use super::{Pool, check_tokens};
use crate::error::{Error, Result};
use crate::ids::{CLASSES, Namespace, NodeId, PageId, SequenceId};
use crate::retention::Retention;

impl Pool {
    /// Say how many pages of each class users may pin, as a share of them.
    pub fn bound_pins(&mut self, share: f64) -> Result<()> {
        if !(0.0..1.0).contains(&share) {
            return Err(Error::Argument(format!("the share that may be pinned must lie in [0, 1), not {share}")));
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
        let of = |count: u32| (f64::from(count) * share) as u32;
        self.most_kept = self.pages.classes().0.map(of);
        Ok(())
    }

    /// How many pages users may pin as pages lie now: of the quantized classes no more than are in use.
    pub(super) fn most_pinned(&self) -> u64 {
        let classes = self.pages.classes().0;
        (0..CLASSES)
            .map(|class| match class {
                0 => self.most_kept[0],
                _ => self.most_kept[class].min(classes[class] - self.pages.num_free(class) as u32),
            })
            .map(u64::from)
            .sum()
    }

    /// Have tokens of a cached text leave before or after others: those of the range as far as they are cached,
    /// in whole blocks, and the part of one that a closed sequence left behind. What was said of them before is
    /// replaced. Counts as a use. Returns the tokens from the beginning on up to which it holds.
    ///
    /// What stands before the range never leaves before it. At its end what is in use then, and what is used
    /// later, is as any other.
    pub fn retain(
        &mut self,
        namespace: Namespace,
        tokens: &[u32],
        range: Range<usize>,
        retention: Retention,
    ) -> Result<usize> {
        retention.check()?;
        let end = range.end.min(tokens.len());
        if range.start > end {
            let what = format!("start={} lies behind the end of the range, {end}", range.start);
            return Err(Error::Argument(what));
        }
        check_tokens(tokens, 0)?;
        self.expire();
        let Some((node, matched)) = self.find(namespace, &tokens[..end]) else { return Ok(0) };
        let matched = self.tree.in_whole_pages(node, matched);
        let anchor = self.tree.anchor(node, matched);
        let from = range.start.next_multiple_of(1 << self.shift) as u32;
        let expires = self.end_of(retention.ttl);
        self.tree.retain_path(anchor, from, retention, expires);
        self.tree.unpin_path(anchor);
        Ok(matched as usize)
    }

    /// Say as what the text of a sequence is to be retained once it closes, from position `from` on; None: as any
    /// other.
    ///
    /// What stands before `from` is others', too: it is never retained for a shorter time, or at a lower priority,
    /// for it.
    pub fn retain_sequence(&mut self, id: SequenceId, retention: Option<Retention>, from: usize) -> Result<()> {
        retention.unwrap_or_default().check()?;
        self.sequences.get_mut(id)?.retention = retention.map(|retention| (retention, from));
        Ok(())
    }

    /// A sequence that left `tail` behind closes: retain its text.
    pub(super) fn retain_closing(&mut self, id: SequenceId, tail: Option<PageId>) {
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let Some((retention, from)) = sequence.retention else { return };
        if tail.is_none() {
            // The page that it borrowed, if it did, is somebody else's text.
            sequence.anchor = self.tree.cut(sequence.anchor, sequence.sealed);
        }
        let anchor = sequence.anchor;
        let from = from.min(sequence.length as usize).next_multiple_of(1 << self.shift) as u32;
        let expires = self.end_of(retention.ttl);
        self.tree.retain_path(anchor, from, retention, expires);
        self.tree.raise_path(anchor, from, retention, expires);
    }

    /// Pin a cached text: as far as it is cached its pages neither leave nor step down, until it is unpinned or
    /// `ttl` microseconds are over. Returns the pin and how many tokens it holds.
    ///
    /// Refuses what would be more than users may pin.
    pub fn pin(&mut self, namespace: Namespace, tokens: &[u32], ttl: Option<u64>) -> Result<(PinId, usize)> {
        check_tokens(tokens, 0)?;
        self.expire();
        let (node, matched) = match self.find(namespace, tokens) {
            Some(found) => found,
            None => (self.tree.root(namespace), 0),
        };
        let (needed, pinned) = (self.tree.num_unkept(node, matched), self.tree.num_kept());
        let total = self.pages.classes().0;
        for class in 0..CLASSES {
            let [needed, pinned, most, total] =
                [needed[class], pinned[class], self.most_kept[class], total[class]].map(|count| count as usize);
            if needed > 0 && pinned + needed > most {
                return Err(Error::Pinned { needed, pinned, most, total });
            }
        }
        let anchor = self.tree.anchor(node, matched);
        self.tree.keep_path(anchor);
        let expires = self.end_of(ttl.map(|ttl| ttl.max(1)));
        let pin = Pin { anchor, namespace, expires, is_users: true };
        Ok((self.pins.insert(pin), matched as usize))
    }

    /// Keep a cached text from leaving for somebody who waits for it, as long as hints hold at most `most` pages, each
    /// counted once, whoever else holds it; None when that would be more, or nothing is cached. Whoever needs room
    /// unpins it first.
    pub fn hint(&mut self, namespace: Namespace, tokens: &[u32], most: usize) -> Result<Option<(PinId, usize)>> {
        check_tokens(tokens, 0)?;
        self.expire();
        let Some((node, matched)) = self.find(namespace, tokens) else { return Ok(None) };
        let anchor = self.tree.anchor(node, matched);
        if self.tree.num_hinted() + self.tree.num_unhinted(anchor) > most {
            self.tree.unpin_path(anchor);
            return Ok(None);
        }
        self.tree.hint_path(anchor);
        let pin = Pin { anchor, namespace, expires: 0, is_users: false };
        Ok(Some((self.pins.insert(pin), matched as usize)))
    }

    /// Let go of a pin. Nothing happens when it has ended.
    pub fn unpin(&mut self, id: PinId) {
        let Some(pin) = self.pins.remove(id) else { return };
        if pin.is_users {
            self.tree.unkeep_path(pin.anchor);
        } else {
            self.tree.unhint_path(pin.anchor);
        }
        self.tree.unpin_path(pin.anchor);
    }

    /// True while a pin holds its pages.
    pub fn is_pinned(&self, id: PinId) -> bool {
        self.pins.contains(id)
    }

    pub(super) fn unpin_all(&mut self, namespace: Namespace) {
        for id in self.pins.of(namespace) {
            self.unpin(id);
        }
    }

    /// Let end what ends by now: pins first, so that what they held can be the first to leave.
    pub(super) fn expire(&mut self) {
        if !self.pins.has_expiring() && !self.tree.has_expiring() {
            return;
        }
        let now = self.clock.now();
        while let Some(id) = self.pins.first_to_end(now) {
            self.unpin(id);
        }
        self.tree.expire(now);
    }

    /// When a time ends that begins now; 0 for what has none, or none left.
    fn end_of(&self, ttl: Option<u64>) -> u64 {
        ttl.filter(|ttl| *ttl > 0).map_or(0, |ttl| self.clock.now().saturating_add(ttl))
    }

    /// Where a text ends in the tree, and how much of it is cached; none where nothing is.
    fn find(&self, namespace: Namespace, tokens: &[u32]) -> Option<(NodeId, u32)> {
        let (node, matched) = self.tree.walk(self.tree.find_root(namespace)?, tokens);
        (matched > 0).then_some((node, matched))
    }
}
