"""Greedy text through the cache equals the model's own, family by family, on both routes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from families import CONFIGS, VOCAB, make_model, prompt
from transformers.cache_utils import DynamicCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, InvalidRequestError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE_NAMES, over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

NEW = 9


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest, model: PreTrainedModel) -> Iterator[Attachment]:
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=2048, block_size=16))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def own_text(
    attachment: Attachment, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor:
    """What the model writes through its own DynamicCache."""
    mask = mask if mask is not None else torch.ones_like(ids)
    past = DynamicCache(config=attachment.model.config)
    return attachment.model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **over(past), **kwargs
    )


def our_text(
    attachment: Attachment, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor:
    mask = mask if mask is not None else torch.ones_like(ids)
    return attachment.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)


def cached(attachment: Attachment) -> int:
    return int(attachment.cache.get_stats()["cached_tokens"])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 61])
def test_cold_text_of_any_length_equals_the_models_own(attachment: Attachment, length: int) -> None:
    ids = prompt(length)
    assert torch.equal(our_text(attachment, ids), own_text(attachment, ids))


@pytest.mark.parametrize("length", [17, 32, 47])
def test_a_prompt_that_is_wholly_cached_gives_the_same_text(attachment: Attachment, length: int) -> None:
    ids = prompt(length)
    expected = own_text(attachment, ids)
    for _ in range(3):
        assert torch.equal(our_text(attachment, ids), expected)
    assert cached(attachment) >= 2 * (length // 16 * 16 - 1)


@pytest.mark.parametrize(("shared", "rest"), [(32, 7), (33, 1), (40, 21), (5, 30)])
def test_prompts_that_share_an_opening_reuse_it(attachment: Attachment, shared: int, rest: int) -> None:
    opening = prompt(shared)
    our_text(attachment, torch.cat([opening, prompt(rest + 16, seed=1)], dim=1))
    ids = torch.cat([opening, prompt(rest, seed=2)], dim=1)
    before = cached(attachment)
    assert torch.equal(our_text(attachment, ids), own_text(attachment, ids))
    assert cached(attachment) - before >= shared


def test_a_session_continues_turn_by_turn(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    text = prompt(21)
    for turn in range(4):
        expected = own_text(attachment, text)
        assert torch.equal(our_text(attachment, text, **over(session)), expected)
        assert session.get_seq_length() == expected.shape[1] - 1
        text = torch.cat([expected, prompt(5 + turn, seed=turn)], dim=1)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_session_is_taken_under_either_name_of_a_cache(attachment: Attachment, name: str) -> None:
    session = attachment.cache.session("named")
    text = our_text(attachment, prompt(21), **{name: session})
    assert session.get_seq_length() == text.shape[1] - 1
    with torch.no_grad():
        attachment.model(text[:, -1:], **{name: session})
    assert session.get_seq_length() == text.shape[1]


def test_new_tokens_alone_continue_a_session_when_the_mask_is_whole(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    first = our_text(attachment, prompt(20), **over(session))
    whole = torch.cat([first, prompt(6, seed=3)], dim=1)
    fed = whole[:, session.get_seq_length() :]
    if transformers.__version__.startswith("4."):  # it slices them by a mask that it takes for the ids
        with pytest.raises(IndexError):
            our_text(attachment, fed, torch.ones_like(whole), **over(session))
        return
    found = our_text(attachment, fed, torch.ones_like(whole), **over(session))
    assert torch.equal(found[:, fed.shape[1] :], own_text(attachment, whole)[:, whole.shape[1] :])


def test_different_text_under_the_same_session_is_answered_for_what_it_is(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    our_text(attachment, prompt(40), **over(session))
    other = prompt(37, seed=5)
    assert torch.equal(our_text(attachment, other, **over(session)), own_text(attachment, other))


def test_a_session_longer_than_the_prompt_is_cut_to_what_they_share(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    ids = prompt(50)
    our_text(attachment, ids, **over(session))
    for length in (50, 33, 32, 7, 1):
        edited = ids[:, :length]
        assert torch.equal(our_text(attachment, edited, **over(session)), own_text(attachment, edited))


@pytest.mark.parametrize("pads", [(0, 5), (3, 0), (17, 1), (30, 0)])
def test_left_padded_batches_equal_the_models_own(attachment: Attachment, pads: tuple[int, int]) -> None:
    ids = torch.cat([prompt(35, seed=7), prompt(35, seed=8)])
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    expected = own_text(attachment, ids, mask)
    for _ in range(2):
        assert torch.equal(our_text(attachment, ids, mask), expected)


def test_rows_of_a_batch_reuse_up_to_where_all_are_cached(attachment: Attachment) -> None:
    ids = torch.cat([prompt(40, seed=7), prompt(40, seed=8)])
    our_text(attachment, ids[:1])
    our_text(attachment, ids[1:, :20])
    before = cached(attachment)
    assert torch.equal(our_text(attachment, ids), own_text(attachment, ids))
    assert cached(attachment) > before


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_equals_the_models_own(attachment: Attachment, kwargs: dict[str, int]) -> None:
    ids = prompt(23)
    our_text(attachment, ids)
    assert torch.equal(our_text(attachment, ids, **kwargs), own_text(attachment, ids, **kwargs))


def test_chunked_prefill_on_a_cached_prefix_equals_the_models_own(attachment: Attachment) -> None:
    ids = prompt(45)
    our_text(attachment, ids[:, :20])
    found = our_text(attachment, ids, prefill_chunk_size=8)
    assert torch.equal(found, own_text(attachment, ids))


def test_prompt_lookup_decoding_equals_the_models_own(attachment: Attachment) -> None:
    ids = prompt(12).repeat(1, 3)
    our_text(attachment, ids)
    # An end token, because transformers 4 compares with it unasked, and writes on past max_new_tokens.
    expected = own_text(attachment, ids, eos_token_id=VOCAB - 1)
    found = our_text(attachment, ids, prompt_lookup_num_tokens=4, eos_token_id=VOCAB - 1)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_forward_loops_over_a_session_give_the_models_own_logits(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("loop")
    past = DynamicCache(config=model.config)
    ids = prompt(60)
    with torch.no_grad():
        done = 0
        for width in (17, 1, 1, 9, 2, 30):
            fed = ids[:, done : done + width]
            found = model(input_ids=fed, **over(session), use_cache=True).logits
            expected = model(input_ids=fed, **over(past), use_cache=True).logits
            assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
            done += width
    layer = past.layers[1]  # with a sliding window it holds the window only, ours holds everything
    held = slice(-layer.keys.shape[2], None)
    assert torch.allclose(session.layers[1].keys[:, :, held], layer.keys, atol=1e-4)
    assert torch.allclose(session.layers[1].values[:, :, held], layer.values, atol=1e-4)
    session.close()


def test_a_forward_pass_after_generate_takes_released_pages_back(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("loop")
    text = our_text(attachment, prompt(41), **over(session))
    if attachment.cache.clear() == 0:
        pytest.fail("nothing was evicted")
    with torch.no_grad():
        found = model(input_ids=text[:, -1:], **over(session), use_cache=True).logits
        expected = model(input_ids=text).logits[:, -1:]
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    session.close()


def test_training_and_uncached_forward_passes_are_untouched(attachment: Attachment) -> None:
    model = attachment.model
    ids = torch.cat([prompt(20), prompt(20, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    found.loss.backward()
    attachment.detach()
    expected = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    assert torch.equal(found.logits[mask.bool()], expected.logits[mask.bool()])
    model.zero_grad()


def test_a_prompt_longer_than_the_budget_runs_on_the_model_alone_and_nothing_stays(
    attachment: Attachment,
) -> None:
    ids = torch.cat([prompt(300, seed=seed) for seed in range(8)])
    with pytest.raises(CapacityError, match=r"\d+ pages"):
        our_text(attachment, ids, **over(attachment.cache.session("too long")))
    attachment.cache.drop_session("too long")
    before = attachment.cache.get_stats()["passed_by_calls"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = our_text(attachment, ids)
    assert attachment.cache.get_stats()["passed_by_calls"] == before + 1
    assert torch.equal(found, own_text(attachment, ids))
    short = prompt(20)
    assert torch.equal(our_text(attachment, short), own_text(attachment, short))


def test_bad_input_is_refused_with_the_numbers(attachment: Attachment) -> None:
    session = attachment.cache.session("bad")
    with pytest.raises(InvalidRequestError, match="empty"):
        attachment.model.generate(torch.zeros((1, 0), dtype=torch.long), **over(session))
    with pytest.raises(InvalidRequestError, match=rf"{VOCAB}.*{VOCAB}"):
        our_text(attachment, torch.tensor([[5, VOCAB, 3]]), **over(session))
    with pytest.raises(InvalidRequestError, match="-4"):
        our_text(attachment, torch.tensor([[5, -4, 3]]), **over(session))
    right = torch.ones((1, 6), dtype=torch.long)
    right[0, 4:] = 0
    with pytest.raises(UnsupportedError, match="left padding"):
        our_text(attachment, prompt(6), right, **over(session))
    with pytest.raises(UnsupportedError, match="hides all"):
        our_text(attachment, prompt(6), torch.zeros_like(right), **over(session))


def test_a_session_is_no_use_to_a_model_it_is_not_attached_to(attachment: Attachment) -> None:
    session = attachment.cache.session("lost")
    other = make_model("llama", seed=3)
    with pytest.raises(UnsupportedError, match="attach"), torch.no_grad():
        other(input_ids=prompt(5), **over(session))


def test_attach_chooses_a_route_by_itself(model: PreTrainedModel) -> None:
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=16)) as attachment:
        assert attachment.route is Route.PAGED
        ids = prompt(19)
        assert torch.equal(our_text(attachment, ids), own_text(attachment, ids))
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
