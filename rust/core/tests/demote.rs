//! Who gives pages of full precision when they are short, in which order, and who never does.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::Range;

use kvhybrid_core::{Adaptive, Error, Namespace, OpenOptions, Plan, Pool, SequenceId};

const OPEN: OpenOptions = OpenOptions { namespace: Namespace(0), reuse: true, share: true, align: 1 };

fn open(pool: &mut Pool, tokens: Range<u32>) -> SequenceId {
    pool.open(&tokens.collect::<Vec<_>>(), OPEN).unwrap().0
}

fn compute(pool: &mut Pool, tokens: Range<u32>) -> SequenceId {
    let id = open(pool, tokens);
    let plan = pool.plan(&[id], None, None).unwrap();
    pool.commit(plan);
    id
}

/// A text that was computed and that nobody holds.
fn cached(pool: &mut Pool, tokens: Range<u32>) -> Vec<u32> {
    let id = compute(pool, tokens);
    let pages = table(pool, id);
    pool.close(id);
    pages
}

fn table(pool: &Pool, id: SequenceId) -> Vec<u32> {
    pool.block_table(id).unwrap().iter().map(|page| page.0).collect()
}

fn sources(plan: &Plan) -> Vec<u32> {
    plan.demotions().map(|(source, _)| source.0).collect()
}

fn targets(plan: &Plan) -> Vec<u32> {
    plan.demotions().map(|(_, target)| target.0).collect()
}

fn matched(pool: &Pool, tokens: Range<u32>) -> usize {
    pool.matched(Namespace(0), &tokens.collect::<Vec<_>>()).unwrap()
}

fn plan(pool: &mut Pool, id: SequenceId) -> Plan {
    let mut plan = pool.plan(&[id], None, None).unwrap();
    fill(pool, &mut plan);
    plan
}

fn fill(pool: &mut Pool, plan: &mut Plan) {
    let (mut tables, mut slots) = (vec![0; plan.max_pages().max(1)], vec![0; plan.num_tokens()]);
    pool.fill(plan, &mut tables, plan.max_pages().max(1), &mut slots, &mut [0; 2]).unwrap();
    pool.moved(plan);
}

#[test]
fn the_coldest_text_is_demoted_first_and_its_earliest_pages_before_the_others() {
    let mut pool = Pool::with_classes([8, 4, 0], 4, true).unwrap();
    let old = cached(&mut pool, 0..16);
    let new = cached(&mut pool, 100..116);
    let id = open(&mut pool, 200..210);
    let step = plan(&mut pool, id);
    assert_eq!((sources(&step), targets(&step), step.num_evicted()), (old[..3].to_vec(), vec![8, 9, 10], 0));
    pool.commit(step);
    let other = open(&mut pool, 300..304);
    let step = plan(&mut pool, other);
    assert_eq!((sources(&step), targets(&step), step.num_evicted()), (old[3..].to_vec(), vec![11], 0));
    pool.commit(step);
    assert_eq!((matched(&pool, 0..16), matched(&pool, 100..116)), (16, 16));
    // No quantized page is free any more: the coldest leaf gives its last one, and a page of the next text takes it.
    let last = open(&mut pool, 400..404);
    let step = plan(&mut pool, last);
    assert_eq!((sources(&step), targets(&step), step.num_evicted()), (new[..1].to_vec(), vec![11], 1));
    pool.commit(step);
    assert_eq!((matched(&pool, 0..16), matched(&pool, 100..116)), (12, 16));
    let now = pool.statistics();
    assert_eq!((now.num_quantized_pages, now.free_quantized_pages, now.demoted_pages, now.evicted_pages), (4, 0, 5, 1));
    pool.check().unwrap();
}

#[test]
fn tails_leave_and_are_not_demoted() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let pages = cached(&mut pool, 0..10);
    let id = open(&mut pool, 100..116);
    let step = plan(&mut pool, id);
    assert_eq!((sources(&step), step.num_evicted()), (pages[..2].to_vec(), 1));
    pool.commit(step);
    assert_eq!(matched(&pool, 0..10), 8);
    pool.check().unwrap();
}

#[test]
fn a_text_longer_than_the_pages_of_full_precision_is_computed_in_parts() {
    let mut pool = Pool::with_classes([3, 5, 0], 4, true).unwrap();
    let id = open(&mut pool, 0..32);
    for part in 0..8 {
        let mut step = pool.plan(&[id], Some(&[4]), None).unwrap();
        fill(&mut pool, &mut step);
        assert!(table(&pool, id).last().unwrap() < &3, "part {part} is written into a quantized page");
        pool.commit(step);
        pool.check().unwrap();
    }
    assert_eq!((pool.num_free(), pool.length(id).unwrap()), (0, 32));
    assert_eq!(table(&pool, id).iter().filter(|page| **page >= 3).count(), 5);
    pool.append(id, &[7]).unwrap();
    let refused = pool.plan(&[id], None, None).map(|_| ()).unwrap_err();
    assert_eq!(refused, Error::Capacity { needed: 1, free: 0, evictable: 0, total: 3 });
    pool.check().unwrap();
}

#[test]
fn what_a_step_under_way_reads_is_never_taken() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let reads = compute(&mut pool, 0..8);
    pool.append(reads, &[9]).unwrap();
    let under_way = plan(&mut pool, reads);
    let before = table(&pool, reads);
    let id = open(&mut pool, 100..108);
    assert!(matches!(pool.plan(&[id], None, None), Err(Error::Capacity { needed: 2, free: 1, evictable: 0, .. })));
    pool.commit(under_way);
    let step = plan(&mut pool, id);
    assert_eq!(sources(&step), before[..1]);
    pool.commit(step);
    assert_eq!(table(&pool, reads)[..2], [4, before[1]]);
    pool.check().unwrap();
}

#[test]
fn the_newest_page_of_a_text_at_rest_stays() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let rests = compute(&mut pool, 0..16);
    let before = table(&pool, rests);
    let id = open(&mut pool, 100..116);
    assert!(matches!(pool.plan(&[id], None, None), Err(Error::Capacity { needed: 4, evictable: 3, .. })));
    assert_eq!(table(&pool, rests), before);
    pool.close(id);
    let id = open(&mut pool, 100..112);
    let step = plan(&mut pool, id);
    pool.commit(step);
    assert_eq!(table(&pool, rests), [4, 5, 6, before[3]]);
    pool.check().unwrap();
}

#[test]
fn a_refused_page_keeps_its_place_and_another_is_chosen() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let pages = cached(&mut pool, 0..16);
    let id = open(&mut pool, 100..104);
    let mut step = pool.plan(&[id], None, None).unwrap();
    pool.fill(&mut step, &mut [0], 1, &mut [0; 4], &mut [0; 2]).unwrap();
    pool.refuse(step, 1, &[0]);
    pool.check().unwrap();
    let now = pool.statistics();
    assert_eq!((now.free_pages, now.free_quantized_pages, now.refused_pages, now.demoted_pages), (4, 4, 1, 0));
    assert_eq!(cached_pages(&mut pool, 0..17), pages);
    let step = plan(&mut pool, id);
    assert_eq!(sources(&step), pages[1..2]);
    pool.commit(step);
    // It leaves with the text, and what comes into the page then may be demoted again.
    pool.close(id);
    pool.evict(8);
    pool.check().unwrap();
    let again = cached(&mut pool, 0..16);
    let id = open(&mut pool, 100..116);
    let step = plan(&mut pool, id);
    assert_eq!(sources(&step), again);
    pool.commit(step);
}

fn cached_pages(pool: &mut Pool, tokens: Range<u32>) -> Vec<u32> {
    let id = open(pool, tokens);
    let pages = table(pool, id);
    pool.close(id);
    pages
}

#[test]
fn demotions_that_were_not_written_are_undone() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let pages = cached(&mut pool, 0..16);
    let (id, other) = (open(&mut pool, 100..108), open(&mut pool, 200..204));
    let mut step = pool.plan(&[id], None, None).unwrap();
    pool.fill(&mut step, &mut [0; 2], 2, &mut [0; 8], &mut [0; 2]).unwrap();
    assert!(pool.plan(&[other], None, None).is_err(), "a step could read what is not there");
    pool.abandon(step);
    pool.check().unwrap();
    assert_eq!((cached_pages(&mut pool, 0..17), pool.statistics().demoted_pages), (pages, 0));
    let step = plan(&mut pool, other);
    pool.abandon(step);
    assert_eq!(pool.statistics().demoted_pages, 1);
    pool.check().unwrap();
}

#[test]
fn a_plan_that_was_not_filled_leaves_every_page_where_it_was() {
    let mut pool = Pool::with_classes([6, 1, 0], 4, true).unwrap();
    let pages = cached(&mut pool, 0..24);
    let id = open(&mut pool, 100..108);
    let step = pool.plan(&[id], None, None).unwrap();
    assert_eq!((step.demotions().len(), step.num_evicted()), (1, 1));
    let refused = pool.plan(&[id], None, None).map(|_| ()).unwrap_err();
    assert!(matches!(refused, Error::Planned(_)), "{refused}");
    let other = open(&mut pool, 200..204);
    let refused = pool.plan(&[other], None, None).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("not written yet"), "{refused}");
    pool.abandon(step);
    pool.check().unwrap();
    assert_eq!((matched(&pool, 0..24), cached_pages(&mut pool, 0..25)), (24, pages));
}

#[test]
fn private_pages_are_demoted_as_far_as_they_are_frozen() {
    let mut pool = Pool::with_classes([4, 4, 0], 4, true).unwrap();
    let (id, _) = pool.open(&[0; 12], OpenOptions { reuse: false, share: false, ..OPEN }).unwrap();
    let step = plan(&mut pool, id);
    pool.commit_unwritten(step);
    let before = table(&pool, id);
    let other = open(&mut pool, 0..12);
    assert!(matches!(pool.plan(&[other], None, None), Err(Error::Capacity { evictable: 0, .. })));
    pool.freeze(id, 6).unwrap();
    assert!(matches!(pool.plan(&[other], None, None), Err(Error::Capacity { evictable: 1, .. })));
    pool.freeze(id, 12).unwrap();
    let step = plan(&mut pool, other);
    assert_eq!(sources(&step), before[..2]);
    pool.commit(step);
    assert_eq!(table(&pool, id), [4, 5, before[2]]);
    // Going on from inside a quantized page takes a copy of it.
    pool.truncate(id, 6).unwrap();
    pool.append(id, &[1]).unwrap();
    let step = plan(&mut pool, id);
    let copies: Vec<u32> = step.copies().iter().map(|(source, _)| source.0).collect();
    assert_eq!(copies, [5]);
    pool.commit(step);
    assert!(table(&pool, id)[1] < 4);
    pool.check().unwrap();
}

#[test]
fn room_is_made_ahead_of_need() {
    let mut pool = Pool::with_classes([4, 2, 0], 4, true).unwrap();
    cached(&mut pool, 0..14);
    let mut step = pool.plan_demotion(3).unwrap();
    assert_eq!(step.demotions().len(), 2);
    pool.fill(&mut step, &mut [], 0, &mut [], &mut []).unwrap();
    pool.moved(&mut step);
    pool.abandon(step);
    let now = pool.statistics();
    assert_eq!((now.free_pages, now.free_quantized_pages, now.demoted_pages), (2, 0, 2));
    assert_eq!(matched(&pool, 0..14), 14);
    pool.check().unwrap();
}

#[test]
fn the_coldest_pages_step_down_one_class_at_a_time_and_leave_from_the_last() {
    let mut pool = Pool::with_classes([4, 4, 4], 4, true).unwrap();
    let texts: Vec<Range<u32>> = (0..7).map(|text| 100 * text..100 * text + 8).collect();
    for text in &texts {
        let id = open(&mut pool, text.clone());
        let step = plan(&mut pool, id);
        pool.commit(step);
        pool.close(id);
        pool.check().unwrap();
    }
    // Seven texts of two pages, the oldest first: one has left, two are lowest, two above, two in full precision.
    assert_eq!(matched(&pool, texts[0].clone()), 0);
    for (age, first) in [8, 8, 4, 4, 0, 0].into_iter().enumerate() {
        let pages = cached_pages(&mut pool, texts[age + 1].start..texts[age + 1].end + 1);
        assert!(pages.iter().all(|page| (first..first + 4).contains(page)), "text {age} of six is in {pages:?}");
    }
    let now = pool.statistics();
    assert_eq!((now.num_quantized_pages, now.num_lowest_pages, now.free_pages), (8, 4, 0));
    assert_eq!((now.demoted_pages, now.lowered_pages, now.evicted_pages), (16, 6, 2));
}

#[test]
fn what_is_used_again_steps_down_later_than_what_is_not() {
    let mut pool = Pool::with_classes([2, 2, 4], 4, true).unwrap();
    for start in [0, 100] {
        let id = open(&mut pool, start..start + 8);
        let step = plan(&mut pool, id);
        pool.commit(step);
        pool.close(id);
    }
    // The first text is in the second class; the second, though younger, is not used again.
    cached_pages(&mut pool, 0..9);
    let id = open(&mut pool, 200..208);
    let step = plan(&mut pool, id);
    assert_eq!((sources(&step), targets(&step)), (vec![2, 3, 0, 1], vec![4, 5, 2, 3]));
    pool.commit(step);
    pool.close(id);
    let id = open(&mut pool, 300..308);
    let step = plan(&mut pool, id);
    pool.commit(step);
    assert_eq!(cached_pages(&mut pool, 0..9), [4, 5], "nobody else was there to step down");
    assert_eq!(cached_pages(&mut pool, 100..109), [6, 7]);
    pool.check().unwrap();
}

/// A pool with a text in each class, a page each, and a plan that moves both of the upper ones down.
fn chain() -> (Pool, SequenceId, Plan) {
    let mut pool = Pool::with_classes([1, 1, 2], 4, true).unwrap();
    for start in [0, 100, 200] {
        let id = open(&mut pool, start..start + 4);
        let step = plan(&mut pool, id);
        pool.commit(step);
        pool.close(id);
    }
    let id = open(&mut pool, 300..304);
    let step = pool.plan(&[id], None, None).unwrap();
    assert_eq!((sources(&step), targets(&step), step.num_evicted()), (vec![1, 0], vec![3, 1], 0));
    (pool, id, step)
}

fn where_they_are(pool: &mut Pool) -> [Vec<u32>; 3] {
    [0, 100, 200].map(|start| cached_pages(pool, start..start + 5))
}

#[test]
fn a_chain_of_demotions_that_was_not_written_is_undone_from_its_end() {
    let (mut pool, _, step) = chain();
    pool.abandon(step);
    pool.check().unwrap();
    assert_eq!(where_they_are(&mut pool), [[2], [1], [0]]);
    let (mut pool, _, mut step) = chain();
    pool.fill(&mut step, &mut [0], 1, &mut [0; 4], &mut [0; 2]).unwrap();
    pool.abandon(step);
    pool.check().unwrap();
    assert_eq!((where_they_are(&mut pool), pool.num_free()), ([vec![2], vec![1], vec![0]], 1));
}

#[test]
fn a_page_that_the_codec_refuses_blocks_what_would_have_come_in_its_place() {
    for (tried, refused, expected, free) in [(1, 0, [2, 1, 0], 1), (2, 1, [2, 3, 0], 1)] {
        let (mut pool, id, mut step) = chain();
        pool.fill(&mut step, &mut [0], 1, &mut [0; 4], &mut [0; 2]).unwrap();
        pool.refuse(step, tried, &[refused]);
        pool.check().unwrap();
        assert_eq!(where_they_are(&mut pool).concat(), expected);
        let now = pool.statistics();
        assert_eq!((now.refused_pages, now.free_pages, now.demoted_pages), (1, free, 3 + refused as u64));
        // It is not asked again: whoever is left gives, or leaves.
        let again = plan(&mut pool, id);
        assert!(sources(&again).iter().all(|page| *page != [1, 0][refused]));
        pool.commit(again);
        pool.check().unwrap();
    }
}

#[test]
fn what_left_while_a_chain_was_open_is_not_brought_back() {
    for gone in [0, 100, 200] {
        let (mut pool, _, step) = chain();
        let others: Vec<u32> = [0, 100, 200].into_iter().filter(|start| *start != gone).collect();
        let held: Vec<SequenceId> = others.iter().map(|start| open(&mut pool, *start..start + 5)).collect();
        assert_eq!(pool.evict(4), 1);
        pool.abandon(step);
        pool.check().unwrap();
        assert_eq!(matched(&pool, gone..gone + 4), 0);
        for (id, start) in held.iter().zip(&others) {
            assert_eq!(table(&pool, *id), [[2], [1], [0]][*start as usize / 100]);
        }
        assert_eq!(pool.num_free(), 2);
    }
}

#[test]
fn a_running_text_steps_down_before_what_is_in_the_last_class_leaves() {
    let mut pool = Pool::with_classes([3, 3, 6], 4, true).unwrap();
    let id = open(&mut pool, 0..48);
    for _ in 0..9 {
        let mut step = pool.plan(&[id], Some(&[4]), None).unwrap();
        fill(&mut pool, &mut step);
        pool.commit(step);
        pool.check().unwrap();
    }
    let classes: Vec<u32> = table(&pool, id).iter().map(|page| u32::from(*page >= 3) + u32::from(*page >= 6)).collect();
    assert_eq!(classes, [2, 2, 2, 1, 1, 1, 0, 0, 0]);
}

/// Texts that come back, and at last are used a little less lately than a crowd of others that never do.
fn regulars_and_strangers(learned: bool) -> (usize, usize) {
    let mut pool = Pool::with_classes([16, 16, 32], 4, true).unwrap();
    if learned {
        pool.adapt(Adaptive { seed: Some(0), token_weight: 1, learns_at_once: true, is_unguarded: true });
    }
    let mut now = 1_000_000;
    let mut ask = |pool: &mut Pool, start: u32| {
        now += 1_000_000;
        pool.set_time(now);
        let id = open(pool, start..start + 9);
        let step = plan(pool, id);
        pool.commit(step);
        pool.close(id);
    };
    let regulars = [0, 100, 200, 300];
    for round in 0..200 {
        for start in regulars {
            ask(&mut pool, start);
        }
        ask(&mut pool, 1000 + 100 * round);
    }
    for stranger in 0..4 {
        ask(&mut pool, 100_000 + 100 * stranger);
    }
    let id = open(&mut pool, 1_000_000..1_000_024);
    let step = plan(&mut pool, id);
    pool.commit(step);
    pool.check().unwrap();
    let full = |pages: Vec<u32>| pages[..2].iter().filter(|page| **page < 16).count();
    let regulars = regulars.map(|start| full(cached_pages(&mut pool, start..start + 9)));
    let strangers = [0, 1, 2, 3].map(|it| full(cached_pages(&mut pool, 100_000 + 100 * it..100_000 + 100 * it + 9)));
    (regulars.iter().sum(), strangers.iter().sum())
}

#[test]
fn in_the_learned_order_those_who_come_back_step_down_after_those_who_never_did() {
    let (regulars, strangers) = regulars_and_strangers(false);
    assert!(strangers > regulars, "by age {regulars} pages of regulars are whole, {strangers} of strangers");
    let (regulars, strangers) = regulars_and_strangers(true);
    assert!(regulars > strangers, "learned, {regulars} pages of regulars are whole, {strangers} of strangers");
}
