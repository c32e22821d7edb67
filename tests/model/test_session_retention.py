"""Sessions that are pinned, given a time to live or a priority, over calls, forks, and other weights."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from families import make_model, prompt

from kvhybrid import CapacityError, InvalidRequestError, KVCacheConfig, KVHybridError, UnsupportedError
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.model.transformers_cache import PagedSession

BLOCK = 16


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama", seed=0)
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=32 * BLOCK, block_size=BLOCK))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        attachment.cache.pool.set_time(0)
        yield attachment
        attachment.cache.pool.check()
    assert attachment.cache.get_stats()["user_pins"] == 0


def run(
    attachment: Attachment, session: PagedSession | None, ids: torch.Tensor, count: int = 4
) -> torch.Tensor:
    found = attachment.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        past_key_values=session,
    )
    assert isinstance(found, torch.Tensor)
    return found


def cached(attachment: Attachment, ids: torch.Tensor) -> int:
    return attachment.cache.explain(ids[0].numpy()).cached


def evict_down_to(attachment: Attachment, ids: torch.Tensor, tokens: int) -> None:
    """Evict page by page until no more of a text is cached."""
    while cached(attachment, ids) > tokens:
        assert attachment.cache.pool.evict(1) == 1


def test_a_pinned_session_stays_while_all_else_leaves(attachment):
    session, other = attachment.cache.session("a"), prompt(40, seed=2)
    text = run(attachment, session, prompt(40, seed=1))
    run(attachment, None, other)
    assert session.pin() == text.shape[1] - 1
    assert session.is_pinned
    attachment.cache.clear()
    assert (cached(attachment, text), cached(attachment, other)) == (text.shape[1] - 1, 0)
    longer = run(attachment, session, torch.cat([text, prompt(20, seed=3)], dim=1))
    attachment.cache.clear()
    assert cached(attachment, longer) == longer.shape[1] - 1, "what a call added is pinned, too"
    session.unpin()
    attachment.cache.clear()
    assert cached(attachment, longer) == 0


def test_a_pinned_session_that_outgrows_the_bound_stays_pinned_as_far_as_it_was(attachment):
    session = attachment.cache.session("a")
    text = run(attachment, session, prompt(14 * BLOCK, seed=1))
    session.pin()
    longer = run(attachment, session, torch.cat([text, prompt(4 * BLOCK, seed=2)], dim=1))
    assert session.rows.retention.num_unpinned_calls == 1
    attachment.cache.clear()
    assert cached(attachment, longer) == text.shape[1] - 1
    other = attachment.cache.session("b")
    run(attachment, other, prompt(4 * BLOCK, seed=3))
    with pytest.raises(CapacityError, match="pages to pin, 15 pinned of at most 16 of 32"):
        other.pin()
    assert not other.is_pinned


def test_a_dropped_session_is_pinned_no_more_and_what_it_retained_leaves_first(attachment):
    cache, other = attachment.cache, prompt(20, seed=2)
    text = run(attachment, cache.session("a"), prompt(40, seed=1))
    cache.session("a").pin()
    cache.drop_session("a")
    assert cache.get_stats()["user_pins"] == 0
    run(attachment, None, other)
    evict_down_to(attachment, text, 0)
    assert cached(attachment, other) == 20
    stats = cache.get_stats()
    assert stats["evicted_ttl_pages"] == stats["evicted_pages"] > 0


@pytest.mark.parametrize("is_ours", [False, True], ids=["by_another_thread", "by_its_own"])
def test_a_session_that_is_dropped_while_it_runs_leaves_first_all_the_same(attachment, is_ours):
    cache, other, session = attachment.cache, prompt(20, seed=2), attachment.cache.session("a")
    acts = threading.local()  # whose inside does not name the model, as a list's would
    acts.now = None

    def drop() -> None:
        thread = threading.Thread(target=cache.drop_session, args=("a",))
        thread.start()
        thread.join()

    def act(*_: object) -> None:
        if acts.now is not None:
            acts.now()

    with attachment.model.model.layers[1].mlp.register_forward_pre_hook(act):
        session.retain(priority=50)
        text = run(attachment, session, prompt(40, seed=1))
        acts.now = partial(cache.drop_session, "a") if is_ours else drop
        # Its own thread takes the pages away under the pass.
        with pytest.raises(KVHybridError) if is_ours else nullcontext():
            text = run(attachment, session, text, 1)
        acts.now = None
        run(attachment, None, other)
        evict_down_to(attachment, text, 0)
        assert cached(attachment, other) == 20
    stats = cache.get_stats()
    assert stats["evicted_ttl_pages"] == stats["evicted_pages"] > 0


def test_a_session_nobody_said_anything_of_leaves_as_any_other_when_dropped(attachment):
    cache = attachment.cache
    old = run(attachment, None, prompt(40, seed=2))
    text = run(attachment, cache.session("a"), prompt(40, seed=1))
    cache.drop_session("a")
    evict_down_to(attachment, old, 0)
    assert cached(attachment, text) == 43


def test_time_to_live_counts_from_the_last_use(attachment):
    cache, session = attachment.cache, attachment.cache.session("a")
    session.retain(ttl_s=60)
    text = run(attachment, session, prompt(40, seed=1))
    cache.pool.set_time(50_000_000)
    text = run(attachment, session, torch.cat([text, prompt(8, seed=3)], dim=1))
    other = run(attachment, None, prompt(40, seed=2))
    cache.pool.set_time(100_000_000)
    evict_down_to(attachment, other, 0)
    assert cached(attachment, text) == text.shape[1] - 1
    other = run(attachment, None, prompt(40, seed=2))
    cache.pool.set_time(111_000_000)
    evict_down_to(attachment, text, 0)
    assert cached(attachment, other) == other.shape[1] - 1


def test_what_others_computed_before_gets_no_end_from_a_session(attachment):
    cache, shared = attachment.cache, prompt(2 * BLOCK + 1, seed=1)
    run(attachment, None, shared, count=1)
    session = cache.session("a")
    session.retain(ttl_s=1, priority=-5)
    text = run(attachment, session, torch.cat([shared, prompt(2 * BLOCK, seed=2)], dim=1))
    for _ in range(2):
        text = run(attachment, session, torch.cat([text, prompt(8, seed=3)], dim=1))
    other = run(attachment, None, prompt(8, seed=4))
    cache.pool.set_time(10_000_000)
    evict_down_to(attachment, text, 2 * BLOCK)
    assert cached(attachment, other) == other.shape[1] - 1
    evict_down_to(attachment, other, 0)
    assert cached(attachment, text) == 0, "others' beginning leaves as any other"


def test_priorities_hold_at_once_and_for_forks(attachment):
    session = attachment.cache.session("a")
    text = run(attachment, session, prompt(20, seed=1))
    other = run(attachment, None, prompt(20, seed=2))
    session.retain(priority=5)
    (fork,) = session.fork()
    longer = run(attachment, fork, torch.cat([text, prompt(20, seed=3)], dim=1))
    last = run(attachment, None, prompt(20, seed=4))
    evict_down_to(attachment, other, 0)
    evict_down_to(attachment, last, 0)
    assert cached(attachment, longer) == longer.shape[1] - 1
    session.retain()
    fork.retain()
    run(attachment, None, prompt(20, seed=4))
    evict_down_to(attachment, longer, 0)
    assert cached(attachment, last) == last.shape[1] - 1


def test_a_truncated_session_pins_what_is_left_of_it(attachment):
    session = attachment.cache.session("a")
    text = run(attachment, session, prompt(4 * BLOCK, seed=1))
    session.truncate(2 * BLOCK)
    assert session.pin() == 2 * BLOCK
    attachment.cache.clear()
    assert cached(attachment, text) == 2 * BLOCK


def test_a_session_without_text_is_pinned_from_its_first_call_on(attachment):
    session = attachment.cache.session("a")
    assert session.pin() == 0
    text = run(attachment, session, prompt(20, seed=1))
    attachment.cache.clear()
    assert cached(attachment, text) == text.shape[1] - 1


def test_what_cannot_be_meant_is_refused(attachment):
    session = attachment.cache.session("a")
    with pytest.raises(InvalidRequestError, match="priority=1000"):
        session.retain(priority=1000)
    run(attachment, session, prompt(60, seed=1))
    session.pin()
    with pytest.raises(InvalidRequestError, match=r"call unpin\(\) first"):
        session.compress(0.5)
    session.unpin()
    session.compress(0.5)
    with pytest.raises(UnsupportedError, match="compressed cannot be pinned"):
        session.pin()
    with pytest.raises(UnsupportedError, match="compressed cannot be retained"):
        session.retain(priority=1)


def test_other_weights_end_a_pin_and_the_next_call_pins_again(attachment):
    session = attachment.cache.session("a")
    text = run(attachment, session, prompt(20, seed=1))
    session.pin()
    attachment.model.load_state_dict(make_model("llama", seed=5).state_dict())
    text = run(attachment, session, text)
    attachment.cache.clear()
    assert cached(attachment, text) == text.shape[1] - 1
    assert attachment.cache.get_stats()["user_pins"] == 1
