//! A model that knows every block by its text, and who must leave next.

use std::collections::BTreeMap;

use super::*;

/// What the naive model knows of a block: a text, all of it.
#[derive(Clone, Copy, Debug)]
struct Block {
    used: u64,
    /// (priority, has time), or None: its time is over.
    level: Option<(i32, bool)>,
    expires: Option<u64>,
    lapses: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Store { text: Vec<u32>, retention: Option<(Retention, usize)> },
    Retain { text: Vec<u32>, from: usize, to: usize, retention: Retention },
    Wait { microseconds: u64 },
    Evict,
}

struct Naive {
    pool: Pool,
    is_exact: bool,
    pages: usize,
    blocks: BTreeMap<Vec<u32>, Block>,
    now: u64,
    uses: u64,
}

impl Naive {
    fn known(&self, text: &[u32]) -> usize {
        (1..=text.len()).take_while(|end| self.blocks.contains_key(&text[..*end])).count()
    }

    fn expire(&mut self) {
        let now = self.now;
        for block in self.blocks.values_mut().filter(|block| block.expires.is_some_and(|at| at <= now)) {
            (block.level, block.expires) = (block.lapses.then_some((0, false)), None);
        }
    }

    fn use_it(&mut self, text: &[u32], count: usize) {
        self.uses += 1;
        for end in 1..=count {
            let fresh = Block { used: 0, level: Some((0, false)), expires: None, lapses: false };
            let block = self.blocks.entry(text[..end].to_vec()).or_insert(fresh);
            block.used = self.uses;
            block.level = block.level.or(Some((0, false)));
        }
    }

    fn set(&mut self, text: &[u32], ends: std::ops::RangeInclusive<usize>, retention: Retention) {
        for end in ends {
            let block = self.blocks.get_mut(&text[..end]).unwrap();
            let is_over = retention.ttl == Some(0);
            let usual = Some((0, false));
            let over = if retention.lapses { usual } else { None };
            block.level = if is_over { over } else { Some((retention.priority, retention.ttl.is_some())) };
            block.expires = retention.ttl.filter(|ttl| *ttl > 0).map(|ttl| self.now + ttl);
            block.lapses = retention.lapses;
        }
    }

    fn leaves(&self, pinned: &[u32]) -> impl Iterator<Item = (&Vec<u32>, &Block)> {
        let is_leaf = |text: &[u32]| !self.blocks.keys().any(|it| it.len() > text.len() && it.starts_with(text));
        self.blocks.iter().filter(move |(text, _)| is_leaf(text) && !pinned.starts_with(text))
    }

    /// The pool took `count` blocks: those that had to go, and in the learned order, in some order, of the levels
    /// that had to. Returns whether there is such an order.
    fn lose(&mut self, count: usize, pinned: &[u32]) -> bool {
        if count == 0 {
            return true;
        }
        let lowest = self.leaves(pinned).map(|(_, block)| block.level).min();
        let mut candidates: Vec<(Vec<u32>, Block)> = self
            .leaves(pinned)
            .filter(|(_, block)| Some(block.level) == lowest)
            .map(|(text, block)| (text.clone(), *block))
            .collect();
        candidates.sort_by_key(|(_, block)| block.used);
        if self.is_exact {
            candidates.truncate(1);
        }
        for (text, block) in candidates {
            if found(&self.pool, &text) < text.len() {
                self.blocks.remove(&text);
                if self.lose(count - 1, pinned) {
                    return true;
                }
                self.blocks.insert(text, block);
            }
        }
        false
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Store { text, retention } => {
                self.expire();
                let known = self.known(&text);
                let fits = text.len() <= self.pages;
                let lost = (self.blocks.len() + text.len() - known).saturating_sub(self.pages);
                let done = compute(&mut self.pool, &text, retention);
                assert_eq!(done.is_ok(), fits);
                let count = if fits { text.len() } else { known };
                if fits {
                    self.use_it(&text, known);
                    assert!(self.lose(lost, &text[..known]), "others had to leave");
                }
                self.use_it(&text, count);
                if let Some((retention, from)) = retention {
                    self.set(&text, from.min(count) + 1..=count, retention);
                    self.raise(&text, from.min(count), retention);
                }
                if let Ok(id) = done {
                    self.pool.close(id);
                }
            }
            Step::Retain { text, from, to, retention } => {
                let end = to.min(text.len());
                let done = self.pool.retain(SPACE, &text, from..to, retention);
                if from > end {
                    assert!(matches!(done, Err(Error::Argument(_))));
                    return;
                }
                let known = self.known(&text[..end]);
                assert_eq!(done, Ok(known));
                if known > 0 {
                    self.expire();
                    self.use_it(&text, known);
                    self.set(&text, from + 1..=known, retention);
                }
            }
            Step::Wait { microseconds } => {
                self.now += 1_000 * microseconds;
                self.pool.set_time(self.now);
            }
            Step::Evict => {
                self.expire();
                let count = self.pool.evict(1);
                assert_eq!(count, usize::from(!self.blocks.is_empty()));
                assert!(self.lose(count, &[]), "another had to leave");
            }
        }
    }

    fn raise(&mut self, text: &[u32], count: usize, retention: Retention) {
        let level = Some((retention.priority, retention.ttl.is_some()));
        let over = if retention.lapses { Some((0, false)) } else { None };
        let level = if retention.ttl == Some(0) { over } else { level };
        let expires = retention.ttl.filter(|ttl| *ttl > 0).map_or(0, |ttl| self.now + ttl);
        for end in 1..=count {
            let block = self.blocks.get_mut(&text[..end]).unwrap();
            let before = block.expires.unwrap_or(0);
            let longer = block.level < level || before < expires;
            if (before > 0) == (expires > 0) && block.level <= level && longer {
                (block.level, block.lapses) = (level, retention.lapses);
                block.expires = (expires > 0).then_some(expires);
            }
        }
    }

    fn check(&self) {
        self.pool.check().unwrap();
        let now = self.pool.statistics();
        assert_eq!(now.sealed_pages as usize, self.blocks.len());
        for text in self.blocks.keys() {
            assert_eq!(found(&self.pool, text), text.len(), "{text:?} was to stay");
        }
        let causes = now.evicted_lru_pages
            + now.evicted_survival_pages
            + now.evicted_ttl_pages
            + now.evicted_priority_pages
            + now.evicted_asked_pages;
        assert_eq!(causes, now.evicted_pages);
    }
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let text = || prop::collection::vec(0..2u32, 1..5);
    let retention = || {
        // Use moves the clock of the learned order on, by less than this.
        let ttl = prop::option::of(prop_oneof![Just(0u64), (1..30u64).prop_map(|ttl| 1_000 * ttl + 500)]);
        (-2..3i32, ttl, any::<bool>()).prop_map(|(priority, ttl, lapses)| Retention { priority, ttl, lapses })
    };
    let step = prop_oneof![
        6 => (text(), prop::option::weighted(0.4, (retention(), 0..4usize)))
            .prop_map(|(text, retention)| Step::Store { text, retention }),
        4 => (text(), 0..3usize, 0..6usize, retention())
            .prop_map(|(text, from, to, retention)| Step::Retain { text, from, to, retention }),
        2 => (1..20u64).prop_map(|microseconds| Step::Wait { microseconds }),
        4 => Just(Step::Evict),
    ];
    prop::collection::vec(step, 1..60)
}

pub(crate) fn walk(pool: Pool, is_exact: bool, steps: Vec<Step>) {
    let pages = pool.num_pages();
    let mut naive = Naive { pool, is_exact, pages, blocks: BTreeMap::new(), now: 1_000, uses: 0 };
    naive.pool.set_time(naive.now);
    for step in steps {
        naive.step(step);
        naive.check();
    }
}
