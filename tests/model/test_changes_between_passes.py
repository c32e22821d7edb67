"""What changes between two calls over one session: hooks, weights, models, the number of rows."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt
from transformers import GenerationConfig

from kvhybrid import CapacityError, ClosedError, InvalidRequestError, KVCacheConfig, UnsupportedError
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model import attach
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

IDS = prompt(40)
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=list(Route))
def route(request: pytest.FixtureRequest) -> Route:
    found: Route = request.param
    return found


def attached(
    route: Route, model: PreTrainedModel | None = None, cache: KVCache | None = None, **fields: Any
) -> Attachment:
    model = model if model is not None else make_model("llama")
    fields = {"max_tokens": 2048, "block_size": 16, **fields}
    cache = cache if cache is not None else KVCache.for_model(model, KVCacheConfig(**fields))
    return Attachment(model, cache, route, "test").install()


@pytest.fixture
def attachment(route: Route) -> Iterator[Attachment]:
    with attached(route) as attachment:
        yield attachment
    gc.collect()
    pool = attachment.cache.pool
    pool.check()
    assert pool.num_free + pool.num_evictable == pool.num_pages


def add_hook(model: PreTrainedModel) -> Callable[[], None]:
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: out * 3)
    return handle.remove


def replace_weight(model: PreTrainedModel) -> Callable[[], None]:
    layer = model.model.layers[0].self_attn.k_proj
    old = layer.weight
    layer.weight = torch.nn.Parameter(old.detach() * -2)
    return lambda: setattr(layer, "weight", old)


@torch.no_grad()
@pytest.mark.parametrize("change", [add_hook, replace_weight])
def test_what_changes_while_a_session_is_open_is_cached_for_nobody_else(
    attachment: Attachment, change: Callable[[PreTrainedModel], Callable[[], None]]
) -> None:
    model = attachment.model
    expected = model.generate(IDS, use_cache=False, **GREEDY)
    session = attachment.cache.session("open")
    model(IDS[:, :10], **over(session))
    undo = change(model)
    model(IDS[:, 10:], **over(session))
    attachment.cache.drop_session("open")
    undo()
    assert torch.equal(model.generate(IDS, **GREEDY), expected)


def test_weights_that_changed_between_two_attachments_find_nothing_of_the_old_ones(route: Route) -> None:
    with attached(route) as first:
        first.model.generate(IDS, **GREEDY)
    first.model.model.layers[0].self_attn.k_proj.weight.data.mul_(-2)
    expected = first.model.generate(IDS, **GREEDY)
    with attached(route, first.model, first.cache):
        assert torch.equal(first.model.generate(IDS, **GREEDY), expected)


def test_a_session_without_a_name_ends_with_its_model_too(route: Route) -> None:
    with attached(route) as first:
        session = first.model.generate(IDS, return_dict_in_generate=True, **GREEDY)[CACHE]
    with attached(route, make_model("llama", seed=5), first.cache) as second:
        with pytest.raises(ClosedError):
            second.model(IDS, **over(session))
        with pytest.raises(ClosedError):
            second.model.generate(IDS, **over(session), **GREEDY)


@torch.no_grad()
def test_a_fork_goes_on_over_the_pages_that_it_took_over(attachment: Attachment) -> None:
    session = attachment.cache.session("root")
    attachment.model(IDS[:, :37], **over(session))
    fork = session.fork()[0]
    opens = attachment.cache.get_stats()["opens"]
    attachment.model(IDS[:, 37:], **over(fork))
    assert attachment.cache.get_stats()["opens"] == opens
    fork.close()


@torch.no_grad()
@pytest.mark.parametrize("is_refused", [True, False])
def test_rows_repeated_for_a_pass_that_fails_are_one_again(attachment: Attachment, is_refused: bool) -> None:
    model, session = attachment.model, attachment.cache.session("alice")
    model(IDS[:, :20], **over(session))
    twice = IDS[:, 20:25].repeat(2, 1)
    if is_refused:
        with pytest.raises(UnsupportedError, match="hides other tokens"):
            model(twice, attention_mask=torch.zeros(2, 25, dtype=torch.long), **over(session))
    else:
        layer = model.model.layers[1]
        forward, layer.forward = layer.forward, lambda *_, **__: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(twice, **over(session))
        layer.forward = forward
    assert session.num_rows == 1
    found = model(IDS[:, 20:], **over(session)).logits[:, -1]
    expected = model(IDS, use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_repeated_for_several_passes_of_which_one_fails_are_one_again(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "GRID", 32)
    with attached(route, max_tokens=192, reproducible=True) as attachment:
        session = attachment.cache.session("alice")
        ids = prompt(300)
        attachment.model(ids[:, :10], **over(session))
        with pytest.raises(CapacityError):
            attachment.model(torch.cat([ids[:, 10:150], ids[:, 150:290]]), **over(session))
        assert (session.num_rows, session.get_seq_length()) == (1, 10)
        attachment.model(ids[:, 10:40], **over(session))


@torch.no_grad()
def test_rows_are_left_alone_while_a_pass_is_under_way(attachment: Attachment) -> None:
    session = attachment.cache.session("alice")
    attachment.model(IDS[:, :20], **over(session))
    norm = attachment.model.model.norm
    forward = norm.forward
    for edit in (lambda: session.crop(5), lambda: session.batch_repeat_interleave(2)):
        norm.forward = lambda hidden, edit=edit: edit() or forward(hidden)
        with pytest.raises(InvalidRequestError, match="under way"):
            attachment.model(IDS[:, 20:30], **over(session))
        assert (session.num_rows, session.get_seq_length()) == (1, 20)
    norm.forward = forward


@pytest.mark.parametrize("own", [{"pad_token_id": 0}, {"use_cache": False}])
def test_a_configuration_passed_is_completed_by_the_models_own(
    attachment: Attachment, own: dict[str, Any]
) -> None:
    model = attachment.model
    model.generation_config.update(**own)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    config = GenerationConfig(**GREEDY)
    says = "use_cache=False.*the model's own generation configuration"
    with pytest.warns(UserWarning, match=says) if "use_cache" in own else nullcontext():
        found = model.generate(padded, generation_config=config)
    assert ("every call passes by: use_cache=False" in repr(attachment)) == ("use_cache" in own)
    attachment.detach()
    assert torch.equal(found, model.generate(padded, generation_config=config))
