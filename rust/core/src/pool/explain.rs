//! Why a text is not found, or not all of it: evicted, different from some position on, or never seen.

use super::Pool;
use crate::error::Result;
use crate::ids::{Namespace, PageId};
use crate::policy::Cause;

/// What is cached of a text, and what became of the rest. The three counts add up to its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Leading tokens that are cached.
    pub cached: usize,
    /// Tokens behind them that were cached and left, as far as that is remembered: whole blocks.
    pub evicted: usize,
    /// The rest: nobody asked for it yet, or so long ago that it is forgotten.
    pub unseen: usize,
    /// Why the first block of the evicted ones left, and how many microseconds ago.
    pub left: Option<(Cause, u64)>,
}

impl Pool {
    /// Say why a text is not found, or not all of it. Changes nothing.
    pub fn explain(&self, namespace: Namespace, tokens: &[u32]) -> Result<Explanation> {
        let cached = self.matched(namespace, tokens)?;
        let whole = cached >> self.shift;
        let mut key = self.history.root(namespace);
        if whole > 0
            && let Some(root) = self.tree.find_root(namespace)
        {
            let (node, _) = self.tree.walk(root, tokens);
            let mut pages = vec![PageId(0); whole];
            self.tree.copy_pages(node, &mut pages);
            key = self.history.key(pages[whole - 1]);
        }
        let (mut known, mut left, mut before) = (cached, None, None);
        let mut end = whole << self.shift;
        for block in tokens[end..].chunks(1 << self.shift) {
            key = self.history.follow(key, block);
            let Some(ghost) = self.history.find(key, before) else { break };
            before = Some(ghost);
            left = left.or(Some((ghost.cause, self.clock.now().saturating_sub(ghost.left))));
            end += block.len();
            known = end;
        }
        Ok(Explanation { cached, evicted: known - cached, unseen: tokens.len() - known, left })
    }
}
