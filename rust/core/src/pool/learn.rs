//! What a pool remembers of use, and the learned order that is made of it.

use std::hash::{BuildHasher, RandomState};

use super::Pool;
use crate::error::Result;
use crate::ids::{PageId, SequenceId};
use crate::policy::{Cause, History, Lesson, Memory, Rule, Survival, Turn};

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
        self.tree.learned = Some(Box::new(Survival::new(pages, options.token_weight, options.is_unguarded)));
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
        self.tree.learned.as_ref().map(|learned| learned.rule())
    }

    /// Copy what there is to learn from, when it is time. Learn without the lock, then `apply`.
    pub fn lesson(&mut self) -> Option<Lesson> {
        let now = self.clock.now();
        self.tree.learned.as_mut().and_then(|learned| learned.lesson(now))
    }

    /// Go by what was learned from now on.
    pub fn apply(&mut self, lesson: Lesson) {
        if let Some(learned) = &mut self.tree.learned {
            learned.apply(lesson);
        }
    }

    /// Blocks that left and are remembered by their ids.
    pub fn num_ghosts(&self) -> usize {
        self.history.num_ghosts()
    }

    /// Why a page that is needed now would leave.
    pub(super) fn ruling(&self) -> Cause {
        match &self.tree.learned {
            Some(learned) if learned.rule().is_learned => Cause::Survival,
            _ => Cause::Recency,
        }
    }

    /// What is known of the block in a page.
    pub(super) fn memory(&self, page: PageId) -> Memory {
        Memory {
            mark: *self.history.mark(page),
            standing: self.tree.learned.as_ref().map(|learned| learned.standing(page)).unwrap_or_default(),
        }
    }

    /// A page holds the block again that it held when this was asked for.
    pub(super) fn recall(&mut self, page: PageId, memory: Memory) {
        *self.history.mark_mut(page) = memory.mark;
        if let Some(learned) = &mut self.tree.learned {
            learned.stand(page, memory.standing);
        }
    }

    /// The block in a page is in another one from now on, with all that is known of it.
    pub(super) fn move_page(&mut self, from: PageId, to: PageId) {
        self.pages.hand_over(from, to);
        let memory = self.memory(from);
        self.recall(to, memory);
    }

    /// Blocks of which this was known left the tree.
    pub(super) fn forget(&mut self, cause: Option<Cause>, memories: impl Iterator<Item = Memory>) {
        let now = self.clock.now();
        for memory in memories {
            self.history.bury(memory.mark, now, cause.unwrap_or(Cause::Asked));
        }
    }

    /// Pages left the tree.
    pub(super) fn remember(&mut self, pages: &[PageId], cause: Cause) {
        let now = self.clock.now();
        for page in pages {
            self.history.leave(*page, now, cause);
        }
    }

    /// Work out the keys of a sequence's blocks from `first` on, before their tokens go to the tree.
    pub(super) fn name_blocks(&mut self, id: SequenceId, first: usize, tokens: usize) {
        self.keys.clear();
        self.path.clear();
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let above = first.checked_sub(1).map(|above| sequence.table[above]);
        let mut key = above.map_or(sequence.root_key, |page| self.history.mark(page).key);
        for (block, page) in sequence.tail[..tokens].chunks(1 << self.shift).zip(&sequence.table[first..]) {
            key = History::follow(key, block);
            self.keys.push(key);
            self.path.push(*page);
        }
    }

    /// Note which of the named blocks brought a page into the tree, those that `stays` holds for.
    pub(super) fn note_entered(&mut self, stays: impl Fn(usize, PageId) -> bool) {
        let now = self.clock.now();
        for (index, (page, key)) in self.path.iter().zip(&self.keys).enumerate() {
            if !stays(index, *page) {
                continue;
            }
            self.totals.returned_pages += u64::from(self.history.enter(*page, *key));
            if let Some(learned) = &mut self.tree.learned {
                learned.enter(*page, now);
            }
        }
    }

    /// A sequence closes: its path, with the tail it left behind, was used.
    pub(super) fn note_use(&mut self, id: SequenceId, tail: Option<PageId>) {
        let Some(learned) = &mut self.tree.learned else { return };
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
        learned.touch(&mut self.history, &self.path, turn, 1 << self.shift, now);
        if self.learns_at_once
            && let Some(mut lesson) = learned.lesson(now)
        {
            lesson.learn();
            learned.apply(lesson);
        }
    }
}
