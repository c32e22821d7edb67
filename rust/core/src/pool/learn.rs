//! What a pool remembers of use, and the learned order that is made of it.

use std::hash::{BuildHasher, RandomState};

use super::Pool;
use crate::error::Result;
use crate::ids::{PageId, SequenceId};
use crate::plan::Plan;
use crate::policy::{Cause, History, Lesson, Memory, Rule, Survival, Trail, Turn};

/// How the learned order is kept.
#[derive(Clone, Copy, Debug)]
pub struct Adaptive {
    /// Makes samples the same in every run; none is drawn.
    pub seed: Option<u64>,
    /// Tokens that a position stands for: 1 but in replays.
    pub token_weight: u32,
    /// Learn in the call that finds it is time, so that runs repeat; else `lesson` is asked for.
    pub learns_at_once: bool,
    /// Recency never rules, even where it does better: to see what the guard is worth.
    pub is_unguarded: bool,
}

pub(super) fn random_seed() -> u64 {
    RandomState::new().hash_one(0u8)
}

impl Pool {
    /// Rank leaves by what they promise from now on. For a pool that was not used yet.
    pub fn adapt(&mut self, options: Adaptive) {
        let pages = self.num_pages();
        self.history = History::new(pages, options.seed.unwrap_or_else(random_seed));
        self.learns_at_once = options.learns_at_once;
        let block_tokens = options.token_weight << self.shift;
        self.tree.policy = Box::new(Survival::new(pages, block_tokens, options.is_unguarded));
    }

    /// Stop following the machine's clock: it is so many microseconds until set again. What is learned is
    /// then learned at once, so that every run is the same.
    pub fn set_time(&mut self, microseconds: u64) {
        self.learns_at_once = true;
        self.clock.set(microseconds);
    }

    /// Let a sequence stand for a text of other lengths than its own: a replayed one.
    pub fn describe(&mut self, id: SequenceId, prompt: u32, output: u32) -> Result<()> {
        self.sequences.at_rest(id)?.turn = Some(Turn { prompt, output });
        Ok(())
    }

    /// Who rules, and by how much; none where nothing is learned.
    pub fn rule(&self) -> Option<Rule> {
        self.tree.policy.rule()
    }

    /// Copy what there is to learn from, when it is time. Learn without the lock, then `apply`.
    pub fn lesson(&mut self) -> Option<Lesson> {
        let now = self.clock.now();
        self.tree.policy.lesson(now)
    }

    /// Go by what was learned from now on.
    pub fn apply(&mut self, lesson: Lesson) {
        self.tree.policy.apply(lesson);
    }

    /// Blocks that left and are remembered by their ids.
    pub fn num_ghosts(&self) -> usize {
        self.history.num_ghosts()
    }

    /// The block in a page is in another one from now on, with all that is known of it.
    pub(super) fn move_page(&mut self, from: PageId, to: PageId) {
        self.pages.hand_over(from, to);
        self.history.name(to, self.history.key(from));
        self.tree.policy.relocate(from, to);
    }

    /// When a plan's victims, and those who step down, are chosen: asked of the clock once.
    pub(super) fn moment(&mut self, plan: &mut Plan) -> u64 {
        if plan.left == 0 {
            plan.left = self.clock.now();
        }
        plan.left
    }

    /// Write down what is known of the blocks in a plan's victims, from the `first` one on.
    pub(super) fn note_victims(&mut self, plan: &mut Plan, first: usize) {
        self.moment(plan);
        let pages = &plan.victim_pages[first..];
        plan.keys.extend(pages.iter().map(|page| self.history.key(*page)));
        self.tree.policy.remember(pages, &mut plan.memories);
    }

    /// The victims of a plan stand where they stood, and hold what they held.
    pub(super) fn recall(&mut self, plan: &Plan) {
        for (page, key) in plan.victim_pages.iter().zip(&plan.keys) {
            self.history.name(*page, *key);
        }
        for (page, memory) in plan.victim_pages.iter().zip(&plan.memories) {
            self.tree.policy.recall(*page, memory);
        }
    }

    /// The victims of a plan left the tree.
    pub(super) fn forget(&mut self, plan: &Plan, cause: Cause) {
        let (mut keys, mut memories) = (plan.keys.as_slice(), plan.memories.as_slice());
        for victim in &plan.victims {
            let (own, rest) = keys.split_at(victim.count());
            keys = rest;
            let why = victim.why().unwrap_or(cause);
            self.totals.evicted_by[why as usize] += own.len() as u64;
            let mut slot = self.history.bury(own, plan.left, why);
            let (own, rest) = memories.split_at(victim.count().min(memories.len()));
            memories = rest;
            for memory in own {
                self.tree.policy.bury(slot, memory);
                slot = self.history.behind(slot);
            }
        }
    }

    /// Pages that nobody could put back have left the tree, each on its own.
    pub(super) fn forget_orphans(&mut self, pages: &[PageId], cause: Cause) {
        let now = self.clock.now();
        self.totals.evicted_by[cause as usize] += pages.len() as u64;
        let mut memory: Vec<Memory> = Vec::new();
        for page in pages {
            memory.clear();
            self.tree.policy.remember(&[*page], &mut memory);
            let slot = self.history.bury(&[self.history.key(*page)], now, cause);
            if let Some(memory) = memory.first() {
                self.tree.policy.bury(slot, memory);
            }
        }
    }

    /// Work out the keys of a sequence's blocks from `first` on, before their tokens go to the tree.
    pub(super) fn name_blocks(&mut self, id: SequenceId, first: usize, tokens: usize) {
        self.keys.clear();
        self.path.clear();
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let above = first.checked_sub(1).map(|above| sequence.table[above]);
        let mut key = above.map_or(sequence.root_key, |page| self.history.key(page));
        let blocks = sequence.tail[..tokens].chunks(1 << self.shift);
        self.path.extend_from_slice(&sequence.table[first..first + blocks.len()]);
        self.keys.extend(blocks.map(|block| {
            key = self.history.follow(key, block);
            key
        }));
    }

    /// Note which of the named blocks brought their pages into the tree: those that are still in the table from
    /// `first` on. The others were there already.
    pub(super) fn note_entered(&mut self, id: SequenceId, first: usize) {
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let learns = self.tree.policy.learns();
        let now = if learns { self.clock.now() } else { 0 };
        let mut trail = Trail::default();
        for ((page, key), entered) in self.path.iter().zip(&self.keys).zip(&sequence.table[first..]) {
            if entered != page {
                self.history.close(&mut trail);
                continue;
            }
            let back = self.history.enter(*page, *key, &mut trail);
            self.totals.returned_pages += u64::from(back.is_some());
            if learns {
                self.tree.policy.enter(*page, back, now);
            }
        }
        self.history.close(&mut trail);
    }

    /// A sequence closes: its path, with the tail it left behind, was used.
    pub(super) fn note_use(&mut self, id: SequenceId, tail: Option<PageId>) {
        if !self.tree.policy.learns() {
            return;
        }
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        self.path.clear();
        self.path.extend_from_slice(&sequence.table[..(sequence.sealed >> self.shift) as usize]);
        self.path.extend(tail);
        if self.path.is_empty() {
            return;
        }
        let prompt = sequence.prompt.min(sequence.length);
        let turn = sequence.turn.unwrap_or(Turn { prompt, output: sequence.length - prompt });
        let now = self.clock.tick();
        self.tree.policy.touch(&self.history, &self.path, turn, now);
        if self.learns_at_once
            && let Some(mut lesson) = self.tree.policy.lesson(now)
        {
            lesson.learn();
            self.tree.policy.apply(lesson);
        }
    }
}
