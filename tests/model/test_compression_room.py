"""What compression costs and frees: pages, who gives them back, and what becomes of the text then."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt

from kvhybrid import CapacityError, KVCacheConfig
from kvhybrid.cache.compress import rewrite as rewriting
from kvhybrid.cache.compress.selection import kept_tokens
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from kvhybrid.model.transformers_cache import PagedSession

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
SIZE = 16
LENGTH = 10 * SIZE + 1  # ten full pages computed: the last token waits
LEFT = -(-kept_tokens(LENGTH + 3, 0.25) // SIZE)


def attached(pages: int, route: Route = Route.PAGED, **fields: Any) -> Attachment:
    model = make_model("llama")
    config = KVCacheConfig(max_tokens=pages * SIZE, block_size=SIZE, **fields)
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


def generate(attachment: Attachment, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = attachment.model.generate(ids, **{**GREEDY, **options})
    return found


def turn(attachment: Attachment, name: str, seed: int = 0) -> PagedSession:
    session: PagedSession = attachment.cache.session(name)
    generate(attachment, prompt(LENGTH, seed=seed), **over(session))
    return session


def held_pages(attachment: Attachment) -> int:
    pool = attachment.cache.pool
    return pool.num_pages - pool.num_free - pool.num_evictable


def test_what_a_compressed_session_holds_is_its_share() -> None:
    with attached(64) as attachment:
        session = turn(attachment, "a")
        assert held_pages(attachment) == 0
        assert session.layers[0].keys.shape[2] == LENGTH + 3  # takes the pages back
        assert held_pages(attachment) == 11
        session.compress(0.25)
        assert held_pages(attachment) == LEFT
        stats = attachment.cache.get_stats()
        # The whole text's pages are nobody's now: found by whoever asks, and the first to leave.
        assert stats["evictable_pages"] >= 10
        assert attachment.cache.clear() >= 10
        assert attachment.cache.get_stats()["used_bytes"] == LEFT * attachment.cache.layout.bytes_per_page
        assert stats["removed_tokens"] == LENGTH + 3 - kept_tokens(LENGTH + 3, 0.25)
        attachment.cache.pool.check()


def test_three_compressed_texts_run_where_two_whole_ones_do_not_fit() -> None:
    # Room for two whole texts and a little; forwards over all of them in turn, none at rest.
    more = [prompt(3, seed=seed) for seed in range(3)]
    with attached(25) as attachment:
        sessions = [attachment.cache.session(str(index)) for index in range(3)]
        with torch.no_grad():
            for index, session in enumerate(sessions):
                attachment.model(prompt(LENGTH, seed=index), **over(session))
                session.compress(0.25)
            for session, ids in zip(sessions, more, strict=True):
                attachment.model(ids, **over(session))
        assert [session.rows.gap > 0 for session in sessions] == [True] * 3
        assert attachment.cache.get_stats()["undone_compressions"] == 0
    with attached(25) as attachment, torch.no_grad():
        sessions = [attachment.cache.session(str(index)) for index in range(3)]
        for index in range(2):
            attachment.model(prompt(LENGTH, seed=index), **over(sessions[index]))
        with pytest.raises(CapacityError):
            attachment.model(prompt(LENGTH, seed=2), **over(sessions[2]))


@pytest.mark.parametrize("route", list(Route))
def test_without_room_beside_it_a_text_stays_whole(route: Route) -> None:
    with attached(12, route, use_compression=True, compression_ratio=0.25) as attachment:
        session = turn(attachment, "a")
        assert session.rows.gap == 0
        assert attachment.cache.get_stats()["skipped_compressions"] == 1
        assert held_pages(attachment) == 0
        with pytest.raises(CapacityError):
            session.compress()
        assert session.get_seq_length() == LENGTH + 3
        longer = torch.cat([prompt(LENGTH), prompt(5, seed=2)], dim=1)
        found = generate(attachment, longer, **over(session))
        assert torch.equal(found, generate(attachment, longer, use_cache=False))
        attachment.cache.pool.check()


@pytest.mark.parametrize("route", list(Route))
def test_who_rested_longest_gives_its_pages_back_and_computes_its_text_again(route: Route) -> None:
    with attached(11 + 3 * LEFT, route, use_compression=True, compression_ratio=0.25) as attachment:
        sessions = [turn(attachment, str(seed), seed) for seed in range(3)]
        assert [session.rows.gap > 0 for session in sessions] == [True] * 3
        turn(attachment, "3", 3)
        assert attachment.cache.get_stats()["undone_compressions"] >= 1
        assert sessions[0].rows.gap == 0
        assert sessions[2].rows.gap > 0
        assert sessions[0].get_seq_length() == LENGTH + 3
        attachment.cache.drop_session("1")
        attachment.cache.drop_session("2")
        longer = torch.cat([prompt(LENGTH), prompt(5, seed=2)], dim=1)
        found = generate(attachment, longer, **over(sessions[0]))
        assert torch.equal(found, generate(attachment, longer, use_cache=False))
        attachment.cache.pool.check()


def test_a_session_in_use_gives_nothing_back() -> None:
    with attached(64) as attachment:
        session = turn(attachment, "a")
        session.compress(0.25)
        with session.rows.owner.in_use():
            assert not attachment.cache.compressed.make_room()
            found: list[bool] = []
            other = threading.Thread(target=lambda: found.append(attachment.cache.compressed.make_room()))
            other.start()
            other.join()
            assert found == [False]
        assert session.rows.gap > 0
        assert attachment.cache.compressed.make_room()
        assert session.rows.gap == 0
        assert not attachment.cache.compressed.make_room()


def test_a_session_that_nobody_holds_is_not_asked() -> None:
    with attached(64) as attachment:
        session = turn(attachment, "a")
        session.compress(0.25)
        fork = session.fork()[0]
        attachment.cache.drop_session("a")
        del session
        assert attachment.cache.compressed.make_room()
        assert fork.rows.gap == 0
        assert not attachment.cache.compressed.make_room()


def test_process_kv_gets_room_from_compressed_sessions() -> None:
    with attached(20) as attachment:
        session = turn(attachment, "a")
        session.compress(0.25)
        kv = torch.randn(1, 2, 20 * SIZE - LEFT * SIZE + 1, 8)
        attachment.cache.process_kv(kv, kv)
        assert session.rows.gap == 0


def test_a_failure_halfway_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(64) as attachment:
        turn(attachment, "probed").compress(1.0)
        session = turn(attachment, "a")
        assert session.layers[0].keys.shape[2] == LENGTH + 3  # takes the pages back
        before, held = session.layers[2].keys, held_pages(attachment)
        calls: list[int] = []

        def fail(scores: torch.Tensor, count: int) -> torch.Tensor:
            calls.append(count)
            if len(calls) == 2:
                raise ZeroDivisionError
            return scores.topk(count, dim=-1).indices

        monkeypatch.setattr(rewriting, "choose", fail)
        with pytest.raises(ZeroDivisionError):
            session.compress(0.25)
        assert held_pages(attachment) == held
        assert session.rows.gap == 0
        assert torch.equal(session.layers[2].keys, before)
        attachment.cache.pool.check()
        assert attachment.cache.get_stats()["compressions"] == 0


def own_way(*args: Any, **options: Any) -> torch.Tensor:
    options[CACHE].reset()
    return next(arg for arg in args if isinstance(arg, torch.Tensor))


def test_a_way_of_generating_that_leaves_no_text_is_no_error() -> None:
    with attached(64, use_compression=True, compression_ratio=0.25) as attachment:
        session = attachment.cache.session("a")
        ids = prompt(LENGTH)
        found = generate(attachment, ids, **over(session), custom_generate=own_way)
        assert torch.equal(found, ids)
        assert attachment.cache.get_stats()["skipped_compressions"] == 1


def test_plain_generate_is_never_compressed() -> None:
    with attached(64, use_compression=True, compression_ratio=0.25) as attachment:
        ids = prompt(LENGTH)
        turn(attachment, "a")
        expected = generate(attachment, ids, use_cache=False)
        for _ in range(2):
            assert torch.equal(generate(attachment, ids), expected)
        assert attachment.cache.get_stats()["compressions"] == 1
