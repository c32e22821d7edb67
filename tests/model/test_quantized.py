"""Texts of which old pages were quantized: what is read of them, on every way that a caller has."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from families import make_model, prompt
from hybrids import make_hybrid
from transformers import DynamicCache, cache_utils

from kvhybrid import CapacityError, KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.cache.quantized import as_ids
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.cache.quantized import QuantizedPages
    from kvhybrid.model.transformers_cache import PagedSession

BLOCK = 16


def attached(
    route: Route = Route.PAGED, pages: int = 32, bits: int = 8, *, ladder: bool = False, **fields: object
) -> Attachment:
    if ladder:
        fields = {"cache_strategy": "paged", **fields}
        bits = 4
    model = make_model("llama")
    # Without pins a step may take half of the few pages of full precision.
    fields = {"max_pinned_share": 0.0, **fields}
    config = KVCacheConfig(
        max_tokens=pages * BLOCK, block_size=BLOCK, use_quantization=True, quantization_bits=bits, **fields
    )
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


WAYS = [
    pytest.param((route, ladder), id=f"{route}, {'ladder' if ladder else '8 bits'}")
    for route in Route
    for ladder in (False, True)
]


@pytest.fixture(params=WAYS)
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    route, ladder = request.param
    with attached(route, ladder=ladder) as attachment:
        yield attachment
    gc.collect()
    pool = attachment.cache.pool
    pool.check()
    assert pool.num_free + pool.num_evictable == pool.num_pages


@torch.no_grad()
def feed(attachment: Attachment, session: PagedSession, ids: torch.Tensor) -> torch.Tensor:
    return attachment.model(ids, **over(session)).logits


def table(session: PagedSession, row: int = 0) -> list[int]:
    assert session.rows.rows is not None
    return np.frombuffer(session.rows.rows.sequences[row].block_table(), np.int32).tolist()


def is_cold(attachment: Attachment, session: PagedSession, row: int = 0) -> list[bool]:
    return [page >= attachment.cache.storage.num_full for page in table(session, row)]


@torch.no_grad()
def feed_and_told(
    attachment: Attachment, session: PagedSession, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed ``ids``, in one step; return the logits, and the bare model's behind copies of what it read."""
    held = session.get_seq_length()
    session.rows.reader.forget(0)  # a mirror of it would be as exact as what was computed
    logits = feed(attachment, session, ids)
    past = DynamicCache()
    for index, layer in enumerate(session.layers):
        past.update(layer.keys[:, :, :held], layer.values[:, :, :held], index)
    return logits, attachment.model(ids, **over(past)).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def through(records: QuantizedPages, side: str, pages: torch.Tensor) -> torch.Tensor:
    """What ``pages`` read as once the codec of that class has written them."""
    codec, kept = records.codec, (records.keys if side == "k" else records.values)[0]
    assert kept is not None
    record = torch.empty_like(kept[: len(pages)])
    write = codec.quantize_keys if side == "k" else codec.quantize_values
    assert write(pages.contiguous(), None, record, None).all()
    room = torch.empty(pages.shape, dtype=torch.float32)
    (codec.dequantize_keys if side == "k" else codec.dequantize_values)(record, None, room)
    return room


@pytest.mark.parametrize("bits", [8, 4, "ladder"])
@pytest.mark.parametrize("route", list(Route))
def test_old_pages_are_read_as_their_records_say_and_new_ones_exactly(route: Route, bits: int | str) -> None:
    ids = prompt(300)
    fields = {"ladder": True} if bits == "ladder" else {"bits": bits}
    with attached(route, **fields) as attachment, torch.no_grad():  # type: ignore[arg-type]
        storage, session = attachment.cache.storage, attachment.cache.session("a")
        own = DynamicCache()
        attachment.model(ids, **over(own))
        feed(attachment, session, ids)
        pages = table(session)
        assert sum(page >= storage.num_full for page in pages) == len(pages) - storage.num_full
        assert pages[-1] < storage.num_full
        if bits == "ladder":
            assert all(any(page in records for page in pages) for records in storage.records)
        for layer in range(3):
            view = session.layers[layer]
            for side, found in (("k", view.keys), ("v", view.values)):
                full = (storage.keys if side == "k" else storage.values)[layer]
                originals = (own.layers[layer].keys if side == "k" else own.layers[layer].values)[0]
                for block, page in enumerate(pages):
                    span = slice(block * BLOCK, min((block + 1) * BLOCK, 300))
                    room = torch.empty_like(full[:1])
                    records = next((records for records in storage.records if page in records), None)
                    if records is None:
                        room.copy_(full[page])
                    else:
                        records.dequantize(layer, side, as_ids([page - records.first]), room, as_ids([0]))
                    here = found[0, :, span]
                    assert torch.equal(here, room[0, :, : span.stop - span.start])
                    if layer == 0 and records is not None:
                        # The first layer sees no other page: its record is its original's, made once a step.
                        expected = originals[None, :, span]
                        for step in storage.records[: storage.records.index(records) + 1]:
                            expected = through(step, side, expected)
                        torch.testing.assert_close(here, expected[0], atol=1e-5, rtol=1e-5)
        close(*feed_and_told(attachment, session, prompt(9, seed=1)))


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_any_number_of_new_tokens_sees_both_kinds_of_pages(attachment: Attachment, count: int) -> None:
    session = attachment.cache.session("a")
    feed(attachment, session, prompt(300))
    assert True in is_cold(attachment, session)
    close(*feed_and_told(attachment, session, prompt(count, seed=1)))


def test_a_page_is_quantized_once(attachment: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, moved = attachment.cache.storage, []
    quantize = storage.quantize
    monkeypatch.setattr(storage, "quantize", lambda pairs: (moved.extend(pairs), quantize(pairs))[1])
    session = attachment.cache.session("a")
    feed(attachment, session, prompt(300))
    for turn in range(4):
        feed(attachment, session, prompt(20, seed=turn))
    places = [int(np.searchsorted(storage.firsts, page, side="right")) for page in range(storage.num_pages)]
    assert all(places[target] == places[source] + 1 for source, target in moved)
    cold = [page for page in table(session) if page >= storage.num_full]
    # Nothing was evicted: each record of the last class is a block of the text, and each step was taken once.
    last = storage.firsts[-1]
    assert sorted(target for _, target in moved if target >= last) == sorted(
        page for page in cold if page >= last
    )
    assert len(moved) == sum(places[page] for page in cold)
    stats = attachment.cache.get_stats()
    assert stats["demoted_pages"] == len(moved)
    assert stats["demoted_to_int4_pages"] == sum(source >= storage.num_full for source, _ in moved)


def test_generated_text_is_what_the_bare_model_says(attachment: Attachment) -> None:
    ids = prompt(260)
    found = attachment.model.generate(
        ids, max_new_tokens=40, do_sample=False, **over(attachment.cache.session("a"))
    )
    expected = attachment.model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=False)
    assert torch.equal(found, expected)
    assert attachment.cache.get_stats()["quantized_tokens"] > 200


@pytest.mark.parametrize("keep", [16 * 3 + 5, 16 * 4])
def test_a_text_cut_in_a_quantized_page_goes_on_from_a_copy(attachment: Attachment, keep: int) -> None:
    session, storage = attachment.cache.session("a"), attachment.cache.storage
    feed(attachment, session, prompt(300))
    before = [(layer.keys[:, :, :keep], layer.values[:, :, :keep]) for layer in session.layers]
    session.truncate(keep)
    close(*feed_and_told(attachment, session, prompt(6, seed=1)))
    assert table(session)[-1] < storage.num_full
    for layer, (keys, values) in zip(session.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :keep], keys)
        assert torch.equal(layer.values[:, :, :keep], values)


def test_forks_of_a_quantized_text_go_their_own_ways(attachment: Attachment) -> None:
    session = attachment.cache.session("a")
    feed(attachment, session, prompt(200))
    session.crop(16 * 2 + 3)
    assert is_cold(attachment, session)[-1]
    forks = session.fork(3)
    ways = [prompt(length, seed=seed) for seed, length in enumerate((1, 6, 20), start=1)]
    for fork, way in zip(forks, ways, strict=True):
        close(*feed_and_told(attachment, fork, way))


@pytest.mark.parametrize("route", list(Route))
def test_beams_over_quantized_pages_are_right(route: Route) -> None:
    ids = prompt(300)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    with attached(route, pages=110) as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, ids)
        assert True in is_cold(attachment, session)
        found = attachment.model.generate(ids, **kwargs, **over(session))
        assert torch.equal(found, attachment.model.generate(ids, **kwargs, use_cache=False))


def test_padded_batches_see_both_kinds_of_pages() -> None:
    ids = torch.cat([prompt(120), prompt(120, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    for route in Route:
        with attached(route, pages=48) as attachment:
            session = attachment.cache.session("a")
            found = attachment.model.generate(ids, **kwargs, **over(session))
            assert attachment.cache.get_stats()["quantized_tokens"] > 0
            assert torch.equal(found, attachment.model.generate(ids, **kwargs, use_cache=False))


def test_an_exported_text_of_both_kinds_is_imported_as_it_reads(attachment: Attachment) -> None:
    session = attachment.cache.session("a")
    feed(attachment, session, prompt(300))
    expected = [(layer.keys, layer.values) for layer in session.layers]
    data = session.export()
    other = attached(attachment.route, pages=400)
    with other:
        taken = other.cache.session("b")
        taken.import_(data)
        for layer, (keys, values) in zip(taken.layers, expected, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    # Into as few pages of full precision as it came from, it is written in several steps.
    small = attached(attachment.route)
    with small:
        taken = small.cache.session("b")
        taken.import_(data)
        assert small.cache.get_stats()["quantized_tokens"] > 0
        error = (taken.layers[0].keys - expected[0][0]).abs().max()
        assert error < 0.05


def test_a_prompt_that_no_budget_holds_is_refused_and_nothing_is_lost(attachment: Attachment) -> None:
    session, pool = attachment.cache.session("a"), attachment.cache.pool
    with pytest.raises(CapacityError, match=f"of {attachment.cache.storage.num_full}"), torch.no_grad():
        attachment.model(prompt(pool.num_pages * BLOCK + 1), **over(session))
    pool.check()
    ids = prompt(40, seed=1)  # another text: what was computed of that one is kept, in a few bits
    found = attachment.model.generate(ids, max_new_tokens=4, do_sample=False, **over(session))
    expected = attachment.model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, expected)


def test_a_codec_that_fails_costs_the_step_and_nothing_else(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, storage = attachment.cache.session("a"), attachment.cache.storage
    feed(attachment, session, prompt(16 * storage.num_full))
    before = [(layer.keys, layer.values) for layer in session.layers]

    def fail(pairs: object) -> list[bool]:
        raise MemoryError("no room for the codec")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "quantize", fail)
        with pytest.raises(MemoryError, match="no room for the codec"):
            feed(attachment, session, prompt(30, seed=1))
    attachment.cache.pool.check()
    for layer, (keys, values) in zip(session.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    close(*feed_and_told(attachment, session, prompt(3, seed=1)))


def test_pages_that_cannot_be_quantized_stay_as_they_are(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, storage = attachment.cache.session("a"), attachment.cache.storage
    quantize, refused = storage.quantize, []

    def refuse(pairs: list[tuple[int, int]]) -> list[bool]:
        found = quantize(pairs)
        if not refused:  # the first page ever, as if it held what float16 does not
            refused.append(pairs[0])
            found[0] = False
        return found

    monkeypatch.setattr(storage, "quantize", refuse)
    feed(attachment, session, prompt(150))
    assert is_cold(attachment, session)[:3] == [False, True, True]
    assert attachment.cache.get_stats()["refused_pages"] == 1
    close(*feed_and_told(attachment, session, prompt(3, seed=1)))


@pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"),
    reason="this transformers has no states that can be taken out",
)
def test_a_state_behind_a_page_stays_behind_its_quantized_copy() -> None:
    model = make_hybrid("lfm2")
    config = KVCacheConfig(
        max_tokens=32 * BLOCK, block_size=BLOCK, use_quantization=True, quantization_bits=8
    )
    cache = KVCache.for_model(model, config)
    with Attachment(model, cache, Route.PAGED, "test").install() as attachment:
        ids = torch.arange(3, 3 + 33)[None]
        kwargs = {"max_new_tokens": 4, "do_sample": False}
        expected = model.generate(ids, **kwargs, use_cache=False)
        assert torch.equal(model.generate(ids, **kwargs), expected)
        for seed in range(4):  # others take the pages of full precision
            model.generate(prompt(60, seed=seed), **kwargs)
        assert attachment.cache.get_stats()["demoted_pages"] > 2
        restored = cache.get_stats()["restored_states"]
        assert torch.equal(model.generate(ids, **kwargs), expected)
        assert cache.get_stats()["restored_states"] == restored + 1


def test_threads_that_move_each_others_pages_read_what_they_wrote() -> None:
    with attached(pages=64, enable_gc=True, gc_threshold=0.5) as attachment:
        cache, errors = attachment.cache, []
        texts = [prompt(100, seed=seed) for seed in range(3)]

        def run(index: int) -> None:
            try:
                for turn in range(3):
                    session = cache.session(f"{index}/{turn}")
                    feed(attachment, session, texts[index][:, :90])
                    for at in range(90, 100):
                        feed(attachment, session, texts[index][:, at : at + 1])
                    own = DynamicCache()
                    with torch.no_grad():
                        attachment.model(texts[index], **over(own))
                    # The first layer's K depends on no other page.
                    error = (session.layers[0].keys - own.layers[0].keys).abs().max()
                    if error > 0.05:
                        errors.append(f"text {index}, turn {turn}: {error}")
                    cache.drop_session(f"{index}/{turn}")
            except CapacityError:
                pass  # the others hold all that there is
            except Exception as error:  # noqa: BLE001  # whatever it was, the test is to say so
                errors.append(repr(error))

        threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert cache.get_stats()["demoted_pages"] > 0
        cache.pool.check()
