//! Room for a step: which pages of full precision it gets, and who gives them.
//!
//! Free ones first. When they are short, the coldest page of a whole block is *demoted*: a quantized page takes
//! its place, and when none of those is free, the coldest leaves are evicted until one is. What others hold is
//! demoted only when nothing else is left to give, and never under a step that may be reading it.

use super::Pool;
use super::held::Candidate;
use crate::error::{Error, Result};
use crate::ids::PageId;
use crate::plan::{Demotion, Plan};
use crate::tree::Gift;

impl Pool {
    /// Plan a step without rows that takes up to `count` pages of full precision from the coldest that nobody
    /// holds: whole blocks are demoted as long as quantized pages are free, tails leave. Abandoned once it was
    /// filled, it leaves those pages free.
    pub fn plan_demotion(&mut self, count: usize) -> Result<Plan> {
        let mut plan = self.spare.take().unwrap_or_default();
        if let Err(error) = self.find_room(&plan, 0) {
            self.retire(plan);
            return Err(error);
        }
        let count = count.min(self.tree.num_given());
        self.take_gifts(&mut plan, count, &mut Vec::new(), Vec::new());
        self.totals.plans += 1;
        Ok(plan)
    }

    /// Return what must be demoted of what is held, so that `needed` pages can be reserved; or refuse.
    pub(super) fn find_room(&self, plan: &Plan, needed: usize) -> Result<Vec<Candidate>> {
        if self.moving {
            return Err(Error::Argument("the demotions of another plan are not written yet".into()));
        }
        let free = self.pages.num_free();
        if needed <= free {
            return Ok(Vec::new());
        }
        let short = needed - free;
        let evictable = self.tree.num_evictable() - self.tree.num_evictable_quantized();
        let targets = self.pages.num_free_quantized() + self.tree.num_evictable_quantized();
        let held = match short.checked_sub(self.tree.num_given()) {
            Some(want @ 1..) if targets > 0 => self.held_pages(plan, want),
            _ => Vec::new(),
        };
        let evictable = evictable + held.len().min(targets);
        if short > evictable {
            let total = self.pages.classes().num_full as usize;
            return Err(Error::Capacity { needed, free, evictable, total });
        }
        Ok(held)
    }

    /// Reserve `needed` pages of full precision. `find_room` said that they are there.
    pub(super) fn take_room(&mut self, plan: &mut Plan, needed: usize, held: Vec<Candidate>) {
        plan.num_taken = needed.min(self.pages.num_free());
        self.pages.take(plan.num_taken, &mut plan.reserved);
        if needed == plan.num_taken {
            return;
        }
        let mut targets = self.evict_for(plan, needed, held.len());
        self.take_gifts(plan, needed, &mut targets, held);
    }

    /// Take pages of full precision until `needed` are reserved: what is coldest, then what is `held`.
    fn take_gifts(&mut self, plan: &mut Plan, needed: usize, targets: &mut Vec<PageId>, held: Vec<Candidate>) {
        let mut held = held.into_iter();
        while plan.reserved.len() + plan.demotions.len() < needed {
            let place = match self.tree.coldest() {
                Some(Gift::Tail(node)) => {
                    let first = plan.victim_pages.len();
                    self.tree.condemn_tail(node, &mut plan.victim_pages, &mut plan.victims);
                    self.claim(plan, first);
                    continue;
                }
                Some(Gift::Whole(node, index)) => Some((node, index)),
                None => None,
            };
            let Some(target) = self.target(plan, targets) else { break };
            if let Some((node, index)) = place {
                let source = self.tree.demote(node, index, target);
                self.move_page(source, target);
                let block = self.tree.block_of(node, index);
                plan.demotions.push(Demotion { source, target, block, place });
            } else if let Some(Candidate { page, block, place }) = held.next() {
                if let Some((node, index)) = place {
                    self.tree.demote(node, index, target);
                }
                self.move_page(page, target);
                self.replace(block, page, target);
                plan.demotions.push(Demotion { source: page, target, block, place });
            } else {
                unreachable!("find_room has counted what there is to give");
            }
        }
        let Plan { reserved, demotions, .. } = plan;
        reserved.extend(demotions.iter().map(|demotion| demotion.source));
        plan.num_evicted = plan.victim_pages.len();
        self.moving = !plan.demotions.is_empty();
    }

    /// Evict until nobody else must leave: until there are as many quantized pages as are still lacking, and as
    /// many pages to demote into them. Returns the quantized pages gained, the next to use last.
    fn evict_for(&mut self, plan: &mut Plan, needed: usize, held: usize) -> Vec<PageId> {
        let (now, mut targets) = (self.clock.now(), Vec::new());
        plan.left = now;
        plan.cause = Some(self.tree.policy.cause());
        loop {
            let short = needed - plan.reserved.len();
            let room = self.pages.num_free_quantized() + targets.len();
            let lacking = short.saturating_sub(room.min(self.tree.num_given() + held));
            if lacking == 0 {
                targets.reverse();
                return targets;
            }
            let first = plan.victim_pages.len();
            self.tree.condemn(lacking, now, &mut plan.victim_pages, &mut plan.victims);
            targets.extend(self.claim(plan, first));
        }
    }

    /// Make condemned pages private: those of full precision are reserved, the others are returned.
    fn claim(&mut self, plan: &mut Plan, first: usize) -> Vec<PageId> {
        self.note_victims(plan, first);
        let classes = self.pages.classes();
        let condemned = &plan.victim_pages[first..];
        let (quantized, full): (Vec<PageId>, Vec<PageId>) =
            condemned.iter().partition(|page| classes.is_quantized(**page));
        self.pages.claim(&full);
        self.pages.set_aside(&quantized);
        plan.reserved.extend(full);
        quantized
    }

    fn target(&mut self, plan: &mut Plan, targets: &mut Vec<PageId>) -> Option<PageId> {
        let target = self.pages.take_quantized();
        plan.num_targets_taken += usize::from(target.is_some());
        target.or_else(|| targets.pop())
    }

    /// Have every sequence that reads `page` at that block read `other` there.
    pub(super) fn replace(&mut self, block: u32, page: PageId, other: PageId) {
        for sequence in self.sequences.iter_mut() {
            if let Some(entry) = sequence.table.get_mut(block as usize).filter(|entry| **entry == page) {
                *entry = other;
            }
        }
    }
}
