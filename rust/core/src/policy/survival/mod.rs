//! The learned order: pages leave by how many hits they promise for the time they would be held.
//!
//! From nothing but the tree and the clock. A block's use says which turn of a conversation it was (how
//! many earlier prompts ended on its path), how long the prompt and its new part were, how long ago the
//! last turn ended, how often the block itself was used. A score fitted to what became of blocks turns that
//! into expected returns; blocks of equal score and equal own uses share a survival curve of the time to the next
//! use; the curve gives the rank of a leaf of that age. A guard sets recency back in whenever it would
//! have done better.

#![allow(clippy::cast_precision_loss, reason = "counts and times become estimates here")]

mod curves;
mod features;
mod fit;
mod guard;
mod levels;
mod ranking;
mod record;
mod scale;
mod score;
mod shadow;

use super::{Cause, History, Policy};
use crate::ids::{NodeId, PageId, STEPS};
use crate::retention::Level;
use curves::{BUCKETS, Curves};
pub(crate) use features::Turn;
use features::{OWN, Request};
use guard::Guard;
use levels::Levels;
use ranking::{DEPTHS, Ranking, Standing};
use record::{Record, Records};
use score::Score;
use shadow::Shadows;

/// New records after which it is time to learn again: few at first, then more.
const LEAST_LESSON: u64 = 64;
const MOST_LESSON: u64 = 1024;
/// Times that after which a lesson is taken for lost.
const LOST: u64 = 16;
/// What computing a block again costs grows with its depth in tokens, by so much.
const DEPTH_TOKENS: f32 = 30_000.0;
/// How much of that counts.
const COST_EXPONENT: f32 = 0.05;
/// Lower ends of the classes of depth, in tokens, and where their cost is taken.
const DEPTH_FROM: [u32; DEPTHS] = [0, 8_192, 32_768, 98_304];
const DEPTH_AT: [f32; DEPTHS] = [3_000.0, 18_000.0, 60_000.0, 150_000.0];

/// What rules, and by how much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// The learned order rules, not recency.
    pub is_learned: bool,
    /// Hit ratio of recency's shadow, lately.
    pub recency: f64,
    /// Hit ratio of the learned order's shadow, lately.
    pub learned: f64,
    /// Times that the rule passed from one to the other.
    pub switches: u64,
    /// Times that the curves were learned.
    pub lessons: u64,
}

/// What is known of a block.
#[derive(Clone, Copy, Default)]
struct Mark {
    /// When a prompt last ended with it; 0 is never.
    ended: u64,
    /// Its latest sample record, plus 1; 0 is none.
    record: u32,
    /// Texts that used it, up to 255.
    uses: u8,
    /// Different blocks that followed it, up to 255.
    kids: u8,
}

/// What is known of a block, and where it stands.
#[derive(Clone, Copy, Default)]
pub(crate) struct Memory {
    mark: Mark,
    standing: Standing,
}

/// Ranks of leaves, and all that they are learned from.
pub(crate) struct Survival {
    /// By page.
    marks: Vec<Mark>,
    standings: Vec<Standing>,
    /// By slot of the history.
    ghosts: Vec<Mark>,
    ranking: Ranking,
    /// Nodes by the page that each would give to the class below, for each class.
    cooling: [Ranking; STEPS],
    /// The same two, of what users retain.
    retained: Levels,
    retained_cooling: [Levels; STEPS],
    records: Records,
    score: Score,
    curves: Curves,
    shadows: Shadows,
    guard: Guard,
    sampled: Vec<(u64, Standing)>,
    /// Records made when it was last learned.
    learned_at: u64,
    is_learning: bool,
    /// Tokens that a block counts for.
    block_tokens: u32,
}

/// What learning needs: a copy, so that it can be done without the lock.
pub struct Lesson {
    records: Records,
    score: Score,
    curves: Curves,
    now: u64,
}

impl Lesson {
    /// Learn from what was copied.
    pub fn learn(&mut self) {
        self.curves.look(&self.records);
        self.score.learn(&self.records, self.curves.horizon, self.now);
        self.curves.learn(&self.records, &self.score, self.now);
    }
}

impl Survival {
    /// `block_tokens`: how many tokens a block stands for.
    pub(crate) fn new(num_pages: usize, block_tokens: u32, is_unguarded: bool) -> Self {
        let weights = DEPTH_AT.map(|depth| COST_EXPONENT * (1.0 + depth / DEPTH_TOKENS).ln());
        let shadows = Shadows::new(num_pages, weights);
        Self {
            marks: vec![Mark::default(); num_pages],
            standings: vec![Standing::default(); num_pages],
            ghosts: Vec::new(),
            ranking: Ranking::new(weights),
            cooling: [0; STEPS].map(|_| Ranking::new(weights)),
            retained: Levels::new(weights),
            retained_cooling: [0; STEPS].map(|_| Levels::new(weights)),
            records: Records::new(num_pages),
            score: Score::new(),
            curves: Curves::new(),
            guard: Guard::new(shadows.capacity(), is_unguarded),
            shadows,
            sampled: Vec::new(),
            learned_at: 0,
            is_learning: false,
            block_tokens,
        }
    }
}

impl Policy for Survival {
    fn cause(&self) -> Cause {
        if self.guard.rules() { Cause::Survival } else { Cause::Recency }
    }

    fn learns(&self) -> bool {
        true
    }

    fn enter(&mut self, page: PageId, back: Option<u32>, now: u64) {
        let mark = back.and_then(|slot| self.ghosts.get(slot as usize));
        self.marks[page.index()] = mark.copied().unwrap_or_default();
        self.standings[page.index()] = Standing { class: (BUCKETS / 2 * DEPTHS) as u16, last: now };
    }

    fn touch(&mut self, history: &History, path: &[PageId], turn: Turn, now: u64) {
        let request = Request::read(history, &mut self.marks, path, turn, self.block_tokens, now);
        let base = request.base(&self.score);
        self.records.note_text(path.len());
        self.sampled.clear();
        for (position, page) in path.iter().enumerate() {
            let (key, mark) = (history.key(*page), &mut self.marks[page.index()]);
            let own = request.own(mark, position);
            let score = base + (0..OWN.len()).map(|i| self.score.weight(OWN[i], own[i])).sum::<f32>();
            let curve = curves::curve(own[0], score);
            let depth = position as u32 * self.block_tokens;
            let deeper = DEPTH_FROM.iter().filter(|from| **from <= depth).count() - 1;
            let standing = Standing { class: (curve * DEPTHS + deeper) as u16, last: now };
            self.standings[page.index()] = standing;
            mark.uses = mark.uses.saturating_add(1);
            if mark.record > 0
                && let Some(record) = self.records.get_mut(mark.record - 1)
            {
                record.again = now;
            }
            mark.record = 0;
            if self.records.is_sampled(key) {
                let features = request.features(own);
                let record = Record { used: now, again: 0, features, key: key as u8 };
                mark.record = (self.records.push(record) as u32).wrapping_add(1);
            }
            if self.shadows.is_sampled(key) {
                self.sampled.push((key, standing));
            }
        }
        let asked = self.sampled.len();
        let hits = self.shadows.touch(&self.sampled, &self.curves, now);
        self.guard.note(asked, hits);
    }

    fn rank(&mut self, node: NodeId, deepest: Option<PageId>) {
        self.ranking.set(node.0, deepest.map(|page| self.standings[page.index()]));
    }

    fn lowest(&mut self, now: u64) -> Option<NodeId> {
        if !self.guard.rules() {
            return None;
        }
        self.ranking.lowest(&self.curves, now).map(NodeId)
    }

    fn cool(&mut self, class: usize, node: NodeId, next: Option<PageId>) {
        self.cooling[class].set(node.0, next.map(|page| self.standings[page.index()]));
    }

    fn coldest(&mut self, class: usize, now: u64) -> Option<NodeId> {
        if !self.guard.rules() {
            return None;
        }
        self.cooling[class].lowest(&self.curves, now).map(NodeId)
    }

    fn rank_at(&mut self, level: Level, node: NodeId, deepest: Option<PageId>) {
        self.retained.set(level, node.0, deepest.map(|page| self.standings[page.index()]));
    }

    fn lowest_at(&mut self, level: Level, now: u64) -> Option<NodeId> {
        if !self.guard.rules() {
            return None;
        }
        self.retained.lowest(level, &self.curves, now).map(NodeId)
    }

    fn cool_at(&mut self, level: Level, class: usize, node: NodeId, next: Option<PageId>) {
        self.retained_cooling[class].set(level, node.0, next.map(|page| self.standings[page.index()]));
    }

    fn coldest_at(&mut self, level: Level, class: usize, now: u64) -> Option<NodeId> {
        if !self.guard.rules() {
            return None;
        }
        self.retained_cooling[class].lowest(level, &self.curves, now).map(NodeId)
    }

    fn alike(&self, pages: &[PageId]) -> usize {
        let standing = |page: &PageId| self.standings[page.index()];
        let Some(last) = pages.last().map(standing) else { return 0 };
        pages.iter().rev().take_while(|page| standing(page) == last).count()
    }

    fn num_ranked(&self) -> Option<usize> {
        Some(self.ranking.len() + self.retained.len())
    }

    fn is_ranked_as(&self, node: NodeId, deepest: PageId) -> bool {
        self.ranking.get(node.0) == Some(self.standings[deepest.index()])
    }

    fn num_cooling(&self, class: usize) -> Option<usize> {
        Some(self.cooling[class].len() + self.retained_cooling[class].len())
    }

    fn is_cooling_as(&self, class: usize, node: NodeId, next: PageId) -> bool {
        self.cooling[class].get(node.0) == Some(self.standings[next.index()])
    }

    fn is_ranked_at(&self, level: Level, node: NodeId, deepest: PageId) -> bool {
        self.retained.get(level, node.0) == Some(self.standings[deepest.index()])
    }

    fn is_cooling_at(&self, level: Level, class: usize, node: NodeId, next: PageId) -> bool {
        self.retained_cooling[class].get(level, node.0) == Some(self.standings[next.index()])
    }

    fn rule(&self) -> Option<Rule> {
        let (recency, learned) = self.guard.ratios();
        Some(Rule {
            is_learned: self.guard.rules(),
            recency,
            learned,
            switches: self.guard.switches,
            lessons: self.curves.version,
        })
    }

    fn remember(&self, pages: &[PageId], memories: &mut Vec<Memory>) {
        let of = |page: &PageId| Memory { mark: self.marks[page.index()], standing: self.standings[page.index()] };
        memories.extend(pages.iter().map(of));
    }

    fn recall(&mut self, page: PageId, memory: &Memory) {
        self.marks[page.index()] = memory.mark;
        self.standings[page.index()] = memory.standing;
    }

    fn bury(&mut self, slot: u32, memory: &Memory) {
        if slot as usize >= self.ghosts.len() {
            self.ghosts.resize(slot as usize + 1, Mark::default());
        }
        self.ghosts[slot as usize] = memory.mark;
    }

    fn relocate(&mut self, from: PageId, to: PageId) {
        self.marks[to.index()] = self.marks[from.index()];
        self.standings[to.index()] = self.standings[from.index()];
    }

    fn lesson(&mut self, now: u64) -> Option<Lesson> {
        let due = (self.records.count / 16).clamp(LEAST_LESSON, MOST_LESSON);
        // A lesson that never came back, its thread lost in a fork, is not waited for for ever.
        let due = if self.is_learning { LOST * MOST_LESSON } else { due };
        if self.records.count < self.learned_at + due {
            return None;
        }
        self.is_learning = true;
        self.learned_at = self.records.count;
        Some(Lesson { records: self.records.clone(), score: self.score.clone(), curves: self.curves.clone(), now })
    }

    fn apply(&mut self, lesson: Lesson) {
        (self.score, self.curves) = (lesson.score, lesson.curves);
        self.is_learning = false;
    }

    fn bytes(&self) -> usize {
        (self.marks.capacity() + self.ghosts.capacity()) * size_of::<Mark>()
            + self.standings.capacity() * size_of::<Standing>()
            + self.ranking.bytes()
            + self.cooling.iter().map(Ranking::bytes).sum::<usize>()
            + self.retained.bytes()
            + self.retained_cooling.iter().map(Levels::bytes).sum::<usize>()
            + self.records.bytes()
            + size_of::<Score>()
            + self.curves.bytes()
            + self.shadows.bytes()
    }
}
