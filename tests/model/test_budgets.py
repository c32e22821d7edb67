"""Budgets under models: every door refuses what can never fit, loses nothing, and buffers are counted."""

from __future__ import annotations

import gc

import anyio
import numpy as np
import pytest
import torch
from families import make_model, prompt

import kvhybrid
from kvhybrid import CapacityError, KVCacheConfig, KVEngine
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

PAGES, BLOCK = 8, 16


def attached(route: Route, **values: object) -> Attachment:
    model = make_model("llama")
    config = KVCacheConfig(**{"max_tokens": PAGES * BLOCK, "block_size": BLOCK, **values})
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


def text_of(model: object, ids: torch.Tensor, new: int = 8, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.mark.parametrize("route", list(Route))
def test_a_prompt_larger_than_the_budget_passes_by_and_is_refused_in_a_session(route: Route) -> None:
    ids = prompt(40)
    with attached(route) as attachment:
        model, cache = attachment.model, attachment.cache
        expected = text_of(model, ids)
        before = cache.get_stats()
        with pytest.warns(UserWarning, match=f"no pages for all of it: needs .* of {PAGES}"):
            text_of(model, prompt(PAGES * BLOCK + 1, seed=1))
        session = cache.session("a")
        with pytest.raises(CapacityError), torch.no_grad():
            model(prompt(PAGES * BLOCK + 1, seed=2), **over(session))
        with pytest.raises(CapacityError):
            text_of(model, prompt(PAGES * BLOCK + 1, seed=2), **over(session))
        after = cache.get_stats()
        assert after["evicted_pages"] == before["evicted_pages"] == 0
        assert after["sealed_pages"] == before["sealed_pages"]
        assert cache.pool.num_free + cache.pool.num_evictable == PAGES
        cached = after["cached_tokens"]
        assert torch.equal(text_of(model, ids), expected)
        assert cache.get_stats()["cached_tokens"] - cached == 39
        # And the session that was refused takes what fits.
        assert torch.equal(text_of(model, ids, **over(session)), expected)


@pytest.mark.parametrize("route", list(Route))
def test_a_step_too_many_leaves_the_session_where_it_was(route: Route) -> None:
    with attached(route) as attachment, torch.no_grad():
        model, session = attachment.model, attachment.cache.session("a")
        ids, kept = prompt(PAGES * BLOCK), PAGES * BLOCK - 3
        model(ids[:, :kept], **over(session))
        with pytest.raises(CapacityError):
            model(ids[:, :4], **over(session))
        assert session.get_seq_length() == kept
        logits = model(ids[:, kept:], **over(session)).logits
        expected = make_model("llama")(ids).logits[:, kept:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", list(Route))
def test_background_eviction_hears_of_every_route(route: Route) -> None:
    with attached(route, enable_gc=True, gc_threshold=0.5) as attachment:
        cache, model = attachment.cache, attachment.model
        collector = cache._collector
        expected = [text_of(model, prompt(40, seed=seed)) for seed in range(6)]
        # Its thread may be late; whatever it left is done here, by the same rule.
        collector.stop()
        collector._stopped = False
        collector.collect()
        assert cache.pool.num_pages - cache.pool.num_free < collector.high
        assert cache.get_stats()["gc_evicted_pages"] > 0
        plain = make_model("llama")
        for seed, text in enumerate(expected):
            assert torch.equal(text, text_of(plain, prompt(40, seed=seed)))
        cache.pool.check()
        cache.close()


def evictable_when_told(cache: KVCache) -> list[int]:
    """Return a list that grows, whenever a collector would be told, by how many pages may leave then."""
    told: list[int] = []
    cache.storage.settled = lambda: told.append(cache.pool.num_evictable)
    return told


@pytest.mark.parametrize("route", list(Route))
def test_every_route_tells_when_it_has_let_go(route: Route) -> None:
    with attached(route) as attachment, torch.no_grad():
        model, cache = attachment.model, attachment.cache
        told = evictable_when_told(cache)
        text_of(model, prompt(40))
        assert told[0] == 0
        assert told[-1] == cache.pool.num_evictable == 3
        model(prompt(40, seed=1), **over(cache.session("a")))
        assert told[-1] == cache.pool.num_evictable == 3
        cache.drop_session("a")
        assert told[-1] == cache.pool.num_evictable == 6


def test_the_engine_tells_when_a_row_has_left() -> None:
    engine = KVEngine(make_model("llama"), KVCacheConfig(max_tokens=PAGES * BLOCK, block_size=BLOCK))
    told = evictable_when_told(engine.cache)

    async def ask() -> None:
        async with engine:
            await engine.process_request({"token_ids": prompt(40)[0].tolist(), "max_length": 8})
            assert told[0] == 0
            assert told[-1] == engine.cache.pool.num_evictable == 3

    anyio.run(ask)


def tensors_beside(attachment: Attachment) -> dict[int, torch.Tensor]:
    """Every tensor in this process that could be a buffer of this cache, by its memory: no pages, no weights.

    Holding them keeps their memory from being given to others.
    """
    storage = attachment.cache.storage
    known = {t.untyped_storage().data_ptr() for t in (*storage.keys, *storage.values)}
    known |= {p.untyped_storage().data_ptr() for p in attachment.model.parameters()}
    found = {}
    for thing in gc.get_objects():
        if type(thing) is not torch.Tensor or thing.layout != torch.strided or thing.device.type != "cpu":
            continue
        place = thing.untyped_storage().data_ptr()
        if thing.dim() == 4 and thing.numel() and place not in known:
            found[place] = thing
    return found


@pytest.mark.parametrize("route", list(Route))
def test_what_readers_hold_beside_the_pages_is_reported(route: Route) -> None:
    gc.collect()
    with attached(route) as attachment, torch.no_grad():
        model, cache, ids = attachment.model, attachment.cache, prompt(60)
        before = tensors_beside(attachment)
        model(ids[:, :40], **over(cache.session("a")))
        model(ids[:, 40:], **over(cache.session("a")))

        def held() -> int:
            gc.collect()
            found = [tensor for place, tensor in tensors_beside(attachment).items() if place not in before]
            return sum(tensor.untyped_storage().nbytes() for tensor in found)

        alone = held()
        assert cache.get_stats()["buffer_bytes"] == alone > 0
        cache.session("a").batch_repeat_interleave(2)
        assert cache.get_stats()["buffer_bytes"] == held()
        assert route is Route.PAGED or held() == 2 * alone
        assert cache.get_stats()["capacity_bytes"] == cache.storage.nbytes
        if route is Route.MATERIALISED:
            cache.session("a").reset()
            gc.collect()
            assert cache.get_stats()["buffer_bytes"] == 0


def test_the_engine_refuses_at_its_door_what_can_never_fit() -> None:
    model = make_model("llama")
    engine = KVEngine(model, KVCacheConfig(max_tokens=PAGES * BLOCK, block_size=BLOCK))

    async def ask() -> None:
        async with engine:
            fits = {"token_ids": prompt(40)[0].tolist(), "max_length": 8}
            first = await engine.process_request(fits)
            for tokens, new in ((PAGES * BLOCK + 1, 1), (PAGES * BLOCK - 3, 8)):
                with pytest.raises(
                    CapacityError, match=f"exceed the cache's budget of {PAGES * BLOCK} tokens"
                ):
                    await engine.process_request(
                        {"token_ids": prompt(tokens, seed=1)[0].tolist(), "max_length": new}
                    )
            assert engine.get_stats()["evicted_pages"] == 0
            again = await engine.process_request(fits)
            assert again["token_ids"] == first["token_ids"]
            assert again["cached_tokens"] == 39

    anyio.run(ask)


def test_a_cache_may_be_shared_by_a_model_and_by_slices_without_one() -> None:
    with attached(Route.PAGED) as attachment:
        cache, model, ids = attachment.cache, attachment.model, prompt(40)
        layout = cache.layout
        new = torch.randn(1, layout.num_kv_heads, 3 * BLOCK, layout.head_dim)
        expected = text_of(model, ids)
        for layer in range(layout.num_layers):
            cache.process_kv(new, new, layer_idx=layer, session_id="a")
        assert torch.equal(text_of(model, ids), expected)
        for seed in range(1, 4):
            text_of(model, prompt(40, seed=seed))
        for layer in range(layout.num_layers):
            *found, metadata = cache.process_kv(new, new, 0, layer_idx=layer, session_id="a")
            assert metadata["cached"]
            assert torch.equal(found[0], new)
            assert torch.equal(found[1], new)
        with pytest.warns(UserWarning, match="no pages for all of it"):
            text_of(model, prompt(6 * BLOCK, seed=9))
        with pytest.raises(CapacityError):
            text_of(model, prompt(6 * BLOCK, seed=9), **over(cache.session("b")))
        kvhybrid.detach(model)
        assert cache.process_kv(new, new, 0, session_id="a")[2]["cached"]
        assert np.isfinite(cache.get_stats()["hit_rate"])
