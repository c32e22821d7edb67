//! Matching: how far a text is known, and which pages hold it.

use super::{Node, Tree};
use crate::ids::{NodeId, PageId};

/// Tokens compared at once: long runs at the speed of memory, and little to search in at the end.
const CHUNK: usize = 256;

/// Return how many leading tokens are equal.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    let length = a.len().min(b.len());
    let (a, b) = (&a[..length], &b[..length]);
    let equal = a.chunks(CHUNK).zip(b.chunks(CHUNK)).take_while(|(a, b)| a == b).count();
    let from = (equal * CHUNK).min(length);
    let differs = a[from..].iter().zip(&b[from..]).position(|(a, b)| a != b);
    differs.map_or(length, |offset| from + offset)
}

impl Tree {
    /// Follow `tokens` from `root`. Returns the deepest node touched and how many tokens are cached,
    /// counting only those whose page is there.
    pub(crate) fn walk(&self, root: NodeId, tokens: &[u32]) -> (NodeId, u32) {
        let (mut node, mut matched) = (root, 0);
        while let Some(token) = tokens.get(matched) {
            let Some(child) = self.children.get(&self.nodes, node, *token) else { break };
            let run = &self.at(child).run;
            let equal = common_prefix(run, &tokens[matched..]);
            matched += equal;
            node = child;
            if equal < run.len() {
                break;
            }
        }
        (node, self.held(node, matched as u32))
    }

    /// Cut a match that ends in `node` to what pages hold.
    fn held(&self, node: NodeId, position: u32) -> u32 {
        let position = position.min(if self.at(node).is_leaf() { self.reach(node) } else { position });
        let floor = position >> self.shift << self.shift;
        if position == floor || self.holder(node, self.block_end(position)).is_some() { position } else { floor }
    }

    /// The node at or below `node` that holds the page of the block ending at `block_end`, any of
    /// them: below a node that ends in the middle of the block, each child has its own.
    pub(super) fn holder(&self, mut node: NodeId, block_end: u32) -> Option<NodeId> {
        while self.covered(node) < block_end {
            node = self.at(node).first_child;
            if node.is_none() {
                return None;
            }
        }
        Some(node)
    }

    /// True when `tokens`, which follow position `from` of the path to `anchor`, are all found.
    pub(crate) fn contains(&self, anchor: NodeId, from: u32, tokens: &[u32]) -> bool {
        let (mut node, mut found) = (anchor, 0);
        loop {
            let Node { start, ref run, .. } = *self.at(node);
            let run = &run[from as usize + found - start as usize..];
            let equal = common_prefix(run, &tokens[found..]);
            found += equal;
            let Some(token) = tokens.get(found) else { break };
            match self.children.get(&self.nodes, node, *token) {
                Some(child) if equal == run.len() => node = child,
                _ => return false,
            }
        }
        let end = from + found as u32;
        self.held(node, end) == end
    }

    /// Write the pages of the first `table.len()` blocks on the path to `node`.
    pub(crate) fn copy_pages(&self, mut node: NodeId, table: &mut [PageId]) {
        let mut missing = table.len();
        while missing > 0 {
            let Node { start, parent, ref pages, .. } = *self.at(node);
            let first = (start >> self.shift) as usize;
            if first < missing {
                table[first..missing].copy_from_slice(&pages[..missing - first]);
                missing = first;
            }
            node = parent;
        }
    }

    /// Append tokens `[from, to)` of the path to `node`.
    pub(crate) fn copy_tokens(&self, mut node: NodeId, from: u32, to: u32, out: &mut Vec<u32>) {
        let base = out.len();
        out.resize(base + to.saturating_sub(from) as usize, 0);
        let mut missing = to;
        while missing > from {
            let Node { start, parent, ref run, .. } = *self.at(node);
            if start < missing {
                let first = start.max(from);
                let target = base + (first - from) as usize..base + (missing - from) as usize;
                out[target].copy_from_slice(&run[(first - start) as usize..(missing - start) as usize]);
                missing = first;
            }
            node = parent;
        }
    }
}
