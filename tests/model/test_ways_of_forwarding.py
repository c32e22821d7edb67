"""Hand-written loops over ``forward``: what a session gives is what the model gives with its own cache.

And what a session cannot hold is refused before anything is stored.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt
from transformers import DynamicCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CONFIG = {"max_tokens": 1024, "block_size": 16}
PROMPT = prompt(37)
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


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


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_greedy_loop_of_ones_own_writes_the_models_text(attached: Attachment, own: PreTrainedModel) -> None:
    session, text = attached.cache.session("loop"), PROMPT
    fed = text
    with torch.no_grad():
        for _ in range(7):
            logits = attached.model(input_ids=fed, **over(session), logits_to_keep=1).logits
            assert logits.shape[1] == 1
            fed = logits[:, -1:].argmax(-1)
            text = torch.cat([text, fed], dim=1)
    assert torch.equal(text, own.generate(PROMPT, **GREEDY))


def test_teacher_forcing_in_pieces_scores_every_token_alike(
    attached: Attachment, own: PreTrainedModel
) -> None:
    session = attached.cache.session("pieces")
    with torch.no_grad():
        expected = own(PROMPT).logits
        found = [attached.model(part, **over(session)).logits for part in PROMPT.split(9, dim=1)]
    assert close(torch.cat(found, dim=1), expected)


def test_loss_gradients_and_hidden_states_are_the_models_own(
    attached: Attachment, own: PreTrainedModel
) -> None:
    options: dict[str, Any] = {"labels": PROMPT, "output_hidden_states": True}
    expected = own(PROMPT, **options)
    session = attached.cache.session("loss")
    found = attached.model(PROMPT, **over(session), use_cache=True, **options)
    assert torch.equal(found.loss, expected.loss)
    assert all(map(close, found.hidden_states, expected.hidden_states))
    assert found[CACHE] is session
    assert not session.layers[0].keys.requires_grad


def test_outputs_may_be_tuples_and_arguments_positional(attached: Attachment, own: PreTrainedModel) -> None:
    session = attached.cache.session("tuple")
    with torch.no_grad():
        logits, past = attached.model(PROMPT, None, None, session, return_dict=False)
        assert past is session
        assert close(logits, own(PROMPT).logits)


def test_columns_and_positions_that_are_the_texts_own_are_taken(
    attached: Attachment, own: PreTrainedModel
) -> None:
    session = attached.cache.session("positions")
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 37)):
            columns = torch.arange(start, stop)
            found = attached.model(
                PROMPT[:, start:stop],
                **over(session),
                position_ids=columns[None],
                cache_position=columns,
                attention_mask=torch.ones((1, stop)),
            ).logits
        assert close(found[:, -1], own(PROMPT).logits[:, -1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "right padding": ({"attention_mask": (torch.arange(37) < 30).long()[None]}, "left padding only"),
    "a mask with a hole": ({"attention_mask": (torch.arange(37) != 9).long()[None]}, "left padding only"),
    "a mask of pairs": ({"attention_mask": torch.ones((1, 1, 37, 37)).tril().bool()}, "4 dimensions"),
    "masks by layer": ({"attention_mask": {"full_attention": None}}, "dict"),
    "a mask of weights": ({"attention_mask": torch.full((1, 37), 0.5)}, "other values"),
    "a short mask": ({"attention_mask": torch.ones((1, 30))}, "expected"),
    "far positions": ({"position_ids": torch.arange(37)[None] + 40}, "position_ids"),
    "far columns": ({"cache_position": torch.arange(37) + 40}, "cache_position"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_session_cannot_hold_is_refused_and_leaves_it_as_it_was(
    attached: Attachment, own: PreTrainedModel, name: str
) -> None:
    options, reason = REFUSED[name]
    session = attached.cache.session("refused")
    with torch.no_grad():
        with pytest.raises((InvalidRequestError, UnsupportedError), match=reason):
            attached.model(PROMPT, **over(session), **options)
        assert session.get_seq_length() == 0
        assert close(attached.model(PROMPT, **over(session)).logits, own(PROMPT).logits)


def test_embeddings_hide_the_tokens_and_are_refused(attached: Attachment, own: PreTrainedModel) -> None:
    session = attached.cache.session("embeddings")
    with pytest.raises(UnsupportedError, match="embeddings"), torch.no_grad():
        attached.model(inputs_embeds=own.get_input_embeddings()(PROMPT), **over(session))


PLAIN: dict[str, dict[str, Any]] = {
    "right padding": {"attention_mask": (torch.arange(37) < 30).long()[None]},
    "a hole": {"attention_mask": (torch.arange(37) != 9).long()[None]},
    "pairs": {"attention_mask": torch.ones((1, 1, 37, 37)).tril().bool().roll(1, 2)},
    "far positions": {"position_ids": torch.arange(37)[None] * 3},
    "labels": {"labels": PROMPT},
    "its own cache": {**over(None), "use_cache": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_pass_without_a_session_is_the_models_own(
    attached: Attachment, own: PreTrainedModel, name: str
) -> None:
    attached.model.generate(PROMPT, **GREEDY)
    with torch.no_grad():
        found, expected = attached.model(PROMPT, **PLAIN[name]), own(PROMPT, **PLAIN[name])
    assert torch.equal(found.logits, expected.logits)
    assert found.get("loss") is None or torch.equal(found.loss, expected.loss)
    assert type(found.get(CACHE)) is type(expected.get(CACHE))


def test_a_cache_of_transformers_goes_through_an_attached_model(
    attached: Attachment, own: PreTrainedModel
) -> None:
    past = DynamicCache(config=own.config)
    with torch.no_grad():
        attached.model(PROMPT[:, :20], **over(past))
        found = attached.model(PROMPT[:, 20:], **over(past)).logits
        assert close(found, own(PROMPT).logits[:, 20:])


def test_gradients_and_checkpoints_of_an_attached_model_are_its_own(
    attached: Attachment, own: PreTrainedModel
) -> None:
    def gradient(model: PreTrainedModel) -> torch.Tensor:
        model.train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        weight = model.model.layers[0].self_attn.k_proj.weight
        found = weight.grad.clone()
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.zero_grad()
        model.eval()
        return found

    attached.model.generate(PROMPT, **GREEDY)
    assert torch.equal(gradient(attached.model), gradient(own))
    assert torch.equal(attached.model.generate(PROMPT, **GREEDY), own.generate(PROMPT, **GREEDY))


def test_two_threads_step_their_own_sessions(attached: Attachment, own: PreTrainedModel) -> None:
    texts = [prompt(30, seed=1), prompt(30, seed=2)]
    with torch.no_grad():
        expected = [own(text).logits for text in texts]
    found: dict[int, torch.Tensor] = {}
    failed: list[BaseException] = []

    def loop(row: int) -> None:
        try:
            session = attached.cache.session(f"thread {row}")
            with torch.no_grad():
                parts = [attached.model(p, **over(session)).logits for p in texts[row].split(3, dim=1)]
            found[row] = torch.cat(parts, dim=1)
        except BaseException as error:  # noqa: BLE001  # shown below, in the thread that can fail the test
            failed.append(error)

    threads = [threading.Thread(target=loop, args=(row,)) for row in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(close(found[row], expected[row]) for row in (0, 1))


def test_a_session_of_one_model_is_refused_by_another(attached: Attachment) -> None:
    other = make_model("llama", seed=2)
    session = attached.cache.session("mine")
    with kvhybrid.attach(other, config=KVCacheConfig(**CONFIG)), torch.no_grad():
        for call in (
            lambda: other(PROMPT, **over(session)),
            lambda: other.generate(PROMPT, **over(session), **GREEDY),
        ):
            with pytest.raises(UnsupportedError, match="attached to another model"):
                call()
    assert session.get_seq_length() == 0
