//! The learned order: pages leave by how many hits they promise for the time they would be held.
//!
//! From nothing but the tree and the clock. A block's use says which turn of a conversation it was (how
//! many earlier prompts ended on its path), how long the prompt and its new part were, how long ago the
//! last turn ended, how often the block itself was used. A score learned on line turns that into the odds
//! of a return; blocks of equal odds and equal own uses share a survival curve of the time to the next
//! use; the curve gives the rank of a leaf of that age. A guard sets recency back in whenever it would
//! have done better.

#![allow(clippy::cast_precision_loss, reason = "counts and times become estimates here")]

mod curves;
mod features;
mod guard;
mod ranking;
mod record;
mod score;
mod shadow;

use super::history::History;
use crate::ids::{NodeId, PageId};
use curves::{BUCKETS, Curves};
pub(crate) use features::Turn;
use features::{OWN, Request};
use guard::Guard;
pub(crate) use ranking::Standing;
use ranking::{DEPTHS, Ranking};
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
const COST_EXPONENT: f32 = 0.1;
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

/// Ranks of leaves, and all that they are learned from.
pub(crate) struct Survival {
    standings: Vec<Standing>,
    ranking: Ranking,
    records: Records,
    score: Score,
    curves: Curves,
    shadows: Shadows,
    guard: Guard,
    sampled: Vec<(u64, Standing)>,
    /// Records made when it was last learned.
    learned_at: u64,
    is_learning: bool,
    /// Tokens that a position counts for.
    token_weight: u32,
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
        self.score.learn(&mut self.records, self.curves.horizon, self.now);
        self.curves.learn(&self.records, self.now);
    }
}

impl Survival {
    /// `token_weight`: how many tokens a position of the pool's stands for; 1 but in replays.
    pub(crate) fn new(num_pages: usize, token_weight: u32, is_unguarded: bool) -> Self {
        let weights = DEPTH_AT.map(|depth| COST_EXPONENT * (1.0 + depth / DEPTH_TOKENS).ln());
        let shadows = Shadows::new(num_pages, weights);
        Self {
            standings: vec![Standing::default(); num_pages],
            ranking: Ranking::new(weights),
            records: Records::new(num_pages),
            score: Score::new(),
            curves: Curves::new(),
            guard: Guard::new(shadows.capacity(), is_unguarded),
            shadows,
            sampled: Vec::new(),
            learned_at: 0,
            is_learning: false,
            token_weight,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.standings.capacity() * size_of::<Standing>()
            + self.ranking.bytes()
            + self.records.bytes()
            + size_of::<Score>()
            + self.curves.bytes()
            + self.shadows.bytes()
    }

    /// Where the block in a page stands.
    pub(crate) fn standing(&self, page: PageId) -> Standing {
        self.standings[page.index()]
    }

    pub(crate) fn stand(&mut self, page: PageId, standing: Standing) {
        self.standings[page.index()] = standing;
    }

    /// A page came into the tree while its text still runs.
    pub(crate) fn enter(&mut self, page: PageId, now: u64) {
        self.standings[page.index()] = Standing { class: (BUCKETS / 2 * DEPTHS) as u16, last: now };
    }

    /// A text ended that stood on these pages, all from its beginning on.
    pub(crate) fn touch(&mut self, history: &mut History, path: &[PageId], turn: Turn, block_tokens: u32, now: u64) {
        let block_tokens = block_tokens * self.token_weight;
        let request = Request::read(history, path, turn, block_tokens, now);
        let base = request.base(&self.score);
        self.records.note_text(path.len());
        self.sampled.clear();
        for (position, page) in path.iter().enumerate() {
            let mark = history.mark_mut(*page);
            let own = request.own(mark, position);
            let logit = base + (0..OWN.len()).map(|i| self.score.weight(OWN[i], own[i])).sum::<f32>();
            let curve = features::curve(mark.uses, logit);
            let depth = position as u32 * block_tokens;
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
            if self.records.is_sampled(mark.key) {
                let features = request.features(own);
                let record = Record {
                    used: now,
                    again: 0,
                    features,
                    curve: curve as u8,
                    key: mark.key as u8,
                    is_learned: false,
                };
                mark.record = (self.records.push(record) as u32).wrapping_add(1);
            }
            if self.shadows.is_sampled(mark.key) {
                self.sampled.push((mark.key, standing));
            }
        }
        let asked = self.sampled.len();
        let hits = self.shadows.touch(&self.sampled, &self.curves, now);
        self.guard.note(asked, hits);
    }

    /// Rank a node by its deepest page when it is a leaf that may leave, else take it out.
    pub(crate) fn rank(&mut self, node: NodeId, deepest: Option<PageId>) {
        self.ranking.set(node.0, deepest.map(|page| self.standings[page.index()]));
    }

    /// The leaf to take from, while the learned order rules.
    pub(crate) fn lowest(&mut self, now: u64) -> Option<NodeId> {
        if !self.guard.rules() {
            return None;
        }
        self.ranking.lowest(&self.curves, now).map(NodeId)
    }

    /// How many pages at the end of a leaf stand where the last one does.
    pub(crate) fn alike(&self, pages: &[PageId]) -> usize {
        let standing = |page: &PageId| self.standings[page.index()];
        let Some(last) = pages.last().map(standing) else { return 0 };
        pages.iter().rev().take_while(|page| standing(page) == last).count()
    }

    /// Leaves that are ranked, and where one stands: for `check`.
    pub(crate) fn num_ranked(&self) -> usize {
        self.ranking.len()
    }

    pub(crate) fn is_ranked_as(&self, node: NodeId, deepest: PageId) -> bool {
        self.ranking.get(node.0) == Some(self.standings[deepest.index()])
    }

    /// What rules, and by how much.
    pub(crate) fn rule(&self) -> Rule {
        let (recency, learned) = self.guard.ratios();
        Rule {
            is_learned: self.guard.rules(),
            recency,
            learned,
            switches: self.guard.switches,
            lessons: self.curves.version,
        }
    }

    /// Copy what there is to learn from, when it is time; until `apply` there is no second copy.
    pub(crate) fn lesson(&mut self, now: u64) -> Option<Lesson> {
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

    /// Go by what was learned from now on.
    pub(crate) fn apply(&mut self, lesson: Lesson) {
        self.records.note_learned(&lesson.records);
        (self.score, self.curves) = (lesson.score, lesson.curves);
        self.is_learning = false;
    }
}
