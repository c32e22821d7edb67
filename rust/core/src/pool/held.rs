//! What may be demoted although sequences hold it: their block tables are patched.
//!
//! Never what a step under way may be reading, and never the newest page of a text: it is the next to be
//! written, copied or cut.

use std::collections::HashSet;

use super::Pool;
use crate::ids::{NodeId, PageId, SequenceId};
use crate::plan::Plan;

/// A page in use that may be demoted.
pub(crate) struct Candidate {
    pub page: PageId,
    pub block: u32,
    pub place: Option<(NodeId, usize)>,
}

impl Pool {
    /// Up to `want` pages that sequences hold and that may be demoted: of those at rest first, then of the rows
    /// of the plan itself; the earliest of each first, and never the newest page of any.
    pub(super) fn held_pages(&self, plan: &Plan, want: usize) -> Vec<Candidate> {
        let own: HashSet<SequenceId> =
            plan.rows.iter().filter(|row| plan.touches(row)).map(|row| row.sequence).collect();
        let newest: HashSet<PageId> =
            self.sequences.iter().filter_map(|(_, sequence)| sequence.table.last().copied()).collect();
        let mut seen: HashSet<NodeId> = HashSet::new();
        for (id, sequence) in self.sequences.iter() {
            if sequence.planned && !own.contains(&id) {
                seen.extend(self.tree.path(sequence.anchor));
            }
        }
        let mut found = Vec::new();
        for is_own in [false, true] {
            for (id, sequence) in self.sequences.iter() {
                if own.contains(&id) != is_own || sequence.planned != is_own {
                    continue;
                }
                let mut path: Vec<NodeId> =
                    self.tree.path(sequence.anchor).take_while(|node| !seen.contains(node)).collect();
                path.reverse();
                for node in path {
                    seen.insert(node);
                    for (index, page) in self.tree.can_cool(node) {
                        if found.len() == want {
                            return found;
                        }
                        if !newest.contains(&page) {
                            let block = self.tree.block_of(node, index);
                            found.push(Candidate { page, block, place: Some((node, index)) });
                        }
                    }
                }
                let first = sequence.cooled.max(sequence.sealed >> self.shift) as usize;
                let end = ((sequence.frozen >> self.shift) as usize).min(sequence.table.len().saturating_sub(1));
                for block in first..end.max(first) {
                    let page = sequence.table[block];
                    if found.len() == want {
                        return found;
                    }
                    if self.pages.is_mutable(page) && !self.pages.classes().is_quantized(page) {
                        found.push(Candidate { page, block: block as u32, place: None });
                    }
                }
            }
        }
        found
    }
}
