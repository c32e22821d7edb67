"""Scores of continuations equal those of whole texts without a cache, family by family, on both routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
from families import CONFIGS, VOCAB, make_model, prompt

from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, InvalidRequestError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.scoring import score_continuations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest, model: PreTrainedModel) -> Iterator[Attachment]:
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=1024, block_size=16))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


@pytest.fixture
def llama() -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=256, block_size=16))
    with Attachment(model, cache, Route.PAGED, "test").install() as attachment:
        yield attachment
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def ids(length: int, seed: int = 0) -> list[int]:
    return prompt(length, seed=seed)[0].tolist()


@torch.no_grad()
def own_score(model: PreTrainedModel, context: list[int], text: list[int]) -> tuple[float, bool]:
    """What the model says of the whole text, every token computed."""
    logits = model(torch.tensor([context + text[:-1]])).logits[0, -len(text) :]
    wanted = torch.tensor(text)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("length", [1, 2, 16, 17, 45])
def test_scores_equal_those_of_whole_texts(attachment: Attachment, length: int) -> None:
    context = ids(length)
    texts = [ids(n, seed=n) for n in (3, 1, 20, 7, 7)]
    greedy = attachment.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)
    texts.append(greedy[0, length:].tolist())
    expected = [own_score(attachment.model, context, text) for text in texts]
    for _ in range(2):  # cold, then with everything cached
        scores = score_continuations(attachment, context, texts, batch_size=4)
        assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected]
        found = torch.tensor([score.log_likelihood for score in scores])
        torch.testing.assert_close(found, torch.tensor([nats for nats, _ in expected]))
    assert scores[-1].is_greedy
    assert not scores[0].is_greedy


Count: TypeAlias = "Callable[[list[int], list[list[int]]], int]"


@pytest.fixture
def computed(llama: Attachment) -> Iterator[Count]:
    """Score, and say how many tokens the model computed for it."""
    seen: list[int] = []
    # One hook for the whole test: pages computed under another hook are other pages.
    hook = llama.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )

    def computed(context: list[int], texts: list[list[int]]) -> int:
        seen.clear()
        score_continuations(llama, context, texts)
        return sum(seen)

    for _ in range(3):  # what the hook notes of a pass is learned to describe no model
        computed(ids(5, seed=9), [ids(2)])
    yield computed
    hook.remove()


def test_the_context_is_computed_once_and_never_again(computed: Count) -> None:
    context = ids(50)
    texts = [ids(6, seed=n) for n in range(1, 6)]
    assert computed(context, texts) == 49 + 5 * 6
    assert computed(context, texts) == 5 * 6
    # A context that goes on from this one pays for what is new.
    assert computed(context + ids(10, seed=9), texts) == 10 + 5 * 6


def test_a_context_shared_in_part_is_computed_in_part(computed: Count) -> None:
    shared = ids(32)
    computed(shared + ids(8, seed=1), [ids(3, seed=2)])
    assert computed(shared + ids(8, seed=3), [ids(3, seed=2)]) == 7 + 3


def test_no_continuations_have_no_scores(llama: Attachment) -> None:
    assert score_continuations(llama, ids(5), []) == []


@pytest.mark.parametrize(
    ("context", "texts"),
    [([], [[3]]), ([3], [[3], []]), ([VOCAB], [[3]]), ([3], [[4, VOCAB]]), ([3], [[-1]])],
    ids=["no context", "empty continuation", "context outside", "last token outside", "negative"],
)
def test_bad_ids_are_refused_before_anything_is_computed(
    llama: Attachment, context: list[int], texts: list[list[int]]
) -> None:
    with pytest.raises(InvalidRequestError):
        score_continuations(llama, context, texts)
    assert llama.cache.pool.num_free == llama.cache.pool.num_pages


def test_a_batch_of_none_is_refused(llama: Attachment) -> None:
    with pytest.raises(InvalidRequestError, match="batch_size must be at least 1, got 0"):
        score_continuations(llama, ids(3), [ids(2)], batch_size=0)


def test_what_does_not_fit_the_cache_is_a_clear_error_and_leaves_no_page_held(llama: Attachment) -> None:
    with pytest.raises(CapacityError):
        score_continuations(llama, ids(300), [ids(2)])
    with pytest.raises(CapacityError):
        score_continuations(llama, ids(200), [ids(60, seed=n) for n in range(4)])
    expected = own_score(llama.model, ids(200), ids(3, seed=1))
    (score,) = score_continuations(llama, ids(200), [ids(3, seed=1)])
    assert score.log_likelihood == pytest.approx(expected[0], rel=1e-5)
