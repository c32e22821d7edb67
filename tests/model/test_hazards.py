"""What would silently poison the cache, or another user's text: each is right, or a clear error.

What goes wrong in silence, or with an error that explains nothing, with the caches of transformers, and the
test that shows what happens with ours (in this file where none is named):

- a cache that holds a part of the prompt: test_generate::test_prompts_that_share_an_opening_reuse_it
- new tokens and a mask of all: test_generate::test_new_tokens_alone_continue_a_session_when_the_mask_is_whole
- new tokens without a mask: test_tokens_without_a_mask_are_the_whole_prompt
- a prompt that is wholly cached: test_generate::test_a_prompt_that_is_wholly_cached_gives_the_same_text
- a cache longer than the prompt:
  test_generate::test_a_session_longer_than_the_prompt_is_cut_to_what_they_share
- a cache of another text:
  test_generate::test_different_text_under_the_same_session_is_answered_for_what_it_is
- prefill in chunks behind a cache:
  test_generate::test_chunked_prefill_on_a_cached_prefix_equals_the_models_own
- prompt lookup, assistants and beams on quantized caches: there are none yet, and asking for one is refused
  (tests/test_config.py); on ours: test_ways_of_generating::test_it_gives_the_same_through_the_cache
- rows repeated, then another step:
  test_transformers_cache_cases::test_rows_are_repeated_and_chosen_as_in_their_own_caches
- a deep copy: test_transformers_cache_cases::test_the_recipe_of_a_prompt_copied_for_every_question
- crop, rows repeated, overflow of a static cache:
  test_transformers_cache_cases::test_what_is_cropped_is_gone_and_the_rest_goes_on,
  test_transformers_cache_cases::test_one_token_beyond_the_room_is_an_error_and_what_was_held_stays
- crop of a window that was passed: test_a_window_that_was_passed_is_cropped_like_any_other_text
- the batch size of a filled cache: test_transformers_cache_cases::test_shapes_of_every_kind_of_heads
- offloaded and paged by name: who asks for another cache gets it,
  test_ways_of_generating::test_whoever_asks_for_another_cache_or_none_gets_it_in_silence
- a model that its own explicit cache makes say other things (MPT): the probe compares with no cache at all,
  test_a_model_whose_own_cache_changes_its_text_is_refused
"""

from __future__ import annotations

import copy
import pickle
import re
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from families import VOCAB, make_model, prompt
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, ConfigError, InvalidRequestError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CONFIG = {"max_tokens": 512, "block_size": 16}


@pytest.fixture(params=list(Route))
def attached(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def text_of(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=8, do_sample=False, **kwargs)


def own_text(ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """What the same weights write when nothing is attached."""
    return text_of(make_model("llama"), ids, **kwargs)


def test_a_configuration_never_names_our_attention() -> None:
    model = make_model("llama")
    names: list[set[str | None]] = []

    def note(*_: object) -> None:
        twin = copy.deepcopy(model.config)
        written = pickle.loads(pickle.dumps(model.config))
        names.append({config._attn_implementation for config in (twin, written)})
        names.append({model.config.to_dict().get("_attn_implementation")})

    def ask_elsewhere(*_: object) -> None:
        thread = threading.Thread(target=lambda: names.append({model.config._attn_implementation}))
        thread.start()
        thread.join()

    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        assert attachment.route is Route.PAGED
        expected = own_text(prompt(20))
        hooks = [model.model.layers[1].register_forward_pre_hook(hook) for hook in (note, ask_elsewhere)]
        assert torch.equal(text_of(model, prompt(20)), expected)
        for hook in hooks:
            hook.remove()
    assert names
    assert all(found <= {"sdpa", None} for found in names)


@pytest.mark.parametrize("name", ["eager", "mine"])
def test_another_attention_set_while_attached_writes_its_own_text(name: str) -> None:
    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = make_model("llama")
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        ids = prompt(20)
        text_of(model, ids)
        model.set_attn_implementation(name)
        longer = torch.cat([ids, prompt(5, seed=1)], dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for text in (longer, ids):
                assert torch.equal(text_of(model, text), own_text(text))
        if name == "mine":
            assert attachment.cache.get_stats()["passed_by_calls"] == 2
            with pytest.raises(UnsupportedError, match="stand for pages"):
                text_of(model, longer, **over(attachment.cache.session("a")))
        model.set_attn_implementation("sdpa")
        assert torch.equal(text_of(model, ids), own_text(ids))
    assert model.config._attn_implementation == "sdpa"


def test_two_models_never_read_each_others_pages_in_one_cache() -> None:
    first, second = make_model("llama"), make_model("llama", seed=1)
    cache = KVCache.for_model(first, KVCacheConfig(**CONFIG))
    ids = prompt(40)
    with kvhybrid.attach(first, cache):
        text_of(first, ids)
        with pytest.raises(ConfigError, match="attached to a model already"):
            kvhybrid.attach(second, cache)
    expected = text_of(second, ids)
    with kvhybrid.attach(second, cache):
        assert torch.equal(text_of(second, ids), expected)


@pytest.mark.parametrize("with_positions", [False, True])
def test_padding_in_a_forward_pass_does_not_move_what_others_find(
    attached: Attachment, with_positions: bool
) -> None:
    ids = prompt(33).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if with_positions else {}
    session = attached.cache.session("batch")
    with torch.no_grad():
        attached.model(ids, attention_mask=mask, **over(session), **positions)
    session.close()
    for row, pad in ((0, 9), (1, 0)):
        plain = ids[row : row + 1, pad:]
        assert torch.equal(text_of(attached.model, plain), own_text(plain))


def test_positions_of_ones_own_are_refused(attached: Attachment) -> None:
    ids = prompt(33)
    with pytest.raises(UnsupportedError, match="position_ids"), torch.no_grad():
        session = attached.cache.session("far")
        attached.model(ids, position_ids=torch.arange(33)[None] * 3, **over(session))
    assert torch.equal(text_of(attached.model, ids), own_text(ids))


def test_padded_rows_that_were_evicted_are_computed_again_in_their_place(attached: Attachment) -> None:
    ids = torch.cat([prompt(40, seed=1), prompt(40, seed=2)])
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    session = attached.cache.session("batch")
    text = text_of(attached.model, ids, attention_mask=mask, **over(session))
    attached.cache.clear()
    seen = torch.cat([mask, torch.ones((2, 8), dtype=torch.long)], dim=1)
    with torch.no_grad():
        found = attached.model(text[:, -1:], attention_mask=seen, **over(session)).logits
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        expected = make_model("llama")(text, attention_mask=seen, position_ids=positions).logits[:, -1:]
    assert torch.allclose(found, expected, atol=1e-3)
    session.close()


def test_inputs_beside_the_tokens_are_not_served_to_those_who_lack_them() -> None:
    model, own = make_model("gpt2"), make_model("gpt2")
    ids = prompt(30)
    types = torch.full_like(ids, 5)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        with pytest.warns(UserWarning, match="token_type_ids"):
            found = text_of(model, ids, token_type_ids=types)
        assert torch.equal(found, text_of(own, ids, token_type_ids=types))
        assert torch.equal(text_of(model, ids), text_of(own, ids))
        session = attachment.cache.session("types")
        with pytest.raises(UnsupportedError, match="token_type_ids"):
            text_of(model, ids, token_type_ids=types, **over(session))
        with pytest.raises(UnsupportedError, match="token_type_ids"), torch.no_grad():
            model(ids, token_type_ids=types, **over(session))


def test_a_pass_that_leaves_layers_out_is_not_cached(attached: Attachment) -> None:
    ids = prompt(40)
    session = attached.cache.session("part")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="1 layers"):
        layers = attached.model.model.layers
        try:
            attached.model.model.layers = layers[:1]
            attached.model(ids, **over(session))
        finally:
            attached.model.model.layers = layers
    assert session.get_seq_length() == 0
    assert torch.equal(text_of(attached.model, ids), own_text(ids))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=6,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    with pytest.raises(UnsupportedError, match=kind):
        kvhybrid.attach(LlamaForCausalLM(config).eval())


def test_an_interrupted_pass_leaves_the_threads_masks_alone(attached: Attachment) -> None:
    model = attached.model

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        text_of(model, prompt(20))
    hook.remove()
    ids = prompt(20).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask, use_cache=False).logits
        expected = make_model("llama")(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_a_session_in_use_is_refused_to_another_thread(attached: Attachment) -> None:
    session = attached.cache.session("shared")
    refused: list[BaseException] = []

    def intrude() -> None:
        try:
            text_of(attached.model, prompt(10), **over(session))
        except InvalidRequestError as error:
            refused.append(error)

    def while_running(*_: object) -> None:
        if not refused:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    hook = attached.model.model.layers[0].register_forward_pre_hook(while_running)
    ids = prompt(20)
    found = text_of(attached.model, ids, **over(session))
    hook.remove()
    assert len(refused) == 1
    assert torch.equal(found, own_text(ids))


def test_a_session_closed_by_another_thread_closes_when_it_is_done(attached: Attachment) -> None:
    session = attached.cache.session("doomed")

    def drop(*_: object) -> None:
        thread = threading.Thread(target=attached.cache.drop_session, args=("doomed",))
        thread.start()
        thread.join()

    hook = attached.model.model.layers[0].register_forward_pre_hook(drop)
    ids = prompt(20)
    assert torch.equal(text_of(attached.model, ids, **over(session)), own_text(ids))
    hook.remove()
    with pytest.raises(kvhybrid.errors.ClosedError):
        text_of(attached.model, ids, **over(session))


def test_dropout_is_not_cached() -> None:
    model, own = make_model("gpt2"), make_model("gpt2")
    ids = prompt(30)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        model.train()
        with pytest.warns(UserWarning, match="training"):
            text_of(model, ids)
        with pytest.raises(UnsupportedError, match="training"):
            text_of(model, ids, **over(attachment.cache.session("train")))
        model.eval()
        assert torch.equal(text_of(model, ids), text_of(own, ids))


def test_a_mask_that_hides_other_tokens_later_is_refused(attached: Attachment) -> None:
    ids = prompt(12).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    session = attached.cache.session("masks")
    other = torch.ones((2, 13), dtype=torch.long)
    other[1, :2] = 0
    with torch.no_grad():
        attached.model(ids, attention_mask=mask, **over(session))
        with pytest.raises(UnsupportedError, match="hides other tokens"):
            attached.model(ids[:, :1], attention_mask=other, **over(session))
    session.close()


def test_modes_of_autograd_may_change_between_calls(attached: Attachment) -> None:
    ids = prompt(40)
    expected = own_text(ids)
    with torch.inference_mode():
        assert torch.equal(text_of(attached.model, ids), expected)
    assert torch.equal(text_of(attached.model, ids), expected)
    session = attached.cache.session("graph")
    attached.model(ids, **over(session))  # nobody said no_grad
    assert not any(pages.requires_grad for pages in attached.cache.storage.keys)
    session.close()
    with torch.inference_mode():
        assert torch.equal(text_of(attached.model, ids), expected)


def test_padding_that_generate_infers_is_seen(attached: Attachment) -> None:
    ids = torch.cat([prompt(30, seed=1), prompt(30, seed=2)])
    ids[0, :6] = 0
    assert torch.equal(text_of(attached.model, ids), own_text(ids))
    inner = prompt(30)
    inner[0, 12] = 0
    with pytest.warns(UserWarning, match="after position 0"):
        assert torch.equal(text_of(attached.model, inner), own_text(inner))


def test_a_right_padded_batch_runs_as_it_did_before(attached: Attachment) -> None:
    ids = prompt(20).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with pytest.warns(UserWarning, match="left padding only"):
        found = text_of(attached.model, ids, attention_mask=mask)
    assert torch.equal(found, own_text(ids, attention_mask=mask))


def test_a_session_that_could_not_be_restored_for_want_of_room_is_as_it_was(attached: Attachment) -> None:
    cache, model = attached.cache, attached.model
    session = cache.session("late")
    text = text_of(model, prompt(41), **over(session))
    cache.clear()
    hog = cache.session("hog")
    with torch.no_grad():
        model(prompt(500, seed=3), **over(hog))
        with pytest.raises(CapacityError):
            model(text[:, -1:], **over(session))
        hog.close()
        cache.clear()
        found = model(text[:, -1:], **over(session)).logits
        expected = make_model("llama")(text).logits[:, -1:]
    assert torch.allclose(found, expected, atol=1e-3)
    session.close()


def test_tokens_without_a_mask_are_the_whole_prompt(attached: Attachment) -> None:
    session = attached.cache.session("talk")
    text_of(attached.model, prompt(20), **over(session))
    new = prompt(5, seed=4)
    assert torch.equal(text_of(attached.model, new, **over(session)), own_text(new))


@pytest.mark.parametrize("route", list(Route))
def test_a_window_that_was_passed_is_cropped_like_any_other_text(route: Route) -> None:
    model, own = make_model("mistral-window"), make_model("mistral-window")
    ids, other = prompt(60), prompt(9, seed=3)
    cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
    with Attachment(model, cache, route, "test").install(), torch.no_grad():
        session = cache.session("window")
        model(ids, **over(session))
        session.crop(-30)
        found = model(other, **over(session)).logits
        expected = own(torch.cat([ids[:, :30], other], dim=1)).logits[:, 30:]
        assert torch.allclose(found, expected, atol=1e-4)
        session.close()


def test_a_model_whose_own_cache_changes_its_text_is_refused() -> None:
    class Forgetful(LlamaForCausalLM):
        """Attends to nothing before the last call, whatever its cache holds."""

        def forward(self, *args: object, **kwargs: object) -> object:
            if kwargs.get(CACHE) is not None:
                kwargs[CACHE].reset()
                kwargs["attention_mask"] = None
            return super().forward(*args, **kwargs)

    model = Forgetful(make_model("llama").config).eval()
    with pytest.raises(UnsupportedError, match="its own cache"):
        kvhybrid.attach(model)


def test_every_hazard_above_names_a_test_that_exists() -> None:
    named = re.findall(r"(?:(\w+)::)?(test_\w{15,})", __doc__)
    assert len(named) > 15
    for file, test in named:
        source = Path(__file__).with_stem(file or "test_hazards").read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"
