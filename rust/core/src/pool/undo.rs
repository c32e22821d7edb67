//! Undoing a plan: its pages return, and victims and demoted pages stand where they stood.

use super::Pool;
use crate::ids::PageId;
use crate::plan::{Demotion, Origin, Plan};
use crate::policy::Cause;

impl Pool {
    /// Undo the plan. Victims of one that was not filled stand where they stood, and so do the sources of
    /// demotions of which nobody said that they were written (`moved`).
    pub fn abandon(&mut self, plan: Plan) {
        self.undo(plan, None);
    }

    /// Undo a filled plan of whose demotions the first ones were `tried`: all of these were written but those at
    /// these places among them. The codec refused their pages, which stay in their class for good.
    pub fn refuse(&mut self, plan: Plan, tried: usize, refused: &[usize]) {
        self.undo(plan, Some((tried, refused)));
    }

    /// Say that the demotions of a filled plan were written: they stay, whatever becomes of it.
    pub fn moved(&mut self, plan: &mut Plan) {
        if plan.is_filled && !plan.demotions.is_empty() {
            plan.is_moved = true;
            self.moving = false;
        }
    }

    fn undo(&mut self, mut plan: Plan, refused: Option<(usize, &[usize])>) {
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
        let sources = plan.reserved.len() - plan.num_given;
        let mut gone: Vec<PageId> = plan.reserved.drain(sources..).collect();
        self.undo_demotions(&plan, refused, &mut gone);
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
            self.tree.refuse(&plan.refused);
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

    /// Take back what was not written, the last first. What stands in a page of full precision again is no longer
    /// `gone`.
    fn undo_demotions(&mut self, plan: &Plan, refused: Option<(usize, &[usize])>, gone: &mut Vec<PageId>) {
        let is_refused = |index: usize| refused.is_some_and(|(tried, of)| index < tried && of.contains(&index));
        let is_undone = |index: usize| match refused {
            Some((tried, _)) => index >= tried || is_refused(index),
            None => !plan.is_moved,
        };
        let classes = self.pages.classes();
        for (index, demotion) in plan.demotions.iter().enumerate().rev() {
            let Demotion { source, target, origin, .. } = *demotion;
            if !is_undone(index) {
                self.totals.demoted_pages += 1;
                self.totals.lowered_pages += u64::from(classes.is_quantized(source));
                continue;
            }
            // A victim's page goes back with it; one that stepped down itself, with that step.
            let is_awaited = match origin {
                Origin::Free => false,
                Origin::Victim => !plan.is_filled,
                Origin::Source => {
                    plan.demotions[..index].iter().position(|earlier| earlier.source == target).is_some_and(is_undone)
                }
            };
            if self.promote(demotion, is_refused(index)) {
                gone.retain(|page| *page != source);
                if !is_awaited {
                    self.pages.free(&[target]);
                }
            } else {
                if classes.is_quantized(source) && !self.pages.is_free(source) {
                    self.pages.free(&[source]);
                }
                if is_awaited && origin == Origin::Victim && self.pages.is_free(target) {
                    self.pages.take_back(target);
                }
            }
        }
    }

    /// Take a demotion back, for good when the codec `refused` the page. Returns false when what was demoted has
    /// left meanwhile: the source holds nothing any more.
    pub(super) fn promote(&mut self, demotion: &Demotion, refused: bool) -> bool {
        let Demotion { source, target, block, place, .. } = *demotion;
        let is_in_tree = self.pages.is_in_tree(target);
        let stands = if is_in_tree { place.and_then(|place| self.tree.find_page(place, target)) } else { None };
        let is_it = |page: Option<&PageId>| page == Some(&target);
        let is_held = || self.sequences.iter().any(|(_, it)| is_it(it.table.get(block as usize)));
        if stands.is_none() && (is_in_tree || place.is_some() || !is_held()) {
            return false;
        }
        if self.pages.is_free(source) {
            self.pages.take_back(source);
        }
        self.move_page(target, source);
        self.replace(block, target, source);
        if let Some(place) = stands {
            self.tree.promote(place, source, refused);
        } else {
            let class = self.pages.classes().of(source);
            for sequence in self.sequences.iter_mut() {
                if sequence.table.get(block as usize) == Some(&source) {
                    let cooled = &mut sequence.cooled[class];
                    *cooled = if refused { (*cooled).max(block + 1) } else { (*cooled).min(block) };
                }
            }
        }
        self.totals.refused_pages += u64::from(refused);
        true
    }
}
