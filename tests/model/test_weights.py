"""K and V of other weights, adapters, hooks or precision are never found, whoever changed them and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from families import make_model, prompt
from transformers.cache_utils import DynamicCache

from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over
from kvhybrid.model.weights import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

IDS = prompt(50)


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=2048, block_size=16))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def ours(attachment: Attachment) -> torch.Tensor:
    return attachment.model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False
    )


def own(attachment: Attachment) -> torch.Tensor:
    past = DynamicCache(config=attachment.model.config)
    return attachment.model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False, **over(past)
    )


def cached_by(attachment: Attachment, call: Callable[[], torch.Tensor]) -> int:
    before = attachment.cache.get_stats()["cached_tokens"]
    assert torch.equal(call(), own(attachment))
    return int(attachment.cache.get_stats()["cached_tokens"] - before)


def optimizer_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def other_state(model: PreTrainedModel) -> None:
    model.load_state_dict(make_model("llama", seed=3).state_dict())


def write_through_data(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)


def other_parameter(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn
    layer.v_proj.weight = torch.nn.Parameter(layer.v_proj.weight.detach() * 0.5)


def other_storage(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj.weight.data = layer.up_proj.weight.data.flip(0).clone()


CHANGES = [optimizer_step, fused_step, other_state, write_through_data, other_parameter, other_storage]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_text_after_the_weights_changed_is_that_of_the_new_weights(
    attachment: Attachment, change: Callable[[PreTrainedModel], None]
) -> None:
    assert cached_by(attachment, lambda: ours(attachment)) == 0
    assert cached_by(attachment, lambda: ours(attachment)) == 49
    change(attachment.model)
    assert cached_by(attachment, lambda: ours(attachment)) == 0
    assert cached_by(attachment, lambda: ours(attachment)) == 49


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_session_computes_its_text_again_with_the_new_weights(
    attachment: Attachment, change: Callable[[PreTrainedModel], None]
) -> None:
    session = attachment.cache.session("alice")
    model = attachment.model
    with torch.no_grad():
        model(IDS, **over(session))
    change(model)
    with torch.no_grad():
        found = model(IDS[:, :5], **over(session)).logits
        past = DynamicCache(config=model.config)
        model(IDS, **over(past))
        expected = model(IDS[:, :5], **over(past)).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    session.close()


def test_pages_of_older_weights_are_given_back(attachment: Attachment) -> None:
    ours(attachment)
    assert attachment.cache.pool.num_evictable == 4
    other_state(attachment.model)
    ours(attachment)
    assert attachment.cache.pool.num_evictable == 4
    assert attachment.cache.get_stats()["evicted_pages"] >= 4


def test_a_change_that_nothing_shows_can_be_told(attachment: Attachment) -> None:
    ours(attachment)
    attachment.model.model.embed_tokens.weight.data[int(IDS[0, 0])] += 0.01  # one row: no sample lies there
    attachment.weights_changed()
    assert cached_by(attachment, lambda: ours(attachment)) == 0


def test_a_hook_keeps_its_own_pages_and_removing_it_gives_the_old_ones_back(attachment: Attachment) -> None:
    ours(attachment)
    handle = attachment.model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)
    assert cached_by(attachment, lambda: ours(attachment)) == 0
    assert cached_by(attachment, lambda: ours(attachment)) == 49
    handle.remove()
    assert cached_by(attachment, lambda: ours(attachment)) == 49


def test_autocast_keeps_its_own_pages(attachment: Attachment) -> None:
    ours(attachment)
    with torch.autocast("cpu", torch.bfloat16):
        before = attachment.cache.get_stats()["cached_tokens"]
        ours(attachment)
        assert attachment.cache.get_stats()["cached_tokens"] == before
    assert cached_by(attachment, lambda: ours(attachment)) == 49


def test_moving_the_same_weights_elsewhere_costs_speed_alone(attachment: Attachment) -> None:
    ours(attachment)
    attachment.model.to(torch.float64).to(torch.float32)
    assert cached_by(attachment, lambda: ours(attachment)) in {0, 49}


def test_the_fingerprint_follows_every_byte_and_no_address() -> None:
    one, other = make_model("llama"), make_model("llama")
    first, second = ModelState(one), ModelState(other)
    assert first.fingerprint() == second.fingerprint() == ModelState(one.float()).fingerprint()
    other.model.embed_tokens.weight.data[7, 3] += 1
    second.weights_changed()
    assert first.fingerprint() != second.fingerprint()


def test_weights_loaded_under_inference_mode_are_watched_by_samples() -> None:
    with torch.inference_mode():
        model = make_model("llama")
        state = ModelState(model)
        before = state.look()
        assert state.look() == before
        model.lm_head.weight.mul_(2)
        assert state.look() != before
