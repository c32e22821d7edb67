"""Forks, truncation, and sessions as bytes: each goes its own way, and pages are counted once."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import torch
from families import make_model, prompt

import kvhybrid
from kvhybrid import (
    CapacityError,
    ClosedError,
    CorruptPageError,
    InvalidRequestError,
    KVCacheConfig,
    LayoutError,
)
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.session_export import _digest
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvhybrid.model.transformers_cache import PagedSession


def attached(route: Route, seed: int = 0, **fields: object) -> Attachment:
    model = make_model("llama", seed=seed)
    fields = {"max_tokens": 2048, "block_size": 16, **fields}
    return Attachment(model, KVCache.for_model(model, KVCacheConfig(**fields)), route, "test").install()


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    with attached(request.param) as attachment:
        yield attachment
    gc.collect()
    pool = attachment.cache.pool
    pool.check()
    assert pool.num_free + pool.num_evictable == pool.num_pages


@torch.no_grad()
def feed(attachment: Attachment, session: PagedSession, ids: torch.Tensor) -> torch.Tensor:
    return attachment.model(ids, **over(session)).logits[:, -1]


@torch.no_grad()
def whole(attachment: Attachment, *parts: torch.Tensor) -> torch.Tensor:
    return attachment.model(torch.cat(parts, dim=1), use_cache=False).logits[:, -1]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_forks_go_on_from_the_same_place_each_its_own_way(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    start = prompt(37)
    feed(attachment, session, start)
    forks = session.fork(3)
    ways = [prompt(length, seed=seed) for seed, length in enumerate((1, 7, 30), start=1)]
    for fork, way in zip(forks, ways, strict=True):
        close(feed(attachment, fork, way), whole(attachment, start, way))
    again = prompt(4, seed=9)
    close(feed(attachment, session, again), whole(attachment, start, again))
    for fork, way in zip(forks, ways, strict=True):
        close(feed(attachment, fork, again), whole(attachment, start, way, again))


def test_a_fork_shares_all_but_its_last_page(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    feed(attachment, session, prompt(16 * 8 + 3))
    pool = attachment.cache.pool
    used = pool.num_pages - pool.num_free
    forks = session.fork(5)
    assert pool.num_pages - pool.num_free == used == 9
    for seed, fork in enumerate(forks):
        feed(attachment, fork, prompt(2, seed=seed))
    assert pool.num_pages - pool.num_free == used + 5
    del forks, fork  # no circle keeps them: their pages are back at once
    assert pool.num_pages - pool.num_free <= used + 5  # the tails stay, unpinned
    assert attachment.cache.get_stats()["sequences"] == 1


def test_a_fork_of_a_session_at_rest_finds_its_pages(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    ids = prompt(40)
    text = attachment.model.generate(ids, max_new_tokens=5, do_sample=False, **over(session))
    (fork,) = session.fork()
    more = torch.cat([text, prompt(6, seed=3)], dim=1)
    found = attachment.model.generate(more, max_new_tokens=5, do_sample=False, **over(fork))
    assert fork.cached_tokens[0] >= 44
    assert torch.equal(
        found, attachment.model.generate(more, max_new_tokens=5, do_sample=False, use_cache=False)
    )


def test_copying_a_session_is_a_fork(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    start, way = prompt(20), prompt(5, seed=1)
    feed(attachment, session, start)
    twin = copy.deepcopy(session)
    close(feed(attachment, twin, way), whole(attachment, start, way))
    assert (session.get_seq_length(), twin.get_seq_length()) == (20, 25)


def test_forks_are_closed_with_the_model_that_they_read(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    feed(attachment, session, prompt(20))
    (fork,) = session.fork()
    kvhybrid.detach(attachment.model)
    assert attachment.cache.get_stats()["sequences"] == 0
    with pytest.raises(kvhybrid.UnsupportedError, match="not attached"):
        feed(attachment, fork, prompt(1))
    with pytest.raises(InvalidRequestError, match=r"fork\(0\)"):
        session.fork(0)


@pytest.mark.parametrize("keep", [0, 1, 15, 16, 17, 36])
@pytest.mark.parametrize("at_rest", [False, True])
def test_a_truncated_session_goes_on_from_there(attachment: Attachment, keep: int, at_rest: bool) -> None:
    session = attachment.cache.session("root")
    start, way = prompt(37), prompt(6, seed=1)
    feed(attachment, session, start)
    if at_rest:
        session.rows.release()
        attachment.cache.clear()
    session.truncate(keep)
    assert session.get_seq_length() == keep
    close(feed(attachment, session, way), whole(attachment, start[:, :keep], way))


def test_nothing_can_be_truncated_to_more_than_there_is(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    feed(attachment, session, prompt(5))
    for tokens, words in ((-1, "at least 0"), (6, "session of 5 tokens")):
        with pytest.raises(InvalidRequestError, match=words):
            session.truncate(tokens)
    assert session.get_seq_length() == 5


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(2 * 33).view(2, 33)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_imported_elsewhere_is_bit_equal_and_not_computed_again(dtype: str | None) -> None:
    ids, mask = padded()
    with attached(Route.PAGED, dtype=dtype) as here, torch.no_grad():
        session = here.cache.session("alice")
        here.model(ids, attention_mask=mask, **over(session))
        data = session.export()
        expected = [session.layers[layer].keys for layer in range(3)]
    with attached(Route.PAGED, dtype=dtype) as there:
        twin = there.cache.session("bob")
        twin.import_(data)
        assert twin.get_seq_length() == 33
        assert all(torch.equal(twin.layers[layer].keys, expected[layer]) for layer in range(3))
        assert there.cache.get_stats()["plans"] == 1
        more = torch.cat([ids, prompt(8, seed=2).view(2, 4)], dim=1)
        twin.rows.release()
        seen = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], dim=1)
        there.model.generate(more, attention_mask=seen, max_new_tokens=2, do_sample=False, **over(twin))
        assert twin.cached_tokens == [27, 33]


def test_tokens_alone_are_small_and_computed_by_whoever_imports_them(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    start, way = prompt(40), prompt(3, seed=1)
    feed(attachment, session, start)
    data = session.export(pages=False)
    assert len(data) < 400
    with attached(attachment.route) as there:
        twin = there.cache.session("bob")
        twin.import_(data)
        close(feed(there, twin, way), whole(there, start, way))


def test_bytes_that_are_not_what_was_exported_are_refused_and_nothing_is_lost(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(20))
    data, signed = session.export(), session.export(key=b"secret")
    twin = attachment.cache.session("bob")
    feed(attachment, twin, prompt(9, seed=4))
    middle = len(data) // 2
    for wrong in (b"", data[:-1], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], signed):
        with pytest.raises(CorruptPageError):
            twin.import_(wrong)
    with pytest.raises(CorruptPageError):
        twin.import_(data, key=b"secret")
    with pytest.raises(CorruptPageError):
        twin.import_(signed, key=b"other")
    twin.import_(signed, key=b"secret")
    assert twin.get_seq_length() == 20


@pytest.mark.parametrize(("seed", "block"), [(1, 16), (0, 32)])
def test_another_models_pages_are_refused(attachment: Attachment, seed: int, block: int) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(20))
    data = session.export()
    with attached(attachment.route, seed=seed, block_size=block) as there:
        twin = there.cache.session("bob")
        with pytest.raises(LayoutError, match="exported from "):
            twin.import_(data)
        assert twin.get_seq_length() == 0


def test_what_is_no_number_and_no_bytes_is_refused_and_changes_nothing(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(20))
    data: Any = session.export()
    wrong: list[Callable[[Any], object]] = [
        session.truncate,
        session.fork,
        lambda what: session.export(key=what),
        lambda what: session.import_(data, key=what),
        session.import_,
    ]
    for call in wrong:
        for what in (True, 1.5, "3", None):
            with pytest.raises(InvalidRequestError):
                call(what)
    assert session.get_seq_length() == 20
    assert session.export() == data


def test_a_closed_session_says_so_whatever_is_asked(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(20))
    data = session.export()
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.truncate(0),
        session.fork,
        session.export,
        lambda: session.import_(data),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="alice"):
            call()


def test_an_import_that_finds_no_room_leaves_the_session_as_it_was(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(50))
    data = session.export()
    with attached(attachment.route, max_tokens=32) as there:
        twin = there.cache.session("bob")
        feed(there, twin, prompt(9, seed=4))
        before = twin.export(pages=False)
        with pytest.raises(CapacityError):
            twin.import_(data)
        assert twin.export(pages=False) == before
        close(feed(there, twin, prompt(3, seed=1)), whole(there, prompt(9, seed=4), prompt(3, seed=1)))


def test_signed_nonsense_is_refused_as_such(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    feed(attachment, session, prompt(20))
    body = msgpack.unpackb(session.export()[32:])
    layers = body["layers"]
    for change in (
        {"layers": 5},
        {"layers": [None, *layers[1:]]},
        {"layers": [[*layers[0], b""], *layers[1:]]},
        {"layers": [[layers[0][0], 7], *layers[1:]]},
        {"texts": [], "pads": [], "columns": 20},
        {"texts": 3},
        {"pads": [None]},
        {"columns": -1, "texts": [b""]},
    ):
        changed = msgpack.packb({**body, **change})
        with pytest.raises(CorruptPageError):
            session.import_(_digest(changed, b"") + changed)
    assert session.get_seq_length() == 20


def test_sessions_and_tenants_are_text_so_that_no_two_are_one(attachment: Attachment) -> None:
    for name in (1, True, None, ["a"]):
        wrong: Any = name
        with pytest.raises(InvalidRequestError, match="must be text"):
            attachment.cache.session(wrong)
        with pytest.raises(InvalidRequestError, match="must be text"):
            attachment.cache.session("alice", tenant=wrong)


NONSENSE: list[dict[str, object]] = [
    {"texts": [b""], "pads": [0], "columns": -3, "layers": None},
    {"texts": [b"\0\0\0\0"], "pads": [10**11], "columns": 10**11 + 1, "layers": None},
    {"texts": [b""], "pads": [10**18], "columns": 0, "layers": None},
    {"columns": float("inf")},
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
def test_numbers_that_no_text_has_are_refused(attachment: Attachment, nonsense: dict[str, object]) -> None:
    session, other = attachment.cache.session("root"), attachment.cache.session("other")
    feed(attachment, session, prompt(20))
    body = msgpack.packb({**msgpack.unpackb(session.export()[32:]), **nonsense})
    with pytest.raises(CorruptPageError):
        other.import_(_digest(body, b"") + body)
    assert other.get_seq_length() == 0
