//! What users say of texts: who leaves before whom, what a pin holds, and when time is over.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod naive;

use kvhybrid_core::{Adaptive, Error, Namespace, OpenOptions, Pool, Retention, SequenceId};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const SPACE: Namespace = Namespace(0);
const OPTIONS: OpenOptions = OpenOptions { namespace: SPACE, reuse: true, share: true, align: 1 };
/// Behind every text, so that all of it can be found; it is never computed.
const LAST: u32 = 99;

fn learned(pages: usize, block: usize) -> Pool {
    let mut pool = Pool::new(pages, block, true).unwrap();
    pool.adapt(Adaptive { seed: Some(0), token_weight: 1, learns_at_once: true, is_unguarded: true });
    pool
}

/// Compute a text, if there is room, and say as what it is to be retained.
fn compute(pool: &mut Pool, text: &[u32], retention: Option<(Retention, usize)>) -> Result<SequenceId, Error> {
    let (id, cached) = pool.open(&[text, &[LAST]].concat(), OPTIONS)?;
    if let Some((retention, from)) = retention {
        pool.retain_sequence(id, Some(retention), from).unwrap();
    }
    match pool.plan(&[id], Some(&[(text.len() - cached) as i32]), None) {
        Ok(plan) => pool.commit(plan),
        Err(error) => {
            pool.close(id);
            return Err(error);
        }
    }
    Ok(id)
}

fn store(pool: &mut Pool, text: &[u32]) {
    let id = compute(pool, text, None).unwrap();
    pool.close(id);
}

fn found(pool: &Pool, text: &[u32]) -> usize {
    pool.matched(SPACE, text).unwrap()
}

fn priority(priority: i32) -> Retention {
    Retention { priority, ..Retention::default() }
}

fn ttl(microseconds: u64) -> Retention {
    Retention { ttl: Some(microseconds), ..Retention::default() }
}

fn pools(pages: usize, block: usize) -> [Pool; 2] {
    [Pool::new(pages, block, true).unwrap(), learned(pages, block)].map(|mut pool| {
        pool.set_time(1_000);
        pool
    })
}

#[test]
fn lower_priorities_leave_before_higher_ones_and_within_one_the_least_recent() {
    for mut pool in pools(6, 1) {
        for (text, of) in [([1, 2], 5), ([3, 4], -1), ([5, 6], 0)] {
            store(&mut pool, &text);
            assert_eq!(pool.retain(SPACE, &text, 0..9, priority(of)).unwrap(), 2);
            pool.check().unwrap();
        }
        let mut order = Vec::new();
        for _ in 0..3 {
            assert_eq!(pool.evict(2), 2);
            pool.check().unwrap();
            order.push([[1, 2], [3, 4], [5, 6]].map(|text| found(&pool, &text)));
        }
        assert_eq!(order, [[2, 0, 2], [2, 0, 0], [0, 0, 0]]);
        let now = pool.statistics();
        assert_eq!((now.evicted_priority_pages, now.evicted_asked_pages), (2, 4));
    }
}

#[test]
fn what_has_time_leaves_after_others_of_its_priority_and_first_when_it_is_over() {
    for mut pool in pools(8, 1) {
        for text in [[1, 2], [3, 4], [5, 6]] {
            store(&mut pool, &text);
        }
        pool.retain(SPACE, &[1, 2], 0..2, ttl(500)).unwrap();
        assert_eq!(pool.evict(2), 2);
        assert_eq!([[1, 2], [3, 4], [5, 6]].map(|text| found(&pool, &text)), [2, 0, 2]);
        pool.set_time(2_000);
        assert_eq!(pool.evict(2), 2);
        assert_eq!([[1, 2], [3, 4], [5, 6]].map(|text| found(&pool, &text)), [0, 0, 2]);
        let explained = pool.explain(SPACE, &[1, 2]).unwrap();
        assert_eq!(explained.left.map(|(cause, _)| cause.name()), Some("ttl"));
        assert_eq!(pool.statistics().evicted_ttl_pages, 2);
        pool.check().unwrap();
    }
}

#[test]
fn what_is_used_when_its_time_is_over_or_later_is_as_any_other() {
    for mut pool in pools(8, 1) {
        for text in [[1, 2], [3, 4], [5, 6]] {
            store(&mut pool, &text);
        }
        pool.retain(SPACE, &[1, 2], 0..2, ttl(500)).unwrap();
        pool.retain(SPACE, &[3, 4], 0..2, ttl(500)).unwrap();
        let (in_use, _) = pool.open(&[3, 4, LAST], OPTIONS).unwrap();
        pool.set_time(2_000);
        let (later, _) = pool.open(&[1, 2, LAST], OPTIONS).unwrap();
        pool.close(in_use);
        pool.close(later);
        pool.check().unwrap();
        pool.evict(2);
        assert_eq!(found(&pool, &[5, 6]), 0, "the least recently used one leaves");
        assert_eq!(pool.statistics().evicted_ttl_pages, 0);
    }
}

#[test]
fn time_that_lapses_protects_and_leaves_no_trace() {
    for (mut pool, is_exact) in pools(8, 1).into_iter().zip([true, false]) {
        for text in [[1, 2], [3, 4], [5, 6]] {
            store(&mut pool, &text);
        }
        pool.retain(SPACE, &[1, 2], 0..2, Retention { lapses: true, ..ttl(500) }).unwrap();
        pool.evict(2);
        assert_eq!([[1, 2], [3, 4], [5, 6]].map(|text| found(&pool, &text)), [2, 0, 2]);
        store(&mut pool, &[7, 8]);
        pool.set_time(2_000);
        pool.evict(2);
        // It was used by being retained, after 5 and 6 and before 7 and 8.
        let left = [[1, 2], [5, 6], [7, 8]].map(|text| found(&pool, &text));
        assert!(left == [2, 0, 2] || !is_exact, "it keeps its age: {left:?}");
        assert_eq!(pool.statistics().evicted_ttl_pages, 0);
    }
}

#[test]
fn what_stands_before_what_is_retained_stays_with_it() {
    for mut pool in pools(12, 1) {
        for text in [[1, 2, 3, 4], [5, 6, 7, 8]] {
            store(&mut pool, &text);
        }
        pool.retain(SPACE, &[1, 2, 3, 4], 2..4, priority(3)).unwrap();
        pool.retain(SPACE, &[5, 6, 7, 8], 2..4, priority(-3)).unwrap();
        store(&mut pool, &[9, 10]);
        for expected in [[4, 2, 2], [4, 0, 2], [4, 0, 0], [2, 0, 0], [0, 0, 0]] {
            pool.evict(2);
            pool.check().unwrap();
            assert_eq!([found(&pool, &[1, 2, 3, 4]), found(&pool, &[5, 6, 7, 8]), found(&pool, &[9, 10])], expected);
        }
    }
}

#[test]
fn a_pin_holds_until_it_is_taken_back_and_is_bounded() {
    for mut pool in pools(8, 2) {
        store(&mut pool, &[1, 2, 3, 4]);
        store(&mut pool, &[1, 2, 5, 6, 7]);
        let (pin, held) = pool.pin(SPACE, &[1, 2, 5, 6, 7], None).unwrap();
        assert_eq!((held, pool.num_evictable()), (5, 1));
        pool.check().unwrap();
        let refused = pool.pin(SPACE, &[1, 2, 3, 4], None).map(|_| ());
        pool.bound_pins(0.3).unwrap();
        assert_eq!(refused, Ok(()), "four of eight are within a half");
        let refused = pool.pin(SPACE, &[1, 2, 3, 4], None).map(|_| ());
        assert_eq!(refused, Ok(()), "what is pinned already costs nothing");
        assert_eq!(pool.evict(8), 0);
        store(&mut pool, &[8, 8]);
        let refused = pool.pin(SPACE, &[8, 8], None).map(|_| ());
        assert_eq!(refused, Err(Error::Pinned { needed: 1, pinned: 4, most: 2, total: 8 }));
        pool.unpin(pin);
        pool.unpin(pin);
        assert!(!pool.is_pinned(pin));
        assert_eq!((pool.num_evictable(), pool.statistics().user_pinned_pages), (3, 2));
        pool.check().unwrap();
        pool.drop_namespace(SPACE);
        let now = pool.statistics();
        assert_eq!((now.user_pins, now.user_pinned_pages, now.sealed_pages), (0, 0, 0));
        pool.check().unwrap();
    }
}

#[test]
fn a_pin_ends_with_its_time() {
    for mut pool in pools(8, 1) {
        store(&mut pool, &[1, 2]);
        store(&mut pool, &[3, 4]);
        let (pin, _) = pool.pin(SPACE, &[1, 2], Some(100)).unwrap();
        pool.set_time(1_200);
        store(&mut pool, &[5, 6]);
        assert!(!pool.is_pinned(pin));
        assert_eq!(pool.num_evictable(), 6);
        pool.check().unwrap();
    }
}

#[test]
fn pinned_pages_never_step_down_and_lower_priorities_do_first() {
    for adapts in [false, true] {
        let mut pool = Pool::with_classes([8, 8, 0], 1, true).unwrap();
        if adapts {
            pool.adapt(Adaptive { seed: Some(0), token_weight: 1, learns_at_once: true, is_unguarded: true });
        }
        for text in [[1, 2], [3, 4], [5, 6]] {
            store(&mut pool, &text);
        }
        pool.pin(SPACE, &[1, 2], None).unwrap();
        pool.retain(SPACE, &[3, 4], 0..2, priority(1)).unwrap();
        pool.retain(SPACE, &[5, 6], 0..2, priority(-1)).unwrap();
        let table = |pool: &mut Pool, text: [u32; 2]| {
            let (id, _) = pool.open(&[text[0], text[1], LAST], OPTIONS).unwrap();
            let pages: Vec<bool> = pool.block_table(id).unwrap().iter().map(|page| page.0 >= 8).collect();
            pool.close(id);
            pages
        };
        let mut plan = pool.plan_demotion(2).unwrap();
        pool.fill(&mut plan, &mut [], 0, &mut [], &mut []).unwrap();
        pool.moved(&mut plan);
        pool.abandon(plan);
        let stepped = [[1, 2], [3, 4], [5, 6]].map(|text| table(&mut pool, text));
        assert_eq!(stepped, [vec![false; 2], vec![false; 2], vec![true; 2]]);
        // A step by somebody who stands on what is pinned asks for all that can be had.
        let id = compute(&mut pool, &[1, 2, 7, 8, 9, 10, 11], None).unwrap();
        assert_eq!(pool.statistics().demoted_pages, 3, "3 or 4 has stepped down");
        let more = pool.plan(&[id], None, None).unwrap();
        pool.commit(more);
        pool.append(id, &[12, 13]).unwrap();
        let more = pool.plan(&[id], None, None).unwrap();
        assert!(more.demotions().len() > 0, "what it holds itself steps down");
        pool.commit(more);
        assert_eq!(table(&mut pool, [1, 2]), [false; 2]);
        pool.check().unwrap();
    }
}

#[test]
fn a_text_is_retained_as_its_sequence_says_and_what_was_there_before_is_not_for_less() {
    for mut pool in pools(12, 1) {
        store(&mut pool, &[1, 2]);
        for (text, retention) in [([1, 2, 3, 4], priority(-5)), ([1, 2, 5, 6], ttl(100))] {
            let id = compute(&mut pool, &text, Some((retention, 2))).unwrap();
            pool.close(id);
            pool.check().unwrap();
        }
        store(&mut pool, &[7, 8]);
        pool.evict(2);
        assert_eq!(found(&pool, &[1, 2, 3, 4]), 2);
        pool.set_time(5_000);
        pool.evict(2);
        assert_eq!(found(&pool, &[1, 2, 5, 6]), 2, "its own part, and no more");
        pool.evict(2);
        assert_eq!([found(&pool, &[1, 2]), found(&pool, &[7, 8])], [0, 2]);
    }
}

#[test]
fn an_undone_plan_puts_back_what_is_retained_as_it_was() {
    for mut pool in pools(4, 1) {
        store(&mut pool, &[1, 2]);
        store(&mut pool, &[3, 4]);
        pool.retain(SPACE, &[1, 2], 0..2, ttl(500)).unwrap();
        pool.retain(SPACE, &[3, 4], 0..2, priority(-2)).unwrap();
        let (id, _) = pool.open(&[5, 6, 7, LAST], OPTIONS).unwrap();
        let plan = pool.plan(&[id], Some(&[3]), None).unwrap();
        assert_eq!(plan.num_evicted(), 3);
        pool.check().unwrap();
        pool.set_time(2_000);
        pool.abandon(plan);
        pool.check().unwrap();
        assert_eq!([found(&pool, &[1, 2]), found(&pool, &[3, 4])], [2, 2]);
        pool.evict(2);
        assert_eq!([found(&pool, &[1, 2]), found(&pool, &[3, 4])], [0, 2], "its time was over meanwhile");
        pool.close(id);
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let mut pool = Pool::new(4, 1, true).unwrap();
    store(&mut pool, &[1, 2]);
    for refused in [priority(101), priority(-101)] {
        assert!(matches!(pool.retain(SPACE, &[1, 2], 0..2, refused), Err(Error::Argument(_))));
    }
    assert!(matches!(pool.retain(SPACE, &[1, 2], 3..9, priority(1)), Err(Error::Argument(_))));
    assert_eq!(pool.retain(SPACE, &[7], 0..1, priority(1)), Ok(0));
    assert!(pool.bound_pins(1.0).is_err());
    pool.check().unwrap();
}

#[test]
fn hints_are_bounded_and_what_they_hold_is_not_counted_as_pinned_by_users() {
    let mut pool = Pool::new(8, 1, true).unwrap();
    store(&mut pool, &[1, 2]);
    store(&mut pool, &[1, 2, 3]);
    store(&mut pool, &[4, 5]);
    let (hint, held) = pool.hint(SPACE, &[1, 2, 3, 9], 3).unwrap().unwrap();
    assert_eq!(held, 3);
    assert!(pool.hint(SPACE, &[1, 2], 3).unwrap().is_some(), "held already: it costs nothing");
    assert_eq!(pool.hint(SPACE, &[4, 5], 3), Ok(None));
    assert_eq!(pool.hint(SPACE, &[8], 3), Ok(None));
    assert_eq!((pool.num_evictable(), pool.statistics().user_pinned_pages), (2, 0));
    pool.unpin(hint);
    assert_eq!(pool.num_evictable(), 3);
    pool.check().unwrap();
}

#[test]
fn what_hints_share_counts_for_as_long_as_one_of_them_holds_it() {
    let mut pool = Pool::new(8, 1, true).unwrap();
    for text in [[1, 2], [3, 4], [5, 6]] {
        store(&mut pool, &text);
    }
    let (first, _) = pool.hint(SPACE, &[1, 2], 3).unwrap().unwrap();
    let (second, _) = pool.hint(SPACE, &[1, 2], 3).unwrap().unwrap();
    pool.unpin(first);
    assert_eq!(pool.hint(SPACE, &[3, 4], 3), Ok(None));
    assert_eq!(pool.num_evictable(), 4);
    pool.unpin(second);
    let running = compute(&mut pool, &[3, 4, 7], None).unwrap();
    assert!(pool.hint(SPACE, &[3, 4], 3).unwrap().is_some());
    pool.close(running);
    assert_eq!(pool.hint(SPACE, &[5, 6], 3), Ok(None), "what was in use as well is held by the hint alone now");
    pool.check().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn who_leaves_is_who_should_in_order_of_recency(pages in 2..12usize, steps in naive::steps()) {
        naive::walk(Pool::new(pages, 1, true).unwrap(), true, steps);
    }

    #[test]
    fn nobody_leaves_before_one_of_a_lower_level_in_the_learned_order(pages in 2..12usize, steps in naive::steps()) {
        naive::walk(learned(pages, 1), false, steps);
    }
}
