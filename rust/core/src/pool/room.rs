//! Room for a step: which pages of full precision it gets, and who gives them.
//!
//! Free ones first. When they are short, the coldest page of a whole block is *demoted*: a page of the next class
//! down takes its place. When none of those is free, the coldest page of that class is demoted likewise, and when
//! the last class has none free either, the coldest leaves are evicted until one has. What others hold is demoted
//! only when nothing else is left to give, and never under a step that may be reading it.

use super::Pool;
use super::held::{Candidate, Held};
use crate::error::{Error, Result};
use crate::ids::{PageId, STEPS};
use crate::plan::{Demotion, Origin, Plan};
use crate::tree::Gift;

/// What there is to demote, and to demote into, beside what is free and what nobody holds.
#[derive(Default)]
struct Supply {
    /// Victims' pages of each quantized class, the next to use last.
    targets: [Vec<PageId>; STEPS],
    /// Pages in use of each class, the next to use last.
    held: [Vec<Candidate>; STEPS],
}

/// A page to demote into, and where it comes from.
type Target = (PageId, Origin);

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
        let count = count.min(self.tree.num_given(0));
        self.take_gifts(&mut plan, count, Supply::default());
        self.totals.plans += 1;
        Ok(plan)
    }

    /// Return what must be demoted of what is held, so that `needed` pages can be reserved; or refuse.
    pub(super) fn find_room(&self, plan: &Plan, needed: usize) -> Result<Held> {
        if self.moving {
            return Err(Error::Argument("the demotions of another plan are not written yet".into()));
        }
        let free = self.pages.num_free(0);
        if needed <= free {
            return Ok(Held::default());
        }
        let short = needed - free;
        let evictable = self.tree.num_evictable_quantized();
        let full = self.tree.num_evictable() - evictable.iter().sum::<usize>();
        let room = [0, 1].map(|step| self.pages.num_free(step + 1) + evictable[step]);
        let mut want = [0; STEPS];
        if room != [0; STEPS] {
            want[0] = short.saturating_sub(self.tree.num_given(0));
        }
        if room[1] > 0 {
            want[1] = short.saturating_sub(self.pages.num_free(1) + self.tree.num_given(1));
        }
        let held = self.held_pages(plan, want);
        // Were all to leave that may, so many pages in use could step down.
        let targets = room[0] + held.found[1].len().min(room[1]);
        let evictable = full + held.found[0].len().min(targets);
        if short > evictable {
            let total = self.pages.classes().0[0] as usize;
            return Err(Error::Capacity { needed, free, evictable, total });
        }
        Ok(held)
    }

    /// Reserve `needed` pages of full precision. `find_room` said that they are there.
    pub(super) fn take_room(&mut self, plan: &mut Plan, needed: usize, held: Held) {
        plan.num_taken = needed.min(self.pages.num_free(0));
        self.pages.take(plan.num_taken, &mut plan.reserved);
        if needed == plan.num_taken {
            return;
        }
        let mut supply = Supply { held: held.found, ..Supply::default() };
        self.evict_for(plan, needed, &mut supply);
        supply.held.iter_mut().for_each(|held| held.reverse());
        self.take_gifts(plan, needed, supply);
    }

    /// Take pages of full precision until `needed` are reserved: what is coldest, then what is held.
    fn take_gifts(&mut self, plan: &mut Plan, needed: usize, mut supply: Supply) {
        let mut targets = self.make_targets(plan, needed - plan.reserved.len(), &mut supply);
        while plan.reserved.len() + plan.num_given < needed {
            let now = self.moment(plan);
            if let Some(Gift::Tail(node)) = self.tree.coldest(0, now) {
                let first = plan.victim_pages.len();
                self.tree.condemn_tail(node, &mut plan.victim_pages, &mut plan.victims);
                self.claim(plan, first);
                continue;
            }
            let Some(target) = targets.pop().or_else(|| self.take_target(&mut supply, 1)) else { break };
            self.step_down(plan, &mut supply, 0, target);
            plan.num_given += 1;
        }
        self.take_back_steps(plan, targets.len());
        let Plan { reserved, demotions, num_given, .. } = plan;
        let given = &demotions[demotions.len() - *num_given..];
        reserved.extend(given.iter().map(|demotion| demotion.source));
        plan.num_evicted = plan.victim_pages.len();
        self.moving = !plan.demotions.is_empty();
    }

    /// Have as many pages of the first quantized class step down as others need the room of, up to `count`, and
    /// return their pages, the next to use last. They go first: no page steps down twice in a plan.
    fn make_targets(&mut self, plan: &mut Plan, count: usize, supply: &mut Supply) -> Vec<Target> {
        let room = self.pages.num_free(1) + supply.targets[0].len();
        let gifts = self.tree.num_given(1) + supply.held[1].len();
        for _ in 0..count.saturating_sub(room).min(gifts) {
            let Some(target) = self.take_target(supply, 2) else { break };
            self.step_down(plan, supply, 1, target);
        }
        plan.demotions.iter().rev().map(|demotion| (demotion.source, Origin::Source)).collect()
    }

    /// Undo the last of these steps, for nobody needed their room: tails left instead.
    fn take_back_steps(&mut self, plan: &mut Plan, count: usize) {
        let steps = plan.demotions.len() - plan.num_given;
        for demotion in plan.demotions.drain(steps - count..steps).rev() {
            self.promote(&demotion, false);
            match demotion.origin {
                Origin::Victim => self.pages.set_aside(&[demotion.target]),
                _ => self.pages.free(&[demotion.target]),
            }
        }
    }

    /// Demote the coldest page of a class, else one that is held, into `target`.
    fn step_down(&mut self, plan: &mut Plan, supply: &mut Supply, class: usize, (target, origin): (PageId, Origin)) {
        let now = self.moment(plan);
        let candidate = if let Some(Gift::Whole(node, index)) = self.tree.coldest(class, now) {
            let (page, block) = (self.tree.page_at(node, index), self.tree.block_of(node, index));
            Candidate { page, block, place: Some((node, index)) }
        } else if let Some(candidate) = supply.held[class].pop() {
            self.replace(candidate.block, candidate.page, target);
            candidate
        } else {
            unreachable!("find_room has counted what there is to give");
        };
        let Candidate { page: source, block, place } = candidate;
        self.move_page(source, target);
        if let Some((node, index)) = place {
            self.tree.put(node, index, target);
        }
        plan.demotions.push(Demotion { source, target, origin, block, place });
    }

    /// A page of a class to demote into.
    fn take_target(&mut self, supply: &mut Supply, class: usize) -> Option<Target> {
        let free = self.pages.take_one(class).map(|page| (page, Origin::Free));
        free.or_else(|| supply.targets[class - 1].pop().map(|page| (page, Origin::Victim)))
    }

    /// Evict until nobody else must leave: until there are as many quantized pages as are still lacking, or can
    /// be had by steps further down, and as many pages to demote into them.
    fn evict_for(&mut self, plan: &mut Plan, needed: usize, supply: &mut Supply) {
        let now = self.moment(plan);
        plan.cause = Some(self.tree.policy.cause());
        loop {
            let short = needed - plan.reserved.len();
            let room = [0, 1].map(|step| self.pages.num_free(step + 1) + supply.targets[step].len());
            let gifts = [0, 1].map(|class| self.tree.num_given(class) + supply.held[class].len());
            let lacking = short.saturating_sub(gifts[0].min(room[0] + gifts[1].min(room[1])));
            if lacking == 0 {
                supply.targets.iter_mut().for_each(|targets| targets.reverse());
                return;
            }
            let first = plan.victim_pages.len();
            self.tree.condemn(lacking, now, &mut plan.victim_pages, &mut plan.victims);
            for page in self.claim(plan, first) {
                supply.targets[self.pages.classes().of(page) - 1].push(page);
            }
        }
    }

    /// Make condemned pages private: those of full precision are reserved, the others are returned.
    fn claim(&mut self, plan: &mut Plan, first: usize) -> Vec<PageId> {
        self.note_victims(plan, first);
        let classes = self.pages.classes();
        let condemned = &plan.victim_pages[first..];
        let (quantized, full): (Vec<PageId>, Vec<PageId>) =
            condemned.iter().partition(|page| classes.is_quantized(**page));
        self.tree.take_refused(condemned, &mut plan.refused);
        self.pages.claim(&full);
        self.pages.set_aside(&quantized);
        plan.reserved.extend(full);
        quantized
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
