//! Changing a sequence between steps: append, fork, truncate.

use super::{Pool, check_tokens};
use crate::error::{Error, Result};
use crate::ids::SequenceId;
use crate::sequence::Sequence;

impl Pool {
    /// Add tokens that wait to be computed.
    pub fn append(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        let known = self.sequences.at_rest(id)?.known();
        Self::check_length(known, tokens.len())?;
        check_tokens(tokens, 0)?;
        self.sequences.at_rest(id)?.tail.extend_from_slice(tokens);
        Ok(())
    }

    /// Open a second sequence over the same pages.
    ///
    /// The path is pinned once more; private pages get a second holder, and whoever writes into a
    /// partly filled one first copies it.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let parent = self.sequences.at_rest(id)?;
        let (anchor, sealed) = (parent.anchor, parent.sealed);
        let copy = Sequence {
            table: parent.table.clone(),
            tail: parent.tail.clone(),
            replaced: None,
            turn: None,
            planned: false,
            closing: false,
            ..*parent
        };
        for page in &copy.table[(sealed >> self.shift) as usize..] {
            if !self.pages.is_in_tree(*page) {
                self.pages.hold(*page);
            }
        }
        self.tree.pin_path(anchor);
        let (id, fork) = self.sequences.insert();
        *fork = copy;
        Ok(id)
    }

    /// Say that the first `length` tokens are final: pages of whole blocks of them may be quantized, though
    /// they are never sealed. Sealed ones always may.
    pub fn freeze(&mut self, id: SequenceId, length: usize) -> Result<()> {
        let sequence = self.sequences.at_rest(id)?;
        if length > sequence.length as usize {
            return Err(Error::Argument(format!("cannot freeze {length} of {} tokens", sequence.length)));
        }
        sequence.frozen = length as u32;
        Ok(())
    }

    /// Let others find the first `length` tokens at most; blocks sealed before stay sealed.
    ///
    /// What lies behind is sealed by the first commit after the bound was raised again.
    pub fn share_up_to(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.sequences.at_rest(id)?.shareable = length.try_into().unwrap_or(u32::MAX);
        Ok(())
    }

    /// Seal only what `verify` names from here on. What is computed now counts as verified.
    pub fn require_verification(&mut self, id: SequenceId) -> Result<()> {
        let sequence = self.sequences.get_mut(id)?;
        sequence.verified = Some(sequence.length);
        Ok(())
    }

    /// Say that K and V of the first `length` tokens are what the namespace says, those of an open plan included.
    ///
    /// The next commit, or the end of the sequence, seals their blocks. A smaller number than before changes
    /// nothing.
    pub fn verify(&mut self, id: SequenceId, length: usize) -> Result<()> {
        let sequence = self.sequences.get_mut(id)?;
        if length > sequence.known() as usize {
            return Err(Error::Argument(format!("cannot verify {length} of {} tokens", sequence.known())));
        }
        sequence.verified = sequence.verified.map(|verified| verified.max(length as u32));
        Ok(())
    }

    /// Drop every token from position `length` on, pending ones included.
    ///
    /// Where that ends inside a sealed page the page becomes a borrowed one, as after a match.
    pub fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        let sequence = self.sequences.at_rest(id)?;
        if length > sequence.known() as usize {
            return Err(Error::Argument(format!(
                "cannot truncate to {length}: the sequence has {} tokens",
                sequence.known()
            )));
        }
        let length = length as u32;
        if length >= sequence.sealed {
            sequence.tail.truncate((length - sequence.sealed) as usize);
        } else {
            let sealed = length >> self.shift << self.shift;
            sequence.tail.clear();
            self.tree.copy_tokens(sequence.anchor, sealed, length, &mut sequence.tail);
        }
        let was_sealed = (sequence.sealed >> self.shift) as usize;
        sequence.sealed = sequence.sealed.min(length >> self.shift << self.shift);
        sequence.length = sequence.length.min(length);
        sequence.frozen = sequence.frozen.min(length);
        sequence.verified = sequence.verified.map(|verified| verified.min(length));
        sequence.cooled = sequence.cooled.map(|blocks| blocks.min(length >> self.shift));
        let kept = (sequence.length as usize).div_ceil(1 << self.shift);
        for page in sequence.table[kept.max(was_sealed).min(sequence.table.len())..].iter().rev() {
            self.pages.release(*page);
        }
        sequence.table.truncate(kept);
        let pinned = match sequence.table.get((sequence.sealed >> self.shift) as usize) {
            Some(page) if self.pages.is_in_tree(*page) => sequence.sealed + (1 << self.shift),
            _ => sequence.sealed,
        };
        sequence.anchor = self.tree.cut(sequence.anchor, pinned);
        Ok(())
    }
}
