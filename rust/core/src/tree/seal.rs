//! Sealing: full blocks of a sequence enter the tree, where equal ones may already be, and at its end
//! the part of a block that it leaves behind.

use super::cooling::Cooled;
use super::find::common_prefix;
use super::{Node, Tree};
use crate::ids::{NodeId, PageId};
use crate::retention::Level;

/// What one sequence seals at once.
pub(crate) struct Sealing<'a> {
    /// Deepest pinned node; position `from` lies in it or at its end.
    pub anchor: NodeId,
    /// Tokens sealed so far, a multiple of the block size.
    pub from: u32,
    /// Tokens to seal: full blocks, or, of a tail, the beginning of one.
    pub count: usize,
    /// Tokens from `from` on. The sealed ones are taken out.
    pub tail: &'a mut Vec<u32>,
    /// One page for each block to seal, in whole or in part. Where the tree has an equal block, its page is put here.
    pub pages: &'a mut [PageId],
    /// Pages replaced that way, and tail pages that the tree has no more use for.
    pub duplicates: &'a mut Vec<PageId>,
}

impl Tree {
    /// Put blocks below the anchor and return the new anchor, its path pinned.
    ///
    /// Someone else may have sealed the same text since: walk what is equal, branch off where it
    /// differs. A leaf that only this sequence holds just grows, so a conversation stays one run.
    pub(crate) fn seal(&mut self, mut sealing: Sealing<'_>) -> NodeId {
        let count = sealing.count;
        let (mut node, mut taken) = (sealing.anchor, 0);
        loop {
            self.trim(node);
            let Node { start, ref run, .. } = *self.at(node);
            let offset = sealing.from as usize + taken - start as usize;
            let equal = common_prefix(&run[offset..], &sealing.tail[taken..count]);
            let (offset, length) = (offset + equal, run.len());
            if equal > 0 {
                self.adopt(node, &mut sealing, taken..taken + equal);
                taken += equal;
            }
            if taken == count && count & ((1 << self.shift) - 1) != 0 {
                // Tokens that a pinned node still names, though their page has left: not worth a place.
                sealing.duplicates.extend_from_slice(sealing.pages);
                return node;
            }
            if offset < length {
                let upper = self.split(node, offset);
                self.unpin(node);
                node = upper;
            } else if taken < count
                && let Some(child) = self.children.get(&self.nodes, node, sealing.tail[taken])
            {
                self.pin(child);
                node = child;
                continue;
            }
            break;
        }
        if taken == count {
            sealing.tail.drain(..count);
            return node;
        }
        self.grow(node, sealing, taken..count)
    }

    /// Take the tree's pages for the blocks that end in the given range of the tail.
    fn adopt(&self, node: NodeId, sealing: &mut Sealing<'_>, range: std::ops::Range<usize>) {
        let Node { start, ref pages, .. } = *self.at(node);
        let block = |position: u32| (position >> self.shift) as usize;
        let base = block(sealing.from);
        let first = block(sealing.from + range.start as u32);
        let last = block(sealing.from + range.end as u32);
        if first == last {
            return;
        }
        let theirs = &pages[first - block(start)..last - block(start)];
        for (mine, theirs) in sealing.pages[first - base..last - base].iter_mut().zip(theirs) {
            sealing.duplicates.push(std::mem::replace(mine, *theirs));
        }
    }

    /// Add the rest of the blocks at the end of `node`: in place, or as a child.
    fn grow(&mut self, node: NodeId, sealing: Sealing<'_>, range: std::ops::Range<usize>) -> NodeId {
        let Sealing { from, tail, pages, duplicates, .. } = sealing;
        let start = from + range.start as u32;
        let pages = &pages[((start >> self.shift) - (from >> self.shift)) as usize..];
        self.sealed += pages.len();
        let (quantized, has_tail) = (self.classes.count(pages), self.has_tail(node));
        let end = self.at_mut(node);
        // One of another level keeps that to itself: nobody said it of what follows.
        if end.pins == 1 && end.is_leaf() && !end.pages.is_empty() && end.level == Level::USUAL {
            // The block that the tail begins is in `pages`, longer. Nobody else can be copying it.
            if has_tail {
                duplicates.extend(end.pages.pop());
            }
            end.run.extend_from_slice(&tail[range.clone()]);
            end.pages.extend_from_slice(pages);
            for (count, more) in end.cooled.quantized.iter_mut().zip(quantized) {
                *count += more;
            }
            tail.drain(..range.end);
            self.sealed -= usize::from(has_tail);
            return node;
        }
        let run = if range.start == 0 {
            let rest = tail.split_off(range.end);
            let mut run = std::mem::replace(tail, rest);
            if run.capacity() > run.len() + run.len() / 8 {
                run.shrink_to_fit();
            }
            run
        } else {
            tail.drain(..range.end).skip(range.start).collect()
        };
        let (parent, pages) = (node, pages.to_vec());
        let cooled = Cooled { quantized, ..Cooled::default() };
        let leaf = self.insert(Node { run, pages, start, parent, pins: 1, cooled, ..Node::default() });
        self.link(leaf);
        leaf
    }
}
