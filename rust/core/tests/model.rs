//! The pool against a naive model: sequences are vectors of tokens, pages are arrays of digests.
//!
//! Whoever fills a plan writes, into every slot it was given, a digest of the namespace and of all
//! tokens up to that position, as attention would write K and V that depend on exactly those. After
//! each step every slot of every sequence must hold what it should. A page that was evicted,
//! shared or written too early shows up as a wrong digest.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::similar_names, clippy::type_complexity, reason = "the model speaks of steps, stems and texts")]

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use kvhybrid_core::{Error, Namespace, OpenOptions, Plan, Pool, SequenceId};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[derive(Clone, Debug)]
enum Step {
    Open { namespace: u64, stem: usize, keep: usize, tokens: Vec<u32>, reuse: bool, share: bool, align: usize },
    Append { of: usize, tokens: Vec<u32> },
    Plan { rows: Vec<usize>, counts: Option<Vec<usize>>, tokens: Option<u32> },
    Fill { of: usize },
    Commit { of: usize },
    Abandon { of: usize },
    PlanAndAbandon { rows: Vec<usize> },
    Fork { of: usize },
    Truncate { of: usize, length: usize },
    Share { of: usize, length: usize },
    Close { of: usize },
    Evict { pages: usize },
    Drop { namespace: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tokens = || prop::collection::vec(0..3u32, 0..24);
    let rows = || prop::collection::vec(0..8usize, 1..4);
    let counts = || prop::option::of(prop::collection::vec(0..12usize, 4));
    let step = prop_oneof![
        6 => (0..2u64, 0..8usize, 0..40usize, tokens(), prop::bool::weighted(0.9), prop::bool::weighted(0.85), 1..6usize)
            .prop_map(|(namespace, stem, keep, tokens, reuse, share, align)| Step::Open {
                namespace, stem, keep, tokens, reuse, share, align
            }),
        2 => (0..8usize, tokens()).prop_map(|(of, tokens)| Step::Append { of, tokens }),
        8 => (rows(), counts(), prop::option::weighted(0.3, 0..3u32))
            .prop_map(|(rows, counts, tokens)| Step::Plan { rows, counts, tokens }),
        4 => (0..4usize).prop_map(|of| Step::Fill { of }),
        8 => (0..4usize).prop_map(|of| Step::Commit { of }),
        2 => (0..4usize).prop_map(|of| Step::Abandon { of }),
        2 => rows().prop_map(|rows| Step::PlanAndAbandon { rows }),
        2 => (0..8usize).prop_map(|of| Step::Fork { of }),
        2 => (0..8usize, 0..40usize).prop_map(|(of, length)| Step::Truncate { of, length }),
        1 => (0..8usize, 0..40usize).prop_map(|(of, length)| Step::Share { of, length }),
        4 => (0..8usize).prop_map(|of| Step::Close { of }),
        1 => (0..6usize).prop_map(|pages| Step::Evict { pages }),
        1 => (0..2u64).prop_map(|namespace| Step::Drop { namespace }),
    ];
    prop::collection::vec(step, 1..80)
}

struct Text {
    id: SequenceId,
    namespace: u64,
    tokens: Vec<u32>,
    length: usize,
    /// Tokens that others may find at most, and those that they may find by now.
    shareable: usize,
    sealed: usize,
    is_planned: bool,
    is_closed: bool,
}

struct Open {
    plan: Plan,
    /// Index of the text, tokens before the step, tokens of it.
    rows: Vec<(usize, usize, usize)>,
    appended: bool,
    filled: bool,
}

struct Model {
    pool: Pool,
    block: usize,
    texts: Vec<Text>,
    plans: Vec<Open>,
    memory: Vec<u64>,
    /// Every prefix that was ever sealed, by namespace.
    sealed: HashSet<(u64, Vec<u32>)>,
    /// Tails of sequences that were closed in an open plan: the tree may have them.
    perhaps: HashSet<(u64, Vec<u32>)>,
    keep_tails: bool,
}

fn digest(namespace: u64, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (namespace, tokens).hash(&mut hasher);
    hasher.finish()
}

fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Model {
    fn new(pages: usize, block: usize, keep_tails: bool) -> Self {
        Self {
            pool: Pool::new(pages, block, keep_tails).unwrap(),
            block,
            texts: Vec::new(),
            plans: Vec::new(),
            memory: vec![0; pages * block],
            sealed: HashSet::new(),
            perhaps: HashSet::new(),
            keep_tails,
        }
    }

    fn pick(&self, of: usize) -> Option<usize> {
        let open: Vec<usize> = (0..self.texts.len()).filter(|index| !self.texts[*index].is_closed).collect();
        (!open.is_empty()).then(|| open[of % open.len()])
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Open { namespace, stem, keep, tokens, reuse, share, align } => {
                let mut text = match self.pick(stem) {
                    Some(stem) => self.texts[stem].tokens.clone(),
                    None => Vec::new(),
                };
                text.truncate(keep);
                text.extend(tokens);
                self.open(namespace, text, reuse, share, align);
            }
            Step::Append { of, tokens } => {
                let Some(of) = self.pick(of) else { return };
                let text = &mut self.texts[of];
                match self.pool.append(text.id, &tokens) {
                    Ok(()) => text.tokens.extend(tokens),
                    Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
                }
            }
            Step::Plan { rows, counts, tokens } => self.plan(&rows, counts, tokens),
            Step::Fill { of } => {
                if !self.plans.is_empty() {
                    let of = of % self.plans.len();
                    self.fill(of);
                }
            }
            Step::Commit { of } => {
                if !self.plans.is_empty() {
                    self.commit(of % self.plans.len());
                }
            }
            Step::Abandon { of } => {
                if !self.plans.is_empty() {
                    self.abandon(of % self.plans.len());
                }
            }
            Step::PlanAndAbandon { rows } => {
                let before = self.snapshot();
                let open = self.plans.len();
                self.plan(&rows, None, Some(1));
                if self.plans.len() > open {
                    self.abandon(open);
                    assert_eq!(before, self.snapshot(), "an abandoned plan left a trace");
                }
            }
            Step::Fork { of } => {
                let Some(of) = self.pick(of) else { return };
                let text = &self.texts[of];
                match self.pool.fork(text.id) {
                    Ok(id) => {
                        let Text { namespace, length, shareable, sealed, .. } = *text;
                        let tokens = text.tokens.clone();
                        let fork = Text {
                            id,
                            namespace,
                            tokens,
                            length,
                            shareable,
                            sealed,
                            is_planned: false,
                            is_closed: false,
                        };
                        self.texts.push(fork);
                    }
                    Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
                }
            }
            Step::Truncate { of, length } => {
                let Some(of) = self.pick(of) else { return };
                let text = &mut self.texts[of];
                match self.pool.truncate(text.id, length) {
                    Ok(()) => {
                        text.tokens.truncate(length);
                        text.length = text.length.min(length);
                        text.sealed = text.sealed.min(length / self.block * self.block);
                    }
                    Err(Error::Planned(_)) => assert!(text.is_planned),
                    Err(error) => assert!(length > text.tokens.len(), "{error}"),
                }
            }
            Step::Share { of, length } => {
                let Some(of) = self.pick(of) else { return };
                let text = &mut self.texts[of];
                match self.pool.share_up_to(text.id, length) {
                    Ok(()) => text.shareable = length,
                    Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
                }
            }
            Step::Close { of } => {
                let Some(of) = self.pick(of) else { return };
                self.close(of);
            }
            Step::Evict { pages } => {
                let could = self.pool.num_evictable();
                assert_eq!(self.pool.evict(pages), pages.min(could));
            }
            Step::Drop { namespace } => {
                self.pool.drop_namespace(Namespace(namespace));
            }
        }
    }

    /// Close a text. Its last, partly filled block stays when no fork holds the page.
    fn close(&mut self, of: usize) {
        let Text { id, namespace, length, shareable, is_planned, .. } = self.texts[of];
        let tail = (namespace, self.texts[of].tokens[..length].to_vec());
        if !self.keep_tails {
        } else if is_planned {
            let tokens = &self.texts[of].tokens;
            self.perhaps.extend((0..=tokens.len()).map(|end| (namespace, tokens[..end].to_vec())));
        } else if length > 0 && length <= shareable {
            let page = self.pool.block_table(id).unwrap()[(length - 1) / self.block];
            let mut others = self.texts.iter().filter(|text| !text.is_closed && text.id != id);
            let mut copies = self.plans.iter().flat_map(|open| open.plan.copies());
            if others.any(|text| self.pool.block_table(text.id).unwrap().contains(&page))
                || !self.is_alone(of)
                || copies.any(|(source, _)| *source == page)
                || self.texts.iter().any(|text| text.is_closed && text.is_planned)
            {
                self.perhaps.insert(tail);
            } else {
                self.sealed.insert(tail);
            }
        }
        self.pool.close(id);
        assert!(self.pool.is_closed(id));
        self.texts[of].is_closed = true;
    }

    fn open(&mut self, namespace: u64, tokens: Vec<u32>, reuse: bool, share: bool, align: usize) {
        let known = self.pool.matched(Namespace(namespace), &tokens).unwrap();
        let options = OpenOptions { namespace: Namespace(namespace), reuse, share, align };
        let (id, cached) = self.pool.open(&tokens, options).unwrap();
        let expected = if reuse { known.min(tokens.len().saturating_sub(1)) / align * align } else { 0 };
        assert_eq!(cached, expected);
        let length = cached;
        let (shareable, sealed) = (if share { usize::MAX } else { 0 }, 0);
        self.texts.push(Text { id, namespace, tokens, length, shareable, sealed, is_planned: false, is_closed: false });
    }

    fn plan(&mut self, rows: &[usize], counts: Option<Vec<usize>>, tokens: Option<u32>) {
        let mut chosen: Vec<usize> = rows.iter().filter_map(|of| self.pick(*of)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let ids: Vec<SequenceId> = chosen.iter().map(|of| self.texts[*of].id).collect();
        let more = usize::from(tokens.is_some());
        let pending = |of: &usize| self.texts[*of].tokens.len() - self.texts[*of].length + more;
        let counts: Option<Vec<usize>> =
            counts.map(|counts| chosen.iter().zip(counts).map(|(of, count)| count % (pending(of) + 1)).collect());
        let sizes = counts.clone().unwrap_or_else(|| chosen.iter().map(pending).collect());
        let counts: Option<Vec<i32>> = counts.map(|counts| counts.iter().map(|count| *count as i32).collect());
        let tokens: Option<Vec<u32>> = tokens.map(|token| vec![token; chosen.len()]);
        let before = self.snapshot();
        match self.pool.plan(&ids, counts.as_deref(), tokens.as_deref()) {
            Ok(plan) => {
                assert_eq!(plan.num_tokens(), sizes.iter().sum::<usize>());
                let mut rows = Vec::new();
                for (row, of) in chosen.iter().enumerate() {
                    let text = &mut self.texts[*of];
                    if let Some(tokens) = &tokens {
                        text.tokens.push(tokens[row]);
                    }
                    let touched = sizes[row] > 0 || tokens.is_some();
                    assert!(!(touched && text.is_planned), "planned twice");
                    text.is_planned |= touched;
                    rows.push((*of, text.length, sizes[row]));
                }
                self.plans.push(Open { plan, rows, appended: tokens.is_some(), filled: false });
            }
            Err(error) => {
                match error {
                    Error::Capacity { needed, free, evictable, .. } => assert!(needed > free + evictable),
                    Error::Planned(_) => assert!(chosen.iter().any(|of| self.texts[*of].is_planned)),
                    error => panic!("{error}"),
                }
                assert_eq!(before, self.snapshot(), "a refused plan left a trace");
            }
        }
    }

    fn fill(&mut self, of: usize) {
        let Open { plan, rows, filled, .. } = &mut self.plans[of];
        let width = plan.max_pages() + 1;
        let mut tables = vec![-1; width * rows.len()];
        let mut slots = vec![-1; plan.num_tokens()];
        let mut lengths = vec![-1; 2 * rows.len()];
        self.pool.fill(plan, &mut tables, width, &mut slots, &mut lengths).unwrap();
        if !*filled {
            for (source, target) in plan.copies() {
                let source = source.0 as usize * self.block;
                self.memory.copy_within(source..source + self.block, target.0 as usize * self.block);
            }
        }
        *filled = true;
        let mut slot = slots.iter();
        for (row, (of, length, count)) in rows.iter().enumerate() {
            assert_eq!(lengths[2 * row..2 * row + 2], [*length as i32, *count as i32]);
            let text = &self.texts[*of];
            let table = &tables[row * width..(row + 1) * width];
            for position in *length..length + count {
                let slot = *slot.next().unwrap() as usize;
                assert_eq!(slot, table[position / self.block] as usize * self.block + position % self.block);
                self.memory[slot] = digest(text.namespace, &text.tokens[..=position]);
            }
            let used = if *count == 0 { 0 } else { (length + count).div_ceil(self.block) };
            assert!(table[used..].iter().all(|page| *page == -1), "wrote past a row's table");
        }
    }

    fn commit(&mut self, of: usize) {
        if !self.plans[of].filled {
            self.fill(of);
        }
        let Open { plan, rows, appended, .. } = self.plans.swap_remove(of);
        let alone: Vec<bool> = rows.iter().map(|(of, ..)| self.is_alone(*of)).collect();
        self.pool.commit(plan);
        for ((of, length, count), alone) in rows.into_iter().zip(alone) {
            if count == 0 && !appended {
                continue;
            }
            let text = &mut self.texts[of];
            text.is_planned = false;
            text.length = length + count;
            for end in (self.block..=text.length.min(text.shareable)).step_by(self.block) {
                let block = (text.namespace, text.tokens[..end].to_vec());
                if alone {
                    self.sealed.insert(block);
                    text.sealed = text.sealed.max(end);
                } else {
                    self.perhaps.insert(block);
                }
            }
        }
    }

    /// Whether no fork holds a page that this text alone would seal.
    fn is_alone(&self, of: usize) -> bool {
        let text = &self.texts[of];
        let Ok(table) = self.pool.block_table(text.id) else { return false };
        let private = &table[text.sealed / self.block..];
        self.texts.iter().filter(|other| other.id != text.id).all(|other| match self.pool.block_table(other.id) {
            Ok(theirs) => !private.iter().any(|page| theirs.contains(page)),
            Err(_) => !other.is_planned,
        })
    }

    fn abandon(&mut self, of: usize) {
        let Open { plan, rows, appended, .. } = self.plans.swap_remove(of);
        self.pool.abandon(plan);
        for (of, _, count) in rows {
            let text = &mut self.texts[of];
            if appended {
                text.tokens.pop();
            }
            if count > 0 || appended {
                text.is_planned = false;
            }
        }
    }

    /// What an undone plan must leave as it was.
    fn snapshot(&self) -> (Vec<u64>, Vec<usize>, Vec<(usize, usize, Vec<u32>)>) {
        let now = self.pool.statistics();
        let numbers =
            vec![now.free_pages, now.mutable_pages, now.sealed_pages, now.shared_pages, now.pinned_pages, now.nodes];
        let mut prefixes: Vec<_> = self.sealed.iter().collect();
        prefixes.sort_unstable();
        let found = prefixes
            .iter()
            .map(|(namespace, tokens)| self.pool.matched(Namespace(*namespace), tokens).unwrap())
            .collect();
        let open = self.texts.iter().filter(|text| !text.is_closed);
        let texts = open.map(|text| {
            let table = self.pool.block_table(text.id).unwrap().iter().map(|page| page.0).collect();
            (self.pool.length(text.id).unwrap(), self.pool.pending(text.id).unwrap(), table)
        });
        (numbers, found, texts.collect())
    }

    fn check(&self) {
        self.pool.check().unwrap();
        let now = self.pool.statistics();
        assert_eq!(now.free_pages + now.mutable_pages + now.sealed_pages, now.num_pages);
        let mut writers: HashMap<u32, usize> = HashMap::new();
        for text in self.texts.iter().filter(|text| !text.is_closed) {
            assert_eq!(self.pool.tokens(text.id).unwrap(), text.tokens);
            assert_eq!(self.pool.length(text.id).unwrap(), text.length);
            let table = self.pool.block_table(text.id).unwrap();
            if !text.is_planned {
                for position in 0..text.length {
                    let slot = table[position / self.block].0 as usize * self.block + position % self.block;
                    let expected = digest(text.namespace, &text.tokens[..=position]);
                    assert_eq!(self.memory[slot], expected, "position {position} of {:?}", text.tokens);
                }
            } else if let Some(open) =
                self.plans.iter().find(|open| open.rows.iter().any(|row| row.2 > 0 && self.texts[row.0].id == text.id))
            {
                let row = open.rows.iter().find(|row| self.texts[row.0].id == text.id).unwrap();
                for page in &table[row.1 / self.block..] {
                    *writers.entry(page.0).or_default() += 1;
                }
            }
        }
        assert!(writers.values().all(|count| *count == 1), "two plans write into one page: {writers:?}");
        let condemned = self.plans.iter().any(|open| open.plan.num_evicted() > 0);
        for text in self.texts.iter().filter(|text| !text.tokens.is_empty()) {
            let matched = self.pool.matched(Namespace(text.namespace), &text.tokens).unwrap();
            let known = self.sealed.iter().filter(|(namespace, _)| *namespace == text.namespace);
            let naive = known.map(|(_, tokens)| shared(tokens, &text.tokens)).max().unwrap_or(0);
            let tails = self.perhaps.iter().filter(|(namespace, _)| *namespace == text.namespace);
            let most = tails.map(|(_, tokens)| shared(tokens, &text.tokens)).max().unwrap_or(0).max(naive);
            assert!(matched <= most, "found {matched} of {most} tokens ever stored");
            if now.evicted_pages == 0 && !condemned {
                assert!(matched >= naive, "found {matched} of {naive} and nothing was evicted");
            }
            if !text.is_closed {
                assert!(matched >= text.sealed, "a pinned prefix was lost");
            }
        }
    }

    /// Let everything go and see that every page comes back.
    fn finish(mut self) {
        while let Some(open) = self.plans.len().checked_sub(1) {
            if open % 2 == 0 {
                self.abandon(open);
            } else {
                self.commit(open);
            }
            self.check();
        }
        for of in 0..self.texts.len() {
            if !self.texts[of].is_closed {
                self.close(of);
            }
        }
        self.check();
        let pages = self.pool.num_pages();
        assert_eq!(self.pool.num_free() + self.pool.num_evictable(), pages);
        self.pool.evict(pages);
        assert_eq!(self.pool.num_free(), pages);
        assert_eq!(self.pool.statistics().nodes, 0);
        self.pool.check().unwrap();
    }
}

fn run(pages: usize, block: usize, keep_tails: bool, steps: Vec<Step>) {
    let mut model = Model::new(pages, block, keep_tails);
    for step in steps {
        model.step(step);
        model.check();
    }
    model.finish();
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_slot_holds_what_was_written_while_pages_are_short(
        pages in 1..24usize, shift in 0..5u32, keep_tails: bool, steps in steps()
    ) {
        run(pages, 1 << shift, keep_tails, steps);
    }

    #[test]
    fn every_stored_token_is_found_while_there_is_room(shift in 0..5u32, keep_tails: bool, steps in steps()) {
        run(4096, 1 << shift, keep_tails, steps);
    }
}
