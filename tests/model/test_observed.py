"""Queries of the last tokens: seen as they were, through every change of the text, and scored by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvhybrid import InvalidRequestError, KVCacheConfig, UnsupportedError
from kvhybrid.cache.compress.scorers import SCORERS
from kvhybrid.cache.compress.selection import RECENT, choose, gather, kept_tokens
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from kvhybrid.model.transformers_cache import PagedSession

LENGTH = 120
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def attached(scorer: str, route: Route = Route.PAGED, **fields: Any) -> Attachment:
    model = make_model("llama")
    config = KVCacheConfig(max_tokens=2048, block_size=16, compression_scorer=scorer, **fields)
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


@torch.no_grad()
def feed(attachment: Attachment, past: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return attachment.model(ids, **over(past), use_cache=True, **more).logits


@torch.no_grad()
def queries_of(ids: torch.Tensor, layer: int) -> torch.Tensor:
    """A text's queries, rotated, from the model's own parts: ``[rows, heads, tokens, head_dim]``."""
    model = make_model("llama")
    found: list[torch.Tensor] = []
    attention = model.model.layers[layer].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(
            _rotated(module, kwargs["hidden_states"], *kwargs["position_embeddings"])
        ),
        with_kwargs=True,
    )
    model(ids, use_cache=False)
    hook.remove()
    return found[0]


def _rotated(
    attention: torch.nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    query = attention.q_proj(hidden).view(*hidden.shape[:2], -1, 8).transpose(1, 2)
    rotated: torch.Tensor = apply_rotary_pos_emb(query, query, cos, sin)[0]
    return rotated


def seen(session: PagedSession, layer: int, row: int = 0) -> torch.Tensor:
    assert session.rows.observed is not None
    queries = session.rows.observed.queries(layer, row, 10**6)
    assert queries is not None
    assert queries.scale == pytest.approx(8**-0.5)
    return queries.states


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("widths", [(LENGTH,), (100, 20), (80, 1, 1, 38), (10, 5, *[1] * 40)])
def test_queries_of_the_last_tokens_are_seen_however_they_were_fed(widths: tuple[int, ...]) -> None:
    ids = prompt(sum(widths))
    with attached("snapkv") as attachment:
        session, done = attachment.cache.session("a"), 0
        for width in widths:
            feed(attachment, session, ids[:, done : done + width])
            done += width
        for layer in range(3):
            close(seen(session, layer)[:, :, -RECENT:], queries_of(ids, layer)[:, :, -RECENT:])
            assert seen(session, layer).shape[2] == RECENT


def test_cutting_the_text_cuts_what_was_seen() -> None:
    ids = prompt(LENGTH)
    with attached("snapkv") as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, ids[:, :100])
        feed(attachment, session, ids[:, 100:110])
        session.truncate(104)
        close(seen(session, 1), queries_of(ids[:, :104], 1)[:, :, -RECENT:])
        session.truncate(90)
        close(seen(session, 1), queries_of(ids[:, :90], 1)[:, :, -22:])
        feed(attachment, session, ids[:, 90:97])
        close(seen(session, 1), queries_of(ids[:, :97], 1)[:, :, -29:])
        session.truncate(5)
        with pytest.raises(InvalidRequestError, match="none were seen in layer 0: run it through"):
            feed(attachment, session, ids[:, 5:60])
            session.rows.observed.forget()
            session.compress(0.5)


def test_a_pass_that_failed_was_not_seen() -> None:
    ids = prompt(LENGTH)
    with attached("snapkv") as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, ids)
        before = seen(session, 1)
        lm_head = attachment.model.lm_head
        hook = lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(attachment, session, prompt(3, seed=1))
        hook.remove()
        assert torch.equal(seen(session, 1), before)


def test_rows_are_seen_in_their_order_and_forks_remember() -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    with attached("snapkv") as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, ids)
        expected = queries_of(ids, 1)[:, :, -RECENT:]
        close(seen(session, 1, 1), expected[1:])
        session.reorder_cache(torch.tensor([1, 0, 0]))
        for row, was in enumerate((1, 0, 0)):
            close(seen(session, 1, row), expected[was : was + 1])
        fork = session.fork()[0]
        feed(attachment, session, prompt(1).repeat(3, 1))
        close(seen(fork, 1, 0), expected[1:])


@pytest.mark.parametrize("scorer", ["snapkv", "tova"])
def test_a_text_is_scored_by_what_its_last_tokens_asked_for(scorer: str) -> None:
    ids = prompt(LENGTH)
    with attached(scorer) as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, ids)
        whole = [(layer.keys, layer.values) for layer in session.layers]
        queries = [session.rows.observed.queries(layer, 0, 10**6) for layer in range(3)]
        session.compress(0.4)
        score, count = SCORERS[CompressionScorer(scorer)], kept_tokens(LENGTH, 0.4)
        for layer, (keys, values) in enumerate(whole):
            places = choose(score(keys, values, queries[layer]), count)
            assert torch.equal(session.layers[layer].keys, gather(keys, places))
            assert torch.equal(session.layers[layer].values, gather(values, places))


@pytest.mark.parametrize("scorer", ["snapkv", "tova"])
def test_turns_of_padded_batches_are_compressed_by_queries(scorer: str) -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    with attached(scorer, use_compression=True, compression_ratio=0.4) as attachment:
        session = attachment.cache.session("a")
        text = attachment.model.generate(ids, attention_mask=mask, **over(session), **GREEDY)
        assert session.rows.gap > 0
        seen_mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
        both = attachment.model.generate(text, attention_mask=seen_mask, **over(session), **GREEDY)
        alone = attachment.cache.session("alone")
        attachment.model.generate(ids[:1, 50:], **over(alone), **GREEDY)
        assert torch.equal(both[:1, 50:], attachment.model.generate(text[:1, 50:], **over(alone), **GREEDY))


def test_the_last_queries_are_seen_whatever_others_had_cached() -> None:
    with attached("snapkv", use_compression=True, compression_ratio=0.4) as attachment:
        kept = []
        for name in ("first", "second"):
            session = attachment.cache.session(name)
            attachment.model.generate(prompt(LENGTH), **over(session), **GREEDY)
            kept.append([layer.keys for layer in session.layers])
        assert session.cached_tokens == [LENGTH - RECENT]
        for first, second in zip(*kept, strict=True):
            close(first, second)
        short = attachment.cache.session("short")
        attachment.model.generate(prompt(20), **over(short), **GREEDY)
        assert short.cached_tokens == [0]


def test_queries_are_kept_for_those_who_asked_alone() -> None:
    with attached("keydiff") as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, prompt(LENGTH))
        with pytest.raises(InvalidRequestError, match="set compression_scorer='snapkv' in the configuration"):
            session.compress(0.5, scorer="snapkv")
        assert session.rows.gap == 0
    with attached("snapkv", Route.MATERIALISED) as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, prompt(LENGTH))
        with pytest.raises(
            UnsupportedError, match="materialised route does not see: use one of keydiff, knorm"
        ):
            session.compress(0.5)
        assert session.compress(0.5, scorer="knorm") > 0
    with pytest.raises(UnsupportedError, match="compression_scorer='tova'"):
        attached("tova", Route.MATERIALISED, use_compression=True, compression_ratio=0.5)
