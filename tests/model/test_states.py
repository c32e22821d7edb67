"""Models with layers that keep a state, through the cache: greedy text equals the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from families import prompt
from hybrids import known, make_hybrid
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, InvalidRequestError, LayoutError, UnsupportedError
from kvhybrid.layout import KVLayout, LayerShape
from kvhybrid.model import session_states
from kvhybrid.model.attach import Attachment
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

if not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
    pytest.skip("this transformers has no states that can be taken out", allow_module_level=True)

NEW = 9
BLOCK = 16
# Its layers forget their state when several tokens follow it, with a DynamicCache as well.
FORGETFUL = {"jamba"}
SERVED = [family for family in known() if family not in FORGETFUL]


@pytest.fixture(scope="module", params=["lfm2", "qwen3-next", "zamba2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_hybrid(request.param)


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest, model: PreTrainedModel) -> Iterator[Attachment]:
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=2048, block_size=BLOCK))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def text(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor:
    """What is written with the cache (or with the one given)."""
    mask = mask if mask is not None else torch.ones_like(ids)
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


def own(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor:
    """What the model writes through a DynamicCache."""
    return text(model, ids, mask, **over(DynamicCache(config=model.config)), **kwargs)


def stat(attachment: Attachment, name: str) -> int:
    return int(attachment.cache.get_stats()[name])


@pytest.mark.parametrize("family", SERVED)
def test_every_family_is_probed_and_its_texts_equal_the_models_own(family: str) -> None:
    model = make_hybrid(family)
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=BLOCK)) as attachment:
        assert attachment.route is Route.PAGED
        assert "is kept at the ends of blocks" in attachment.reason
        for rest in (5, 5, 12, 30):
            ids = torch.cat([prompt(37), prompt(rest, seed=rest)], dim=1)
            assert torch.equal(text(model, ids), own(model, ids))
        assert stat(attachment, "restored_states") == 3


@pytest.mark.parametrize("family", sorted(FORGETFUL))
def test_layers_that_forget_their_state_are_refused_by_name(family: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"layers 0, 2, 3 \(linear_attention\) keep .*several tokens behind it"
    ):
        kvhybrid.attach(make_hybrid(family), config=KVCacheConfig(max_tokens=512, block_size=BLOCK))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 61])
def test_a_prompt_of_any_length_cold_and_again(attachment: Attachment, length: int) -> None:
    ids = prompt(length)
    expected = own(attachment.model, ids)
    for _ in range(3):
        assert torch.equal(text(attachment.model, ids), expected)
    assert stat(attachment, "restored_states") == (2 if length > BLOCK else 0)


def test_where_two_texts_parted_a_third_goes_on(attachment: Attachment) -> None:
    opening = prompt(40)
    held = []
    for seed in range(3):
        session = attachment.cache.session(str(seed))
        ids = torch.cat([opening, prompt(45, seed=seed)], dim=1)
        assert torch.equal(text(attachment.model, ids, **over(session)), own(attachment.model, ids))
        held += session.cached_tokens
    # The first saw no reason to keep a state at 32, the second could not use what was not there.
    assert held == [0, 0, 32]
    assert stat(attachment, "cached_tokens") == 32


def test_long_prompts_keep_states_on_the_way(attachment: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_states, "STRIDE", 32)
    ids = prompt(120)
    text(attachment.model, ids)
    for shared, held in ((100, 96), (70, 64), (31, 0)):
        session = attachment.cache.session(str(shared))
        parted = torch.cat([ids[:, :shared], prompt(9, seed=shared)], dim=1)
        expected = own(attachment.model, parted)
        assert torch.equal(text(attachment.model, parted, **over(session)), expected)
        assert session.cached_tokens == [held]


def test_a_session_continues_turn_by_turn(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    ids = prompt(21)
    for turn in range(4):
        expected = own(attachment.model, ids, max_new_tokens=20)
        assert torch.equal(text(attachment.model, ids, **over(session), max_new_tokens=20), expected)
        if turn:
            assert session.cached_tokens[0] >= ids.shape[1] - 5 - turn - BLOCK
        ids = torch.cat([expected, prompt(5 + turn, seed=turn)], dim=1)


def test_new_tokens_alone_continue_a_session(attachment: Attachment) -> None:
    session = attachment.cache.session("talk")
    first = text(attachment.model, prompt(20), **over(session))
    whole = torch.cat([first, prompt(6, seed=3)], dim=1)
    fed = whole[:, session.get_seq_length() :]
    found = text(attachment.model, fed, torch.ones_like(whole), **over(session))
    assert torch.equal(found[:, fed.shape[1] :], own(attachment.model, whole)[:, whole.shape[1] :])


@pytest.mark.parametrize("pads", [(0, 5), (3, 0), (17, 1), (16, 0), (30, 0)])
def test_left_padded_batches_equal_the_models_own(attachment: Attachment, pads: tuple[int, int]) -> None:
    ids = torch.cat([prompt(50, seed=7), prompt(50, seed=8)])
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    expected = own(attachment.model, ids, mask)
    for _ in range(2):
        assert torch.equal(text(attachment.model, ids, mask), expected)
    # Blocks of both rows end at the same columns only where the padding differs by whole blocks.
    assert (stat(attachment, "restored_states") > 0) == ((pads[0] - pads[1]) % BLOCK == 0)
    for row, pad in enumerate(pads):  # and what was kept of a padded row serves the text alone
        alone = ids[row : row + 1, pad:]
        assert torch.equal(text(attachment.model, alone), own(attachment.model, alone))


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_equals_the_models_own(attachment: Attachment, kwargs: dict[str, int]) -> None:
    ids = prompt(23)
    text(attachment.model, ids)
    found = text(attachment.model, ids, max_new_tokens=20, **kwargs)
    assert torch.equal(found, own(attachment.model, ids, max_new_tokens=20, **kwargs))


def test_chunked_prefill_equals_the_models_own(attachment: Attachment) -> None:
    ids = prompt(45)
    text(attachment.model, ids[:, :20])
    assert torch.equal(text(attachment.model, ids, prefill_chunk_size=8), own(attachment.model, ids))


def test_prompt_lookup_equals_the_models_own_where_the_model_can(attachment: Attachment) -> None:
    ids = prompt(12).repeat(1, 3)
    text(attachment.model, ids)
    if attachment.model._is_stateful:
        with pytest.raises(ValueError, match="stateful"):
            text(attachment.model, ids, prompt_lookup_num_tokens=4)
        return
    for new in (9, 30):
        found = text(attachment.model, ids, prompt_lookup_num_tokens=4, max_new_tokens=new)
        assert torch.equal(found, own(attachment.model, ids, max_new_tokens=new))


def test_forward_loops_over_a_session_give_the_models_own_logits(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("loop")
    ids = prompt(60)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found, done = [], 0
        for width in (17, 1, 1, 9, 2, 30):
            fed = ids[:, done : done + width]
            found.append(model(input_ids=fed, **over(session), use_cache=True).logits)
            done += width
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-3, rtol=1e-3)
    session.close()


def test_cropping_goes_back_to_what_the_text_was(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("crop")
    ids, other = prompt(60), prompt(5, seed=4)
    with torch.no_grad():
        model(input_ids=ids, **over(session), use_cache=True)
        for keep in (40, 33, 32, 5):
            session.crop(keep - session.get_seq_length())
            assert session.get_seq_length() == keep
            found = model(input_ids=other, **over(session), use_cache=True).logits
            whole = torch.cat([ids[:, :keep], other], dim=1)
            expected = model(input_ids=whole).logits[:, keep:]
            assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
            session.crop(-5)
    session.close()


def test_layers_of_an_open_session_can_be_looked_at(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("look")
    past, ids = DynamicCache(config=model.config), prompt(37)
    with torch.no_grad():
        model(input_ids=ids, **over(session), use_cache=True)
        model(input_ids=ids, **over(past), use_cache=True)
    for index, layer in enumerate(past.layers):
        if not hasattr(layer, "conv_states"):
            assert torch.allclose(session.layers[index].keys, layer.keys, atol=1e-4)
            continue
        for part, expected in zip(
            session.layers[index].conv_states.values(), layer.conv_states.values(), strict=True
        ):
            assert torch.allclose(part, expected, atol=1e-4)
    session.rows.release()
    attended = [index for index, layer in enumerate(past.layers) if not hasattr(layer, "conv_states")]
    for index in attended:
        with pytest.raises(InvalidRequestError, match="states of session 'look' were evicted"):
            _ = session.layers[index].keys
    session.close()


def test_forks_go_their_own_ways(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("trunk")
    ids = prompt(37)
    with torch.no_grad():
        model(input_ids=ids, **over(session), use_cache=True)
        branches = [session, *session.fork(2)]
        for seed, branch in enumerate(branches):
            new = prompt(4, seed=seed)
            found = model(input_ids=new, **over(branch), use_cache=True).logits
            expected = model(input_ids=torch.cat([ids, new], dim=1)).logits[:, 37:]
            assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    for branch in branches:
        branch.close()


def test_an_exported_session_is_computed_again_where_it_is_imported(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("from")
    ids = text(model, prompt(40), **over(session))
    data = session.export()
    attachment.cache.clear()
    other = attachment.cache.session("to")
    other.import_(data)
    whole = torch.cat([ids, prompt(3, seed=2)], dim=1)
    fed = whole[:, other.get_seq_length() :]
    found = text(model, fed, torch.ones_like(whole), **over(other))
    assert torch.equal(found[:, fed.shape[1] :], own(model, whole)[:, whole.shape[1] :])


def test_a_pass_that_fails_leaves_the_session_as_it_was(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States have gone on in the layers before the one that fails."""
    model, session = attachment.model, attachment.cache.session("failing")
    ids, new = prompt(40), prompt(20, seed=5)
    with torch.no_grad():
        model(input_ids=ids, **over(session), use_cache=True)
        last = model.get_output_embeddings()
        plain = last.forward

        def fail(*args: object, **kwargs: object) -> torch.Tensor:
            raise RuntimeError("out of luck")

        for width in (1, 20):
            monkeypatch.setattr(last, "forward", fail)
            with pytest.raises(RuntimeError, match="luck"):
                model(input_ids=new[:, :width], **over(session), use_cache=True)
            monkeypatch.setattr(last, "forward", plain)
            assert session.get_seq_length() == 40
        found = model(input_ids=new, **over(session), use_cache=True).logits
        expected = model(input_ids=torch.cat([ids, new], dim=1)).logits[:, 40:]
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    session.close()


def test_a_pass_that_leaves_a_layer_out_is_refused(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, session = attachment.model, attachment.cache.session("partial")
    kept = session.rows.states.live.left_out()
    inside = model.model
    forward = type(inside.layers[kept[0]]).forward
    skipped = inside.layers[kept[0]]

    def skip(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        return forward(skipped, hidden, *args, **{**kwargs, **over(None)})

    monkeypatch.setattr(skipped, "forward", skip)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=rf"left out .*\[{kept[0]}"):
        model(input_ids=prompt(20), **over(session), use_cache=True)
    assert stat(attachment, "states") == 0


def test_evicted_pages_and_states_are_computed_again(attachment: Attachment) -> None:
    model, session = attachment.model, attachment.cache.session("loop")
    ids = text(model, prompt(41), **over(session))
    assert attachment.cache.clear() > 0
    with torch.no_grad():
        found = model(input_ids=ids[:, -1:], **over(session), use_cache=True).logits
        expected = model(input_ids=ids).logits[:, -1:]
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    session.close()


def test_a_prompt_longer_than_the_budget_is_refused_and_nothing_stays(attachment: Attachment) -> None:
    with pytest.raises(CapacityError, match=r"\d+ pages"):
        text(attachment.model, prompt(300).repeat(1, 8))
    short = prompt(40)
    assert torch.equal(text(attachment.model, short), own(attachment.model, short))


def test_states_of_one_tenant_never_serve_another(model: PreTrainedModel) -> None:
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=512, block_size=BLOCK))
    with Attachment(model, cache, Route.PAGED, "test").install():
        ids = prompt(50)
        for tenant, held in (("a", 0), ("b", 0), ("a", 48), ("b", 48)):
            session = cache.session("talk", tenant=tenant)
            assert torch.equal(text(model, ids, **over(session)), own(model, ids))
            assert session.cached_tokens == [held]


def test_states_of_changed_weights_are_never_found() -> None:
    model = make_hybrid("lfm2")
    ids = prompt(50)
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=BLOCK)) as attachment:
        text(model, ids)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        assert torch.equal(text(model, ids), own(model, ids))
        assert stat(attachment, "restored_states") == 0


def test_a_reproducible_cache_goes_on_from_its_grid_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_hybrid("qwen3-next")
    monkeypatch.setattr("kvhybrid.model.attach.GRID", 32)
    config = KVCacheConfig(max_tokens=1024, block_size=BLOCK, reproducible=True)
    with kvhybrid.attach(model, config=config) as attachment:
        seen = []
        for session in ("cold", "warm"):
            past = attachment.cache.session(session)
            output = text(model, prompt(90), **over(past), output_logits=True, return_dict_in_generate=True)
            seen.append(torch.stack(output.logits))
            assert past.cached_tokens == [0 if session == "cold" else 64]
        assert torch.equal(*seen)


def test_the_engine_refuses_by_layer(model: PreTrainedModel) -> None:
    layout = KVCache.for_model(model, KVCacheConfig(max_tokens=512, block_size=BLOCK)).layout
    with pytest.raises(UnsupportedError, match=r"layers 0, \d.* keep a recurrent state: an engine"):
        choose_packing(model, layout)


def test_a_cache_laid_out_without_states_is_refused(model: PreTrainedModel) -> None:
    shape = LayerShape(num_kv_heads=2, head_dim=8, value_head_dim=8)
    cache = KVCache(layout=KVLayout.of_layers([shape, None]))
    with pytest.raises(LayoutError, match=r"layers 0, \d.*state_bytes|layers 0, \d.*0 bytes"):
        Attachment(model, cache, Route.PAGED, "test")


def test_a_forward_pass_may_end_where_a_row_is_padding_alone(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_states, "STRIDE", BLOCK)
    ids = torch.cat([prompt(50, seed=7), prompt(50, seed=8)])
    mask = torch.ones_like(ids)
    ids[0, :40], mask[0, :40] = 0, 0
    assert torch.equal(text(attachment.model, ids, mask), own(attachment.model, ids, mask))
