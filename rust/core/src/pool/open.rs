//! Opening a sequence on what is cached, and reading it back.

use super::{Pool, check_tokens};
use crate::error::{Error, Result};
use crate::ids::{Namespace, PageId, SequenceId};

/// How a sequence is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Whose prefixes are searched and extended.
    pub namespace: Namespace,
    /// Match what is cached.
    pub reuse: bool,
    /// Seal full blocks into the tree.
    pub share: bool,
    /// Round the match down to a multiple of this.
    pub align: usize,
}

impl Pool {
    /// Open a sequence on the longest cached prefix, pin that prefix, and return how long it is.
    ///
    /// At most all but one of the tokens are matched, so that there is one left to compute. A match
    /// that ends inside a block borrows that page; the first plan to write copies it.
    pub fn open(&mut self, tokens: &[u32], options: OpenOptions) -> Result<(SequenceId, usize)> {
        let OpenOptions { namespace, reuse, share, align } = options;
        if align == 0 {
            return Err(Error::Argument("align must be at least 1, not 0".into()));
        }
        Self::check_length(0, tokens.len())?;
        self.expire();
        let (mut node, mut matched) = (None, 0);
        if reuse && let Some(root) = self.tree.find_root(namespace) {
            let (deepest, length) = self.tree.walk(root, &tokens[..tokens.len().saturating_sub(1)]);
            matched = length as usize;
            matched -= matched % align;
            node = Some(deepest);
        }
        let sealed = matched >> self.shift << self.shift;
        check_tokens(&tokens[matched..], matched)?;
        let node = if matched > 0 { node } else { None };
        let node = node.unwrap_or_else(|| self.tree.root(namespace));
        let anchor = self.tree.anchor(node, matched as u32);
        let (id, sequence) = self.sequences.insert();
        sequence.anchor = anchor;
        sequence.root_key = self.history.root(namespace);
        sequence.prompt = tokens.len() as u32;
        sequence.shareable = if share { u32::MAX } else { 0 };
        sequence.sealed = sealed as u32;
        sequence.length = matched as u32;
        sequence.tail.extend_from_slice(&tokens[sealed..]);
        sequence.table.resize(matched.div_ceil(1 << self.shift), PageId(0));
        self.tree.copy_pages(anchor, &mut sequence.table);
        self.totals.opens += 1;
        self.totals.queried_tokens += tokens.len() as u64;
        self.totals.cached_tokens += matched as u64;
        Ok((id, matched))
    }

    /// Tokens with K and V in pages.
    pub fn length(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequences.get(id)?.length as usize)
    }

    /// Tokens that wait to be computed.
    pub fn pending(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequences.get(id)?.pending() as usize)
    }

    /// Pages in order.
    pub fn block_table(&self, id: SequenceId) -> Result<&[PageId]> {
        Ok(&self.sequences.get(id)?.table)
    }

    /// All tokens, pending ones included.
    pub fn tokens(&self, id: SequenceId) -> Result<Vec<u32>> {
        let sequence = self.sequences.get(id)?;
        let mut tokens = Vec::with_capacity(sequence.known() as usize);
        self.tree.copy_tokens(sequence.anchor, 0, sequence.sealed, &mut tokens);
        tokens.extend_from_slice(&sequence.tail);
        Ok(tokens)
    }

    /// Positions are 32 bits wide, with room to round up.
    pub(super) fn check_length(known: u32, more: usize) -> Result<()> {
        let length = known as usize + more;
        if length > i32::MAX as usize {
            return Err(Error::Argument(format!("a sequence holds at most {} tokens, not {length}", i32::MAX)));
        }
        Ok(())
    }
}
