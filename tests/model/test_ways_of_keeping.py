"""What people do with a model beside calling it: copy it, save it, compile it, move it, change its modes.

An attached model stays the model that it is; what cannot be right is refused in clear words.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import VOCAB, make_model, prompt
from transformers import AutoModelForCausalLM

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import ConfigError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

CONFIG = {"max_tokens": 1024, "block_size": 16}
PROMPT = prompt(37)
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


def text_of(model: Any, ids: torch.Tensor = PROMPT, **more: Any) -> torch.Tensor:
    return model.generate(ids, **GREEDY, **more)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """Past a number of compilations in one process torch gives up, and runs plain code without a word."""
    torch.compiler.reset()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """What the weights write when nothing is attached."""
    return text_of(make_model("llama"))


@pytest.fixture(params=list(Route))
def attached(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    with _attach(model, request.param) as attachment:
        yield attachment
    pool = attachment.cache.pool
    pool.check()
    assert pool.num_free + pool.num_evictable == pool.num_pages


def _attach(model: PreTrainedModel, route: Route) -> Attachment:
    cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
    return Attachment(model, cache, route, "test").install()


def cached(attachment: Attachment) -> int:
    return int(attachment.cache.get_stats()["cached_tokens"])


def test_a_deep_copy_is_the_model_without_us(attached: Attachment, expected: torch.Tensor) -> None:
    text_of(attached.model)
    twin = copy.deepcopy(attached.model)
    assert vars(twin).keys().isdisjoint({"forward", "generate", "__deepcopy__", "_kvhybrid_attachment"})
    assert twin.config._attn_implementation == "sdpa"
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    before = cached(attached)
    changed = text_of(twin)
    assert not torch.equal(changed, expected)
    assert cached(attached) == before
    assert torch.equal(text_of(attached.model), expected)
    with kvhybrid.attach(twin, config=KVCacheConfig(**CONFIG)):
        assert torch.equal(text_of(twin), changed)
        attached.detach()
        assert torch.equal(text_of(twin), changed)
    assert torch.equal(text_of(attached.model), expected)


def test_a_deep_copy_of_what_holds_the_model_holds_a_copy(
    attached: Attachment, expected: torch.Tensor
) -> None:
    pair = copy.deepcopy(torch.nn.ModuleList([attached.model, attached.model]))
    assert pair[0] is pair[1]
    assert pair[0] is not attached.model
    assert torch.equal(text_of(pair[0]), expected)


def test_an_attached_model_is_pickled_without_the_attachment(
    attached: Attachment, expected: torch.Tensor
) -> None:
    written = io.BytesIO()
    torch.save(attached.model, written)
    written.seek(0)
    copies = [
        pickle.loads(pickle.dumps(attached.model)),
        torch.load(written, weights_only=False),
        copy.copy(attached.model),
    ]
    for twin in copies:
        assert not any("kvhybrid" in str(value) for value in (*vars(twin), twin.config._attn_implementation))
        assert not {"forward", "generate", "__getstate__"} & vars(twin).keys()
        assert torch.equal(text_of(twin), expected)
    with pytest.raises(UnsupportedError, match="its model can"):
        pickle.dumps(attached)


def test_a_session_is_not_pickled_and_says_what_to_do(attached: Attachment) -> None:
    session = attached.cache.session("talk")
    with pytest.raises(UnsupportedError, match="export"):
        pickle.dumps(session)


def test_weights_saved_while_attached_know_nothing_of_us(
    attached: Attachment, expected: torch.Tensor, tmp_path: Path
) -> None:
    text_of(attached.model)
    attached.model.save_pretrained(tmp_path)
    assert "kvhybrid" not in (tmp_path / "config.json").read_text()
    assert "kvhybrid" not in (tmp_path / "generation_config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(text_of(again), expected)
    assert attached.model.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(text_of(attached.model), expected)


def test_attached_detached_and_attached_again(attached: Attachment, expected: torch.Tensor) -> None:
    model, cache = attached.model, attached.cache
    session = cache.session("old")
    assert torch.equal(text_of(model), expected)
    with pytest.raises(ConfigError, match="attached already"):
        kvhybrid.attach(model)
    attached.detach()
    attached.detach()
    assert torch.equal(text_of(model), expected)
    with pytest.raises(UnsupportedError, match="not attached"):
        model.generate(PROMPT, **over(session), **GREEDY)
    with Attachment(model, cache, attached.route, "test").install() as again:
        before = cached(again)
        assert torch.equal(text_of(model), expected)
        assert cached(again) - before == 36


@pytest.mark.filterwarnings("ignore:generate runs without the cache.*torch.float64")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_finds_nothing_of_the_old_one(
    attached: Attachment, expected: torch.Tensor, dtype: torch.dtype
) -> None:
    own = make_model("llama").to(dtype)
    text_of(attached.model)
    before = cached(attached)
    attached.model.to(dtype)
    fits = dtype is torch.bfloat16  # float32 pages hold it as it is
    for _ in range(2):
        assert torch.equal(text_of(attached.model), text_of(own))
    session = attached.cache.session("other")
    if fits:
        assert cached(attached) - before == 36  # from itself, the second time
        assert torch.equal(attached.model.generate(PROMPT, **over(session), **GREEDY), text_of(own))
    else:
        assert cached(attached) == before
        with pytest.raises(UnsupportedError, match=f"{dtype}"):
            attached.model.generate(PROMPT, **over(session), **GREEDY)
        with pytest.raises(UnsupportedError, match=f"{dtype}"):
            attached.model(PROMPT, **over(session))
    attached.model.to(torch.float32)
    own.to(torch.float32)
    assert torch.equal(text_of(attached.model), text_of(own))


def test_autocast_finds_nothing_that_was_computed_without_it(
    attached: Attachment, expected: torch.Tensor
) -> None:
    own, model = make_model("llama"), attached.model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = text_of(own)
        with torch.no_grad():
            rounded_logits = own(PROMPT).logits[:, -1].float()
    with torch.no_grad():
        logits = own(PROMPT).logits[:, -1]
    assert not torch.equal(logits, rounded_logits)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(text_of(model), rounded)
        assert torch.equal(text_of(model), expected)
    scored = model.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.allclose(scored.logits[0], logits, atol=1e-4)
    assert cached(attached) > 0
    session = attached.cache.session("both")
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.generate(PROMPT, **over(session), **GREEDY), rounded)
        assert torch.equal(model.generate(PROMPT, **over(session), **GREEDY), expected)


def test_modes_of_training_change_no_text(attached: Attachment, expected: torch.Tensor) -> None:
    attached.model.train()  # nothing drops out in this one
    assert torch.equal(text_of(attached.model), expected)
    attached.model.eval()
    assert torch.equal(text_of(attached.model), expected)
    assert cached(attached) == 0  # each mode has pages of its own
    assert torch.equal(text_of(attached.model), expected)
    assert cached(attached) == 36


def test_more_embeddings_are_more_tokens(attached: Attachment) -> None:
    own = make_model("llama")
    text_of(attached.model)
    for model in (own, attached.model):
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    ids = PROMPT.clone()
    ids[0, 3] = VOCAB + 2
    assert torch.equal(text_of(attached.model, ids), text_of(own, ids))


def compiled_after(attached: Attachment, how: str) -> Any:
    model = attached.model
    if how == "the model, wrapped":
        return torch.compile(model, backend="eager")
    if how == "the model, in place":
        model.compile(backend="eager")
    elif how == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("how", ["the model, wrapped", "the model, in place", "its forward"])
def test_what_is_compiled_after_attach_writes_the_same(
    attached: Attachment, expected: torch.Tensor, how: str
) -> None:
    model = compiled_after(attached, how)
    for _ in range(2):
        assert torch.equal(text_of(model), expected)
    assert cached(attached) == 36
    session = attached.cache.session("compiled")
    with torch.no_grad():
        found = model(PROMPT, **over(session)).logits
        assert torch.allclose(found, make_model("llama")(PROMPT).logits, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_a_model_that_was_compiled_can_be_attached_and_comes_back_compiled(
    expected: torch.Tensor, how: str
) -> None:
    model: Any = make_model("llama")
    if how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    shown = torch.compile(model, backend="eager") if how == "wrapped" else model
    forward = vars(model).get("forward")
    with kvhybrid.attach(shown, config=KVCacheConfig(**CONFIG)) as attachment:
        assert attachment.model is model
        for _ in range(2):
            assert torch.equal(text_of(shown), expected)
        assert cached(attachment) == 36
        assert "forward" in vars(model)
    assert vars(model).get("forward") is forward
    kvhybrid.detach(shown)  # once more changes nothing
    torch._dynamo.reset()


def test_layers_compiled_after_attach_pass_pages_by_and_are_a_clear_error_in_a_session(
    expected: torch.Tensor,
) -> None:
    model = make_model("llama")
    # outlines sets it for the whole process
    with torch._dynamo.config.patch(suppress_errors=False), _attach(model, Route.PAGED) as attachment:
        model.model.layers[1].compile(backend="eager")
        with pytest.raises(UnsupportedError, match="compiled after attach"):
            text_of(model, **over(attachment.cache.session("compiled")))
        attachment.cache.drop_session("compiled")
        with pytest.warns(UserWarning, match="compiled after attach"):
            assert torch.equal(text_of(model), expected)
        pool = attachment.cache.pool
        assert pool.num_free == pool.num_pages
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        assert attachment.route is Route.MATERIALISED
        for _ in range(2):
            assert torch.equal(text_of(model), expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_layers_that_torch_gives_up_compiling_write_the_same(
    expected: torch.Tensor,
) -> None:
    model = make_model("llama")
    with torch._dynamo.config.patch(suppress_errors=True), _attach(model, Route.PAGED) as attachment:
        model.model.layers[1].compile(backend="eager")
        for _ in range(2):
            assert torch.equal(text_of(model), expected)
        assert attachment.cache.get_stats()["passed_by_calls"] == 2
    torch._dynamo.reset()
