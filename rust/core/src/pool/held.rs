//! What may be demoted although sequences hold it: their block tables are patched.
//!
//! Never what a step under way may be reading, and never the newest page of a text: it is the next to be
//! written, copied or cut.

use std::collections::HashSet;

use super::Pool;
use crate::ids::{NodeId, PageId, STEPS, SequenceId};
use crate::plan::Plan;

/// A page in use that may be demoted.
pub(crate) struct Candidate {
    pub page: PageId,
    pub block: u32,
    pub place: Option<(NodeId, usize)>,
}

/// Candidates of each class, as many as are wanted.
#[derive(Default)]
pub(super) struct Held {
    pub found: [Vec<Candidate>; STEPS],
    want: [usize; STEPS],
}

impl Held {
    fn is_full(&self, class: usize) -> bool {
        self.found[class].len() == self.want[class]
    }
}

impl Pool {
    /// Up to `want` pages of each class that sequences hold and that may be demoted: of those at rest first, then
    /// of the rows of the plan itself; the earliest of each first, and never the newest page of any.
    pub(super) fn held_pages(&self, plan: &Plan, want: [usize; STEPS]) -> Held {
        let mut held = Held { want, ..Held::default() };
        if want == [0; STEPS] {
            return held;
        }
        let classes = self.pages.classes();
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
                    if self.tree.is_kept(node) {
                        continue;
                    }
                    for class in 0..STEPS {
                        let wanted = held.want[class] - held.found[class].len();
                        let may = self.tree.can_cool(node, class).filter(|(_, page)| !newest.contains(page));
                        for (index, page) in may.take(wanted) {
                            let block = self.tree.block_of(node, index);
                            held.found[class].push(Candidate { page, block, place: Some((node, index)) });
                        }
                    }
                }
                let first = (sequence.sealed >> self.shift) as usize;
                let end = ((sequence.frozen >> self.shift) as usize).min(sequence.table.len().saturating_sub(1));
                for block in first..end.max(first) {
                    let page = sequence.table[block];
                    let class = classes.of(page);
                    let may = class < STEPS && block as u32 >= sequence.cooled[class] && self.pages.is_mutable(page);
                    if may && !held.is_full(class) {
                        held.found[class].push(Candidate { page, block: block as u32, place: None });
                    }
                }
                if (0..STEPS).all(|class| held.is_full(class)) {
                    return held;
                }
            }
        }
        held
    }
}
