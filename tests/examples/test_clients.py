"""Other ways in which the examples' clients call a model: each gives the bare model's answers."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from transformers import pipeline, set_seed

import kvhybrid
from kvhybrid.model.load import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parents[2] / "examples"
RULES = "You are a messenger at the court. Speak plainly, and name the place before the deed.\n" * 3
PROMPTS = [RULES + who for who in ("KING RICHARD:\n", "MESSENGER:\n", "DUCHESS OF YORK:\nIs")]
WHY = "not installed: it is in the dependency group 'examples'"


@pytest.fixture(scope="module")
def model_and_tokenizer() -> Any:
    return load_model()


def check(model: Any, ask: Callable[[], Any]) -> None:
    """Ask bare, then attached: cold, and once more with everything cached."""
    expected = ask()
    with kvhybrid.attach(model) as attachment:
        assert ask() == expected
        assert ask() == expected
        assert attachment.cache.get_stats()["cached_tokens"] > 200
        assert attachment.cache.get_stats()["sequences"] == 0


@pytest.mark.parametrize("way", ["batch", "abatch", "stream"])
def test_langchain_asks_in_its_other_ways(model_and_tokenizer: Any, way: str) -> None:
    clients = pytest.importorskip("langchain_huggingface", reason=WHY)
    model, tokenizer = model_and_tokenizer
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=8)
    llm = clients.HuggingFacePipeline(pipeline=write)

    def ask() -> list[str]:
        set_seed(0)
        if way == "batch":
            return llm.batch(PROMPTS)
        if way == "abatch":
            return asyncio.run(llm.abatch(PROMPTS))
        others = set(threading.enumerate())
        texts = ["".join(llm.stream(prompt)) for prompt in PROMPTS]
        # langchain leaves the threads that it streams from to themselves.
        for thread in set(threading.enumerate()) - others:
            thread.join()
        return texts

    check(model, ask)


@pytest.mark.parametrize("way", ["regex", "choice", "batch", "samples"])
def test_outlines_constrains_in_its_other_ways(model_and_tokenizer: Any, way: str) -> None:
    outlines = pytest.importorskip("outlines", reason=WHY)
    model, _ = model_and_tokenizer
    _, tokenizer = load_model()
    tokenizer.chat_template = None
    write = outlines.from_transformers(model, tokenizer)
    shape = Literal["yes", "no", "perhaps"] if way == "choice" else outlines.regex(r"[A-Z][a-z]{2,6} \d{2}")

    def ask() -> list[Any]:
        set_seed(0)
        if way == "batch":
            return write.batch(PROMPTS, shape, max_new_tokens=16, do_sample=False)
        more = {"do_sample": True, "num_return_sequences": 3} if way == "samples" else {"do_sample": False}
        return [write(prompt, shape, max_new_tokens=16, **more) for prompt in PROMPTS]

    check(model, ask)


@pytest.fixture
def lm_eval_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("lm_eval", reason=WHY)
    monkeypatch.syspath_prepend(str(FOLDER))
    import lm_eval_task

    yield lm_eval_task
    for name in ("lm_eval_task", "saved"):
        del sys.modules[name]


def test_lm_evals_own_class_is_not_disturbed(lm_eval_task: Any, model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    own = lm_eval_task.HFLM(pretrained=model, tokenizer=tokenizer)
    expected, metrics = lm_eval_task.evaluate(own)
    with kvhybrid.attach(model):
        found, same = lm_eval_task.evaluate(own)
    assert torch.equal(found, expected)
    assert same == metrics


def test_what_is_too_long_for_the_model_is_cut_as_lm_eval_cuts_it(
    lm_eval_task: Any, model_and_tokenizer: Any
) -> None:
    model, tokenizer = model_and_tokenizer
    short = {"tokenizer": tokenizer, "max_length": 96}
    expected, metrics = lm_eval_task.evaluate(lm_eval_task.HFLM(pretrained=model, **short))
    with kvhybrid.attach(model) as attachment:
        found, same = lm_eval_task.evaluate(lm_eval_task.CachedLM(attachment, **short))
    torch.testing.assert_close(found, expected)
    assert same == metrics


def test_lm_eval_generates_through_the_cache(lm_eval_task: Any, model_and_tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    model, tokenizer = model_and_tokenizer
    lm = lm_eval_task.HFLM(pretrained=model, tokenizer=tokenizer)
    until = {"until": ["\n"], "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, (text, until), index) for index, text in enumerate(PROMPTS)]
    check(model, lambda: lm.generate_until(requests))
