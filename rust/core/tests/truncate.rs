//! What a truncated sequence lets go of: the pages behind the cut may leave, those before it stay.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kvhybrid_core::{Namespace, OpenOptions, Pool, SequenceId};

const OPEN: OpenOptions = OpenOptions { namespace: Namespace(0), reuse: true, share: true, align: 1 };

fn compute(pool: &mut Pool, tokens: std::ops::Range<u32>) -> SequenceId {
    let (id, _) = pool.open(&tokens.collect::<Vec<_>>(), OPEN).unwrap();
    let plan = pool.plan(&[id], None, None).unwrap();
    pool.commit(plan);
    id
}

#[test]
fn pages_behind_a_cut_may_leave() {
    let mut pool = Pool::new(8, 4, true).unwrap();
    let id = compute(&mut pool, 0..32);
    for (length, evictable) in [(28, 1), (26, 1), (24, 2), (9, 5), (8, 6)] {
        pool.truncate(id, length).unwrap();
        assert_eq!(pool.num_evictable(), evictable, "cut at {length}");
        pool.check().unwrap();
    }
    pool.append(id, &[90; 24]).unwrap();
    let plan = pool.plan(&[id], None, None).unwrap();
    pool.commit(plan);
    assert_eq!((pool.num_free(), pool.num_evictable(), pool.length(id).unwrap()), (0, 0, 32));
    pool.check().unwrap();
}

#[test]
fn pages_that_another_sequence_stands_on_stay() {
    let mut pool = Pool::new(8, 4, true).unwrap();
    let id = compute(&mut pool, 0..32);
    let fork = pool.fork(id).unwrap();
    pool.truncate(id, 8).unwrap();
    assert_eq!(pool.num_evictable(), 0);
    pool.check().unwrap();
    pool.close(fork);
    assert_eq!(pool.num_evictable(), 6);
    let tokens: Vec<u32> = (0..32).collect();
    assert_eq!(pool.matched(Namespace(0), &tokens).unwrap(), 32);
    pool.close(id);
    assert_eq!((pool.num_evictable(), pool.matched(Namespace(0), &tokens).unwrap()), (8, 32));
    pool.check().unwrap();
}
