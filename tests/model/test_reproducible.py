"""``reproducible=True``: a warm answer is bit-equal to a cold one, whatever was cached, in every dtype."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import VOCAB, make_model, prompt

from kvhybrid import KVCacheConfig, UnsupportedError
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model import attach
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRID = 32
TRIALS = 100
FAMILIES = ["llama", "mistral-window", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "GRID", GRID)


def attached(model: PreTrainedModel, route: Route, **fields: Any) -> Attachment:
    config = KVCacheConfig(max_tokens=4096, block_size=16, **{"reproducible": True, **fields})
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


def answer(attachment: Attachment, ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text and the logits of every step, ``[steps, rows, vocab]``."""
    out = attachment.model.generate(
        ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("family", FAMILIES)
def test_warm_logits_are_bit_equal_to_cold_ones_after_any_cut(
    family: str, route: Route, dtype: torch.dtype
) -> None:
    trials = TRIALS if (family, route) == ("llama", Route.PAGED) else TRIALS // 5
    model = make_model(family, dtype=dtype)
    rng = random.Random(f"{family} {route} {dtype}")
    saved = 0
    with attached(model, route) as attachment:
        for trial in range(trials):
            length = rng.randint(2, 150)
            ids = prompt(length, seed=trial)
            attachment.cache.clear()
            cold = answer(attachment, ids)
            attachment.cache.clear()
            for _ in range(rng.randint(1, 3)):  # what others computed, and where their texts part from ours
                cut = rng.randint(1, length)
                other = torch.cat([ids[:, :cut], prompt(rng.randint(1, 60), seed=rng.randint(0, 99))], dim=1)
                answer(attachment, other)
            before = attachment.cache.get_stats()["cached_tokens"]
            warm = answer(attachment, ids)
            saved += attachment.cache.get_stats()["cached_tokens"] - before
            assert torch.equal(warm[0], cold[0]), f"trial {trial}"
            assert torch.equal(warm[1], cold[1]), f"trial {trial}: off by {(warm[1] - cold[1]).abs().max()}"
    assert saved > trials * 10


@pytest.mark.parametrize("route", list(Route))
def test_text_is_the_models_own(route: Route) -> None:
    model = make_model("llama")
    ids = prompt(140)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with attached(model, route) as attachment:
        for _ in range(2):
            assert torch.equal(answer(attachment, ids)[0], expected)
        assert attachment.cache.get_stats()["cached_tokens"] == 4 * GRID


def test_what_was_generated_is_prefilled_again_in_the_next_turn() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    with attached(model, Route.PAGED) as attachment:
        text, _ = answer(attachment, prompt(60), **over(attachment.cache.session("alice")))
        turn = torch.cat([text, prompt(40, seed=1)], dim=1)
        warm = answer(attachment, turn, **over(attachment.cache.session("alice")))
        assert attachment.cache.session("alice").cached_tokens == [GRID]
        attachment.cache.clear()
        cold = answer(attachment, turn)
    assert torch.equal(warm[1], cold[1])


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},
    ],
    ids=["beams", "chunks", "lookup"],
)
def test_other_ways_of_generating_are_bit_equal_too(how: dict[str, Any]) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    ids = prompt(101)
    with attached(model, Route.PAGED) as attachment:
        cold = answer(attachment, ids, **how)
        attachment.cache.clear()
        answer(attachment, torch.cat([ids[:, :90], prompt(9, seed=5)], dim=1))
        warm = answer(attachment, ids, **how)
        assert attachment.cache.get_stats()["cached_tokens"] > 0
    assert torch.equal(warm[0], cold[0])
    assert torch.equal(warm[1], cold[1])


@pytest.mark.parametrize("route", list(Route))
def test_padded_batches_are_bit_equal_to_themselves(route: Route) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    ids = prompt(2 * 90).view(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    with attached(model, route) as attachment:
        cold = answer(attachment, ids, attention_mask=mask)
        for row, pad in enumerate((21, 0)):
            answer(attachment, ids[row : row + 1, pad:])  # alone: in another shape
        other = torch.cat([ids[:, :70], (ids[:, 70:] + 1) % VOCAB], dim=1)
        answer(attachment, other, attention_mask=mask)
        warm = answer(attachment, ids, attention_mask=mask)
    assert torch.equal(warm[1], cold[1])


@pytest.mark.parametrize("route", list(Route))
def test_a_padded_prompt_leaves_nothing_to_the_same_prompt_without_padding(route: Route) -> None:
    model, ids = make_model("llama", dtype=torch.bfloat16), prompt(150)
    with attached(model, route) as cold:
        expected = answer(cold, ids)[1]
    for pad in (1, 4, 7):
        with attached(model, route) as warm:
            padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], dim=1)
            answer(warm, padded, attention_mask=(torch.arange(150 + pad) >= pad).long()[None])
            assert torch.equal(answer(warm, ids)[1], expected)


@torch.no_grad()
def test_what_repeated_rows_compute_is_not_shared_with_one_alone() -> None:
    model, ids = make_model("llama"), prompt(100)
    with attached(model, Route.PAGED) as attachment:
        session = attachment.cache.session("alice")
        model(ids[:, :GRID], **over(session))
        session.batch_repeat_interleave(2)
        model(ids[:, GRID : 3 * GRID].repeat(2, 1), **over(session))
        other = attachment.cache.session("bob")
        model.generate(ids, max_new_tokens=1, **over(other))
        assert other.cached_tokens == [GRID]


def test_a_long_call_is_the_same_as_its_parts() -> None:
    model = make_model("llama")
    ids = prompt(75)
    with attached(model, Route.PAGED) as attachment, torch.no_grad():
        whole = model(ids, **over(attachment.cache.session("one")), output_hidden_states=True)
        session = attachment.cache.session("two")
        parts = [model(ids[:, start : start + GRID], **over(session)).logits for start in range(0, 75, GRID)]
        assert torch.equal(whole.logits, torch.cat(parts, dim=1))
        assert [tuple(states.shape) for states in whole.hidden_states] == [(1, 75, 48)] * 4
        last = model(ids, **over(attachment.cache.session("three")), logits_to_keep=40).logits
        assert torch.equal(last, whole.logits[:, -40:])
        some = torch.tensor([0, 40, 74])
        chosen = model(ids, **over(attachment.cache.session("four")), logits_to_keep=some).logits
        torch.testing.assert_close(chosen, whole.logits[:, some])
        (logits, *_) = model(ids, **over(attachment.cache.session("five")), return_dict=False)
        assert torch.equal(logits, whole.logits)


def test_what_cannot_be_joined_is_refused_and_the_session_stands_as_it_stood() -> None:
    model = make_model("llama")
    with attached(model, Route.PAGED) as attachment, torch.no_grad():
        session = attachment.cache.session("alice")
        model(prompt(10), **over(session))
        ids = prompt(70, seed=1)
        with pytest.raises(UnsupportedError, match="labels in a call of 3 forward passes"):
            model(ids, labels=ids, **over(session))
        calls = []

        def fail_later(*args: Any) -> None:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("interrupted")

        handle = model.model.layers[2].register_forward_pre_hook(fail_later)
        attachment.model.generation_config.max_new_tokens = 1
        with pytest.raises(RuntimeError, match="interrupted"):
            model(ids, **over(session))
        assert session.get_seq_length() == 10
        handle.remove()
        found = model(ids, **over(session)).logits
        expected = model(torch.cat([prompt(10), ids], dim=1), use_cache=False).logits[:, 10:]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
