"""What transformers asks of its own caches, asked of ours.

``docs/transformers-cache-tests.md`` lists its cases (tests/utils/test_cache_utils.py and the cache tests of
tests/generation/test_utils.py), where each is answered, and which do not apply to a cache that a user
supplies, and why. Here are those that no other file answers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import SIZES, VOCAB, make_model, prompt
from transformers import DynamicCache, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers-cache-tests.md"
CONFIG = {"max_tokens": 2048, "block_size": 16}
PROMPT = prompt(37)
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def own() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(params=list(Route))
def attached(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def filled(model: PreTrainedModel, past: Cache, ids: torch.Tensor) -> Cache:
    with torch.no_grad():
        model(ids, **over(past), use_cache=True)
    return past


def beside(attached: Attachment, own: PreTrainedModel, ids: torch.Tensor) -> tuple[Cache, DynamicCache]:
    """A session of ours and a cache of transformers' that hold the same text."""
    session = filled(attached.model, attached.cache.session("beside"), ids)
    return session, filled(own, DynamicCache(config=own.config), ids)


def equal(session: Cache, past: DynamicCache) -> bool:
    return session.get_seq_length() == past.get_seq_length() and all(
        torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        and torch.allclose(ours.values, theirs.values, atol=1e-5)
        for ours, theirs in zip(session.layers, past.layers, strict=True)
    )


def continued(model: PreTrainedModel, past: Cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **over(past), use_cache=True).logits


def test_every_layer_keeps_what_it_was_given_and_appends(attached: Attachment, own: PreTrainedModel) -> None:
    session, past = beside(attached, own, PROMPT)
    assert isinstance(session, Cache)
    assert len(session) == len(past) == 3
    before = [layer.keys for layer in session.layers]
    for width in (1, 1, 5):
        ids = prompt(width, seed=width)
        assert torch.allclose(continued(attached.model, session, ids), continued(own, past, ids), atol=1e-4)
    assert equal(session, past)
    for layer, held in zip(session.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :37], held)
    assert not torch.equal(session.layers[0].keys, session.layers[1].keys)


@pytest.mark.parametrize("heads", [6, 2, 1], ids=["one each", "grouped", "one for all"])
def test_shapes_of_every_kind_of_heads(heads: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": heads})).eval()
    for route in Route:
        cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
        with Attachment(model, cache, route, "test").install():
            session = filled(model, cache.session("heads"), PROMPT.repeat(2, 1))
            assert session.layers[2].keys.shape == session.layers[2].values.shape == (2, heads, 37, 8)
            assert (session.batch_size, session.get_seq_length(), session.get_max_length()) == (2, 37, -1)
            assert not session.is_compileable
            assert session.is_croppable


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [1, 1, 0], [1]])
def test_rows_change_places_as_in_their_own_caches(
    attached: Attachment, own: PreTrainedModel, order: list[int]
) -> None:
    session, past = beside(attached, own, torch.cat([PROMPT, prompt(37, seed=3)]))
    session.reorder_cache(torch.tensor(order))
    past.reorder_cache(torch.tensor(order))
    assert equal(session, past)
    ids = torch.cat([prompt(4, seed=5 + row) for row in range(len(order))])
    assert torch.allclose(continued(attached.model, session, ids), continued(own, past, ids), atol=1e-4)
    assert equal(session, past)


def test_rows_are_repeated_and_chosen_as_in_their_own_caches(
    attached: Attachment, own: PreTrainedModel
) -> None:
    session, past = beside(attached, own, torch.cat([PROMPT, prompt(37, seed=3)]))
    for cache in (session, past):
        cache.batch_repeat_interleave(3)
    assert equal(session, past)
    ids = torch.cat([prompt(2, seed=5 + row) for row in range(6)])
    assert torch.allclose(continued(attached.model, session, ids), continued(own, past, ids), atol=1e-4)
    for cache in (session, past):
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
    assert equal(session, past)
    session.batch_select_indices(torch.tensor([True, False, True]))
    past.batch_select_indices(torch.tensor([0, 2]))
    assert equal(session, past)


@pytest.mark.parametrize("removed", [1, 5, 20, 37])
def test_what_is_cropped_is_gone_and_the_rest_goes_on(
    attached: Attachment, own: PreTrainedModel, removed: int
) -> None:
    session = filled(attached.model, attached.cache.session("cropped"), PROMPT)
    session.crop(-removed)
    kept = PROMPT[:, : 37 - removed]
    assert session.get_seq_length() == 37 - removed
    ids = prompt(6, seed=8)
    found = continued(attached.model, session, ids)
    with torch.no_grad():
        expected = own(torch.cat([kept, ids], dim=1)).logits[:, 37 - removed :]
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_cache_that_was_reset_begins_again(attached: Attachment, own: PreTrainedModel) -> None:
    session, _ = beside(attached, own, PROMPT)
    assert session.is_initialized
    session.reset()
    assert session.get_seq_length() == 0
    assert not session.is_initialized
    other = prompt(20, seed=6)
    assert torch.allclose(continued(attached.model, session, other), own(other).logits, atol=1e-4)


def test_the_recipe_of_a_prompt_copied_for_every_question(attached: Attachment, own: PreTrainedModel) -> None:
    prefilled = filled(attached.model, attached.cache.session("system"), PROMPT)
    pages = attached.cache.pool.num_free
    copies = [copy.deepcopy(prefilled) for _ in range(3)]
    assert attached.cache.pool.num_free == pages  # nothing is copied before something differs
    for seed, past in enumerate(copies, start=1):
        question = torch.cat([PROMPT, prompt(5 + seed, seed=seed)], dim=1)
        found = attached.model.generate(question, **over(past), **GREEDY)
        assert torch.equal(found, own.generate(question, **GREEDY))
        assert past.cached_tokens[0] >= 32  # its full blocks; a block begun belongs to who began it
    assert prefilled.get_seq_length() == 37
    for past in copies:
        past.close()


def test_a_batch_with_left_padding_under_both_attentions() -> None:
    ids = torch.cat([prompt(20, seed=1), prompt(20, seed=2)])
    mask = torch.ones_like(ids)
    ids[0, :8], mask[0, :8] = 0, 0
    for implementation in ("eager", "sdpa"):
        model = make_model("llama")
        model.set_attn_implementation(implementation)
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
            for _ in range(2):
                output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
                assert torch.equal(output.sequences, expected)
                assert isinstance(output[CACHE], Cache)
            assert attachment.cache.get_stats()["cached_tokens"] > 0


def test_more_left_padding_changes_nothing(attached: Attachment, own: PreTrainedModel) -> None:
    expected = own.generate(PROMPT, **GREEDY)[:, 37:]
    for pad in (0, 1, 27, 64):
        ids = torch.cat([torch.zeros((1, pad), dtype=torch.long), PROMPT], dim=1)
        mask = (torch.arange(37 + pad) >= pad).long()[None]
        found = attached.model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(found[:, 37 + pad :], expected)
    assert attached.cache.get_stats()["cached_tokens"] >= 3 * 36


def test_beams_reorder_rows_and_all_are_returned(attached: Attachment, own: PreTrainedModel) -> None:
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, **GREEDY}
    expected = own.generate(PROMPT, **options)
    found = attached.model.generate(PROMPT, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    assert any(len(set(row.tolist())) > 1 for row in expected.beam_indices)
    found[CACHE].close()


def test_a_long_sampled_text_has_its_scores(attached: Attachment, own: PreTrainedModel) -> None:
    def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        output = model.generate(
            PROMPT, do_sample=True, max_new_tokens=90, return_dict_in_generate=True, output_scores=True
        )
        chosen = output.sequences[0, 37:]
        return output.sequences, torch.stack(output.scores)[:, 0].gather(1, chosen[:, None]).sum()

    expected, total = run(own)
    for _ in range(2):
        found, score = run(attached.model)
        assert torch.equal(found, expected)
        assert torch.allclose(score, total, atol=1e-3)


@pytest.mark.parametrize("through_session", [False, True])
def test_a_text_generated_in_two_calls_is_the_text_of_one(
    attached: Attachment, own: PreTrainedModel, through_session: bool
) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    expected = own.generate(PROMPT, max_new_tokens=8, **options)
    session = over(attached.cache.session("two")) if through_session else {}
    first = attached.model.generate(PROMPT, max_new_tokens=5, **session, **options)
    second = attached.model.generate(first.sequences, **over(first[CACHE]), max_new_tokens=3, **options)
    assert torch.equal(second.sequences, expected.sequences)
    scores = torch.stack([*first.scores, *second.scores])
    assert torch.allclose(scores, torch.stack(expected.scores), atol=1e-4)
    assert equal(second[CACHE], expected[CACHE])
    second[CACHE].close()


def test_positions_given_or_left_out_are_the_same(attached: Attachment, own: PreTrainedModel) -> None:
    ids = torch.cat([prompt(20, seed=1), prompt(20, seed=2)])
    mask = torch.ones_like(ids)
    ids[0, :8], mask[0, :8] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = own(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        for given in ({"position_ids": positions}, {}):
            session = attached.cache.session(f"given {len(given)}")
            found = attached.model(ids, attention_mask=mask, **over(session), **given).logits
            assert torch.allclose(found[mask.bool()], expected, atol=1e-4)


def test_a_cache_and_the_name_of_another_are_one_too_many(attached: Attachment) -> None:
    session = attached.cache.session("both")
    with pytest.raises(UnsupportedError, match="cache_implementation"):
        attached.model.generate(PROMPT, **over(session), cache_implementation="static", **GREEDY)


def test_one_token_beyond_the_room_is_an_error_and_what_was_held_stays(own: PreTrainedModel) -> None:
    for route in Route:
        model = make_model("llama")
        cache = KVCache.for_model(model, KVCacheConfig(max_tokens=32, block_size=16))
        with Attachment(model, cache, route, "test").install():
            session = filled(model, cache.session("full"), PROMPT[:, :32])
            with pytest.raises(CapacityError):
                continued(model, session, PROMPT[:, 32:33])
            assert session.get_seq_length() == 32
            past = filled(own, DynamicCache(config=own.config), PROMPT[:, :32])
            assert equal(session, past)
            session.reset()
            ids = prompt(30, seed=4)
            assert torch.allclose(continued(model, session, ids), own(ids).logits, atol=1e-4)


def test_keys_turned_in_pairs_go_through(own: PreTrainedModel) -> None:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6, rotary_dim=4, n_positions=128, bos_token_id=1
    )
    model = GPTJForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    expected = model.generate(PROMPT, **GREEDY)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        for _ in range(2):
            assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert attachment.cache.get_stats()["cached_tokens"] == 36


def test_the_document_names_tests_that_exist() -> None:
    named = [word.strip("`,.;") for word in DOCUMENT.read_text(encoding="utf-8").split() if "::" in word]
    assert len(named) > 15
    for name in named:
        path, _, test = name.partition("::")
        source = (Path(__file__).parent / path).read_text(encoding="utf-8")
        assert f"def {test}(" in source, name
