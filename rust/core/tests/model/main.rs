//! The pool against a naive model: sequences are vectors of tokens, pages are arrays of digests.
//!
//! Whoever fills a plan writes, into every slot it was given, a digest of the namespace and of all
//! tokens up to that position, as attention would write K and V that depend on exactly those. After
//! each step every slot of every sequence must hold what it should. A page that was evicted,
//! shared or written too early shows up as a wrong digest.
//!
//! Pools with quantized pages: whoever fills a plan first copies the sources of its demotions to their targets, in
//! order, as a codec would, and may find one that cannot be quantized. Plans are filled one at a time then.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::similar_names, clippy::type_complexity, reason = "the model speaks of steps, stems and texts")]

mod naive;
mod plans;
mod retained;
mod truth;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use kvhybrid_core::{Adaptive, Error, Namespace, OpenOptions, PinId, Plan, Pool, Retention, SequenceId};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[derive(Clone, Debug)]
enum Step {
    Open { namespace: u64, stem: usize, keep: usize, tokens: Vec<u32>, reuse: bool, share: bool, align: usize },
    Answer { namespace: u64, stem: usize, keep: usize, tokens: Vec<u32>, close: bool },
    Append { of: usize, tokens: Vec<u32> },
    Plan { rows: Vec<usize>, counts: Option<Vec<usize>>, tokens: Option<u32> },
    Fill { of: usize },
    Refuse { of: usize, which: usize, for_good: bool },
    Freeze { of: usize, length: usize },
    Commit { of: usize },
    Abandon { of: usize },
    PlanAndAbandon { rows: Vec<usize> },
    Fork { of: usize },
    Truncate { of: usize, length: usize },
    Share { of: usize, length: usize },
    Close { of: usize },
    Evict { pages: usize },
    Demote { pages: usize },
    Drop { namespace: u64 },
    Say(Saying),
}

/// What users say of texts.
#[derive(Clone, Debug)]
enum Saying {
    Retain { of: usize, from: usize, to: usize, retention: Retention },
    RetainText { of: usize, from: usize, retention: Option<Retention> },
    Pin { of: usize, length: usize, ttl: Option<u64> },
    Hint { of: usize },
    Unpin { of: usize },
    Wait { microseconds: u64 },
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
        8 => (0..2u64, 0..8usize, 0..40usize, tokens(), prop::bool::weighted(0.8)).prop_map(
            |(namespace, stem, keep, tokens, close)| Step::Answer { namespace, stem, keep, tokens, close }
        ),
        2 => (0..8usize, tokens()).prop_map(|(of, tokens)| Step::Append { of, tokens }),
        8 => (rows(), counts(), prop::option::weighted(0.3, 0..3u32))
            .prop_map(|(rows, counts, tokens)| Step::Plan { rows, counts, tokens }),
        4 => (0..4usize).prop_map(|of| Step::Fill { of }),
        2 => (0..4usize, 0..4usize, any::<bool>())
            .prop_map(|(of, which, for_good)| Step::Refuse { of, which, for_good }),
        2 => (0..8usize, 0..40usize).prop_map(|(of, length)| Step::Freeze { of, length }),
        8 => (0..4usize).prop_map(|of| Step::Commit { of }),
        2 => (0..4usize).prop_map(|of| Step::Abandon { of }),
        2 => rows().prop_map(|rows| Step::PlanAndAbandon { rows }),
        2 => (0..8usize).prop_map(|of| Step::Fork { of }),
        2 => (0..8usize, 0..40usize).prop_map(|(of, length)| Step::Truncate { of, length }),
        1 => (0..8usize, 0..40usize).prop_map(|(of, length)| Step::Share { of, length }),
        4 => (0..8usize).prop_map(|of| Step::Close { of }),
        1 => (0..6usize).prop_map(|pages| Step::Evict { pages }),
        1 => (0..6usize).prop_map(|pages| Step::Demote { pages }),
        1 => (0..2u64).prop_map(|namespace| Step::Drop { namespace }),
        10 => retained::sayings().prop_map(Step::Say),
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
    /// The rows' block tables as they were filled in.
    tables: Vec<Vec<i32>>,
}

struct Model {
    pool: Pool,
    counts: [usize; 3],
    block: usize,
    texts: Vec<Text>,
    plans: Vec<Open>,
    memory: Vec<u64>,
    /// Every prefix that was ever sealed, by namespace.
    sealed: HashSet<(u64, Vec<u32>)>,
    /// Tails of sequences that were closed in an open plan: the tree may have them.
    perhaps: HashSet<(u64, Vec<u32>)>,
    keep_tails: bool,
    pins: Vec<retained::Pinned>,
    now: u64,
}

fn digest(namespace: u64, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (namespace, tokens).hash(&mut hasher);
    hasher.finish()
}

fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn run(counts: [usize; 3], block: usize, keep_tails: bool, steps: Vec<Step>) {
    walk(Model::new(counts, block, keep_tails), steps);
}

fn walk(mut model: Model, steps: Vec<Step>) {
    for step in steps {
        model.step(step);
        model.check();
        model.check_pins();
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
        run([pages, 0, 0], 1 << shift, keep_tails, steps);
    }

    #[test]
    fn every_slot_holds_what_was_written_while_pages_are_quantized(
        pages in 1..16usize, quantized in 1..24usize, shift in 0..4u32, keep_tails: bool, steps in steps()
    ) {
        run([pages, quantized, 0], 1 << shift, keep_tails, steps);
    }

    #[test]
    fn every_slot_holds_what_was_written_while_pages_step_down_twice(
        counts in [1..12usize, 1..8usize, 1..16usize], shift in 0..4u32, keep_tails: bool, steps in steps()
    ) {
        run(counts, 1 << shift, keep_tails, steps);
    }

    #[test]
    fn every_slot_holds_what_was_written_in_the_learned_order(
        pages in 1..24usize, quantized in 0..8usize, lowest in 0..8usize, shift in 0..4u32, keep_tails: bool,
        steps in steps()
    ) {
        let lowest = if quantized == 0 { 0 } else { lowest };
        let mut model = Model::new([pages, quantized, lowest], 1 << shift, keep_tails);
        model.pool.adapt(Adaptive { seed: Some(0), token_weight: 1, learns_at_once: true, is_unguarded: true });
        walk(model, steps);
    }

    #[test]
    fn every_stored_token_is_found_while_there_is_room(shift in 0..5u32, keep_tails: bool, steps in steps()) {
        run([4096, 0, 0], 1 << shift, keep_tails, steps);
    }
}
