"""What is found again, sentence by sentence."""

import numpy as np
import pytest

from kvhybrid._core import CapacityError, PagePool

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def ids(*tokens):
    return np.array(tokens, np.int32)


def table(sequence):
    return np.frombuffer(sequence.block_table(), np.int32).tolist()


@pytest.fixture
def remember(compute):
    """``remember(pool, tokens, namespace)``: a request that came, was computed and went."""

    def run(pool, tokens, namespace=0, **how):
        sequence = pool.open(ids(*tokens), namespace, **how)
        compute(pool, sequence)
        sequence.close()

    return run


def test_a_hit_is_to_the_token(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    for shared in range(len(PROMPT) + 1):
        assert pool.match(ids(*PROMPT[:shared], 99, 98)) == shared


def test_a_hit_is_to_the_token_inside_a_tail_too(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT[:6])
    assert [pool.match(ids(*PROMPT[:n])) for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 6, 6]


def test_the_last_prompt_token_is_left_to_compute(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    assert pool.match(ids(*PROMPT)) == 8
    again = pool.open(ids(*PROMPT))
    assert (again.cached, again.length, again.pending) == (7, 7, 1)


def test_one_token_or_none_finds_nothing(remember):
    pool = PagePool(8, 1)
    remember(pool, PROMPT)
    assert pool.open(ids(1)).cached == 0
    assert pool.open(ids()).cached == 0


def test_a_match_ending_inside_a_block_copies_the_page_and_leaves_the_source_alone(compute):
    pool = PagePool(8, 4)
    first = pool.open(ids(*PROMPT))
    compute(pool, first)
    source = table(first)
    second = pool.open(ids(1, 2, 3, 4, 5, 6, 66, 67))
    assert second.cached == 6
    assert table(second) == source, "until it writes it reads where the first one wrote"
    step = compute(pool, second)
    own = table(second)
    assert own[0] == source[0]
    assert step.copies == [(source[1], own[1])]
    assert step.slots.tolist() == [own[1] * 4 + 2, own[1] * 4 + 3]
    assert table(first) == source
    assert pool.match(ids(*PROMPT)) == 8
    assert pool.match(ids(1, 2, 3, 4, 5, 6, 66, 67)) == 8
    assert pool.statistics()["copied_pages"] == 1


def test_a_match_at_the_end_of_a_block_copies_nothing(remember, compute):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    second = pool.open(ids(1, 2, 3, 4, 55))
    assert second.cached == 4
    assert compute(pool, second).copies == []


def test_a_running_request_is_found_as_far_as_its_full_blocks(compute):
    pool = PagePool(8, 4)
    running = pool.open(ids(*PROMPT[:6]))
    compute(pool, running)
    assert pool.match(ids(*PROMPT)) == 4
    compute(pool, running, tokens=[7])
    assert pool.match(ids(*PROMPT)) == 4
    compute(pool, running, tokens=[8])
    assert pool.match(ids(*PROMPT)) == 8


def test_nothing_is_found_before_it_was_computed():
    pool = PagePool(8, 4)
    waiting = pool.open(ids(*PROMPT))
    assert pool.match(ids(*PROMPT)) == 0
    waiting.close()
    assert pool.match(ids(*PROMPT)) == 0


def test_two_that_compute_the_same_at_once_keep_one_copy(compute):
    pool = PagePool(8, 4)
    twins = [pool.open(ids(*PROMPT)), pool.open(ids(*PROMPT))]
    compute(pool, *twins)
    assert table(twins[0]) == table(twins[1])
    now = pool.statistics()
    assert (now["free_pages"], now["sealed_pages"], now["duplicate_pages"]) == (6, 2, 2)


def test_namespaces_never_mix(remember):
    pool = PagePool(16, 4)
    remember(pool, PROMPT, 1)
    assert [pool.match(ids(*PROMPT), namespace) for namespace in (0, 1, 2)] == [0, 8, 0]
    assert pool.open(ids(*PROMPT), 2).cached == 0
    remember(pool, PROMPT[:5], 2)
    assert [pool.match(ids(*PROMPT), namespace) for namespace in (0, 1, 2)] == [0, 8, 5]


def test_any_64_bits_name_a_namespace(remember):
    pool = PagePool(16, 4)
    remember(pool, PROMPT, 2**64 - 1)
    assert pool.match(ids(*PROMPT), 2**64 - 1) == 8
    assert pool.match(ids(*PROMPT), 2**32 - 1) == 0


def test_dropping_a_namespace_leaves_the_others(remember):
    pool = PagePool(16, 4)
    remember(pool, PROMPT, 1)
    remember(pool, PROMPT, 2)
    assert pool.drop(1) == 2
    assert [pool.match(ids(*PROMPT), namespace) for namespace in (1, 2)] == [0, 8]
    assert pool.drop(1) == 0


def test_dropping_a_namespace_leaves_what_somebody_holds(remember):
    pool = PagePool(16, 4)
    remember(pool, PROMPT)
    holder = pool.open(ids(*PROMPT[:5]))
    assert pool.drop(0) == 1
    assert pool.match(ids(*PROMPT)) == 4 == holder.cached
    holder.close()
    assert pool.drop(0) == 1


def test_leaves_leave_first_the_deepest_block_of_the_oldest_request_first(remember):
    pool = PagePool(16, 2)
    old, young = [1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9, 9]
    remember(pool, old)
    remember(pool, young)
    left = []
    while pool.num_evictable:
        left.append((pool.match(ids(*old)), pool.match(ids(*young))))
        assert pool.evict(1) == 1
    assert left == [(6, 6), (4, 6), (2, 6), (2, 4), (2, 2)]
    assert pool.match(ids(*old)) == pool.match(ids(*young)) == 0


def test_who_is_asked_for_again_is_young_again(remember):
    pool = PagePool(16, 4)
    for stem in (1, 2, 3):
        remember(pool, [stem] * 4)
    remember(pool, [1] * 5)
    pool.evict(1)
    assert [pool.match(ids(*[stem] * 4)) for stem in (1, 2, 3)] == [4, 0, 4]


def test_looking_keeps_nobody_young(remember):
    pool = PagePool(16, 4)
    for stem in (1, 2):
        remember(pool, [stem] * 4)
    assert pool.match(ids(1, 1, 1, 1)) == 4
    pool.evict(1)
    assert [pool.match(ids(*[stem] * 4)) for stem in (1, 2)] == [0, 4]


def test_who_needs_pages_takes_them_from_the_oldest(remember, compute):
    pool = PagePool(3, 4)
    for stem in (1, 2, 3):
        remember(pool, [stem] * 4)
    new = pool.open(ids(4, 4, 4, 4))
    compute(pool, new)
    assert [pool.match(ids(*[stem] * 4)) for stem in (1, 2, 3, 4)] == [0, 4, 4, 4]
    assert pool.statistics()["evicted_pages"] == 1


def test_pinned_prefixes_stay(remember, compute):
    pool = PagePool(4, 4)
    remember(pool, PROMPT)
    holder = pool.open(ids(*PROMPT[:5]))
    assert pool.evict(4) == 1, "the block behind what is held is nobody's"
    assert pool.match(ids(*PROMPT)) == 4
    greedy = pool.open(ids(*range(10, 26)))
    with pytest.raises(CapacityError, match="needs 4 pages, 3 free, 0 evictable of 4"):
        compute(pool, greedy)
    assert pool.match(ids(*PROMPT)) == 4
    holder.close()
    compute(pool, greedy)
    assert pool.match(ids(*PROMPT)) == 0


@pytest.mark.parametrize(("keep_tails", "found"), [(True, 10), (False, 8)])
def test_the_second_turn_of_a_conversation_finds_the_first(keep_tails, found, compute):
    pool = PagePool(8, 4, keep_tails=keep_tails)
    first = pool.open(ids(1, 2, 3, 4, 5, 6, 7))
    compute(pool, first)
    for token in (11, 12, 13):
        compute(pool, first, tokens=[token])
    first.close()
    second = pool.open(ids(1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 21, 22))
    assert second.cached == found
    compute(pool, second)
    assert second.length == 12


@pytest.mark.parametrize(("keep_tails", "found"), [(True, 3), (False, 0)])
def test_a_prompt_shorter_than_a_block_is_found_when_tails_are_kept(keep_tails, found, remember):
    pool = PagePool(4, 16, keep_tails=keep_tails)
    remember(pool, [1, 2, 3])
    assert pool.match(ids(1, 2, 3, 4)) == found
    assert pool.num_evictable == bool(found)
    assert pool.num_free + pool.num_evictable == 4


def test_a_tail_that_is_there_already_is_not_kept_twice(remember):
    pool = PagePool(8, 4)
    for _ in range(3):
        remember(pool, PROMPT[:6])
    assert pool.num_evictable == 2
    assert pool.match(ids(*PROMPT)) == 6


def test_a_tail_stays_with_the_fork_that_holds_its_page_and_is_left_by_the_last(compute):
    pool = PagePool(8, 4)
    one = pool.open(ids(*PROMPT[:6]))
    compute(pool, one)
    two = one.fork()
    one.close()
    assert pool.match(ids(*PROMPT)) == 4
    two.close()
    assert pool.match(ids(*PROMPT)) == 6


def test_pending_tokens_are_nobody_elses_business(compute):
    pool = PagePool(8, 4)
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence, counts=[6])
    sequence.close()
    assert pool.match(ids(*PROMPT)) == 6


def test_forks_share_and_copy_on_write(compute):
    pool = PagePool(8, 4)
    one = pool.open(ids(*PROMPT[:6]))
    compute(pool, one)
    two = one.fork()
    shared = table(one)
    assert table(two) == shared
    assert pool.num_free == 6
    assert pool.statistics()["shared_pages"] == 2
    step = compute(pool, two, tokens=[77])
    assert step.copies == [(shared[1], table(two)[1])]
    assert table(two)[0] == shared[0]
    assert table(one) == shared
    assert compute(pool, one, tokens=[88]).copies == [], "the other one is alone now and writes in place"
    assert np.frombuffer(one.tokens(), np.uint32).tolist() == [*PROMPT[:6], 88]
    assert np.frombuffer(two.tokens(), np.uint32).tolist() == [*PROMPT[:6], 77]


def test_forks_stepping_together_write_into_different_pages(compute):
    pool = PagePool(8, 4)
    one = pool.open(ids(*PROMPT[:6]))
    compute(pool, one)
    forks = [one, one.fork(), one.fork()]
    step = compute(pool, *forks, tokens=[77, 88, 99])
    assert len({table(fork)[1] for fork in forks}) == 3
    assert len({table(fork)[0] for fork in forks}) == 1
    assert len(step.copies) >= 2
    assert len(set(step.slots.tolist())) == 3


def test_a_fork_at_the_end_of_a_block_copies_nothing(compute):
    pool = PagePool(8, 4)
    one = pool.open(ids(*PROMPT))
    compute(pool, one)
    two = one.fork()
    assert compute(pool, one, two, tokens=[77, 88]).copies == []


@pytest.mark.parametrize(("align", "cached"), [(1, 7), (2, 6), (3, 6), (4, 4), (5, 5), (8, 0), (100, 0)])
def test_align_rounds_down(align, cached, remember, compute):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    sequence = pool.open(ids(*PROMPT), align=align)
    assert (sequence.cached, sequence.pending) == (cached, 8 - cached)
    compute(pool, sequence)
    assert sequence.length == 8


def test_without_reuse_nothing_is_matched_and_all_is_left_for_others(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    sequence = pool.open(ids(*PROMPT), reuse=False)
    assert (sequence.cached, sequence.pending) == (0, 8)
    sequence.close()
    remember(pool, [9] * 4, reuse=False)
    assert pool.match(ids(9, 9, 9, 9)) == 4


def test_without_sharing_nothing_is_left_for_others_but_what_is_there_is_used(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT[:4], share=False)
    assert (pool.match(ids(*PROMPT)), pool.num_free) == (0, 8)
    remember(pool, PROMPT[:4])
    private = pool.open(ids(*PROMPT), share=False)
    assert private.cached == 4
    private.close()
    remember(pool, PROMPT, share=False)
    assert pool.match(ids(*PROMPT)) == 4


def test_truncating_into_a_sealed_block_leaves_it_to_others(compute):
    pool = PagePool(8, 4)
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence)
    sealed = table(sequence)
    sequence.truncate(6)
    assert (sequence.length, sequence.pending) == (6, 0)
    assert pool.match(ids(*PROMPT)) == 8
    step = compute(pool, sequence, tokens=[66])
    assert step.copies == [(sealed[1], table(sequence)[1])]
    assert pool.match(ids(*PROMPT)) == 8


def test_the_statistics_say_what_share_of_the_prompts_was_cached(remember):
    pool = PagePool(8, 4)
    remember(pool, PROMPT)
    remember(pool, PROMPT)
    now = pool.statistics()
    assert (now["opens"], now["queried_tokens"], now["cached_tokens"]) == (2, 16, 7)


def test_nothing_behind_a_bound_on_sharing_is_found_until_it_is_raised(compute):
    pool = PagePool(16, 4)
    row = pool.open(ids(*range(10)))
    row.share_up_to(6)
    compute(pool, row)
    assert pool.match(ids(*range(10))) == 4  # full blocks only, and none that reaches past the bound
    row.append(ids(10, 11, 12))
    row.share_up_to(100)
    compute(pool, row)
    assert pool.match(ids(*range(13))) == 12
    row.share_up_to(12)
    row.close()
    assert pool.match(ids(*range(13))) == 12, "the tail is past the bound"
    pool.check()
