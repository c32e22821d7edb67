//! Undoing a plan: its pages return, and victims and demoted pages stand where they stood.

use super::Pool;
use crate::ids::PageId;
use crate::plan::{Demotion, Plan};
use crate::policy::Cause;

impl Pool {
    /// Undo the plan. Victims of one that was not filled stand where they stood, and so do the sources of
    /// demotions of which nobody said that they were written (`moved`).
    pub fn abandon(&mut self, plan: Plan) {
        self.undo(plan, None);
    }

    /// Undo a filled plan of whose demotions all were written but those with these targets: the codec refused
    /// their pages, which keep full precision for good.
    pub fn refuse(&mut self, plan: Plan, targets: &[PageId]) {
        self.undo(plan, Some(targets));
    }

    /// Say that the demotions of a filled plan were written: they stay, whatever becomes of it.
    pub fn moved(&mut self, plan: &mut Plan) {
        if plan.is_filled && !plan.demotions.is_empty() {
            plan.is_moved = true;
            self.moving = false;
        }
    }

    fn undo(&mut self, mut plan: Plan, refused: Option<&[PageId]>) {
        self.totals.abandoned_plans += 1;
        for row in plan.rows.iter().filter(|row| plan.touches(row)) {
            let Some(sequence) = self.sequences.find_mut(row.sequence) else { continue };
            sequence.planned = false;
            if plan.appended {
                sequence.tail.pop();
            }
            sequence.table.truncate(row.pages as usize);
            if let Some(source) = sequence.replaced.take() {
                sequence.table[(row.length >> self.shift) as usize] = source;
            }
        }
        let sources = plan.reserved.len() - plan.demotions.len();
        let mut gone: Vec<PageId> = plan.reserved.drain(sources..).collect();
        let demotions = std::mem::take(&mut plan.demotions);
        for (index, demotion) in demotions.iter().enumerate().rev() {
            let is_undone = refused.map_or(!plan.is_moved, |targets| targets.contains(&demotion.target));
            if !is_undone {
                self.totals.demoted_pages += 1;
                continue;
            }
            let is_victims = !plan.is_filled && index >= plan.num_targets_taken;
            if self.promote(demotion, refused.is_some()) {
                gone.retain(|page| *page != demotion.source);
                if !is_victims {
                    self.pages.free(&[demotion.target]);
                }
            } else if is_victims && self.pages.is_free(demotion.target) {
                self.pages.take_back(demotion.target);
            }
        }
        plan.demotions = demotions;
        self.pages.free(&gone);
        self.moving &= plan.is_moved || plan.demotions.is_empty();
        let victims = plan.reserved.split_off(plan.num_taken);
        if plan.is_filled {
            self.pages.free(&victims);
        } else {
            for page in &plan.victim_pages {
                self.pages.seal(*page);
            }
            self.recall(&plan);
            self.tree.restore(&mut plan.victims, &plan.victim_pages, &mut self.duplicates);
            self.tree.forget_refused(&self.duplicates);
            self.totals.evicted_pages += self.duplicates.len() as u64;
            let orphans = std::mem::take(&mut self.duplicates);
            self.forget_orphans(&orphans, plan.cause.unwrap_or(Cause::Asked));
            self.pages.free(&orphans);
        }
        self.pages.free(&plan.reserved);
        for row in &plan.rows {
            self.close_if_closing(row.sequence);
        }
        self.retire(plan);
    }

    /// Take a demotion back, for good when the codec `refused` the page. Returns false when what was demoted has
    /// left meanwhile: the source holds nothing any more.
    fn promote(&mut self, demotion: &Demotion, refused: bool) -> bool {
        let Demotion { source, target, block, place } = *demotion;
        let is_back = if self.pages.is_in_tree(target) {
            place.is_some_and(|place| self.tree.promote(place, target, source, refused))
        } else {
            let is_it = |page: Option<&PageId>| page == Some(&target);
            place.is_none() && self.sequences.iter().any(|(_, it)| is_it(it.table.get(block as usize)))
        };
        if !is_back {
            return false;
        }
        self.move_page(target, source);
        self.replace(block, target, source);
        if place.is_none() {
            for sequence in self.sequences.iter_mut() {
                if sequence.table.get(block as usize) == Some(&source) {
                    sequence.cooled = if refused { sequence.cooled.max(block + 1) } else { sequence.cooled.min(block) };
                }
            }
        }
        self.totals.refused_pages += u64::from(refused);
        true
    }
}
