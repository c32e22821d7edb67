"""``pipeline("text-generation")`` over an attached model: the same answers, of what is cached."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from transformers import pipeline, set_seed

import kvhybrid
from kvhybrid.model.load import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

RULES = "You are a messenger at the court. Speak plainly, and name the place before the deed.\n" * 3
PROMPTS = [
    RULES + who for who in ("KING RICHARD:\n", "MESSENGER:\n", "DUCHESS OF YORK:\nIs", "KING RICHARD:")
]
CHATS = [
    [{"role": "system", "content": RULES}, {"role": "user", "content": question}]
    for question in ("Who comes here?", "What news?")
]


@pytest.fixture(scope="module")
def write() -> Any:
    model, tokenizer = load_model()
    # A greedy pipeline; transformers 4.57 asks the model when the pipeline says what is the default anyway.
    model.generation_config.do_sample = False
    return pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=8,
        do_sample=False,
        return_full_text=False,
    )


def ask_in_threads(write: Any) -> list[Any]:
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(write, PROMPTS))


def ask_with_sampling(write: Any) -> Any:
    set_seed(0)
    return write(PROMPTS[:2], do_sample=True, num_return_sequences=3)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda write: write(PROMPTS), id="one by one"),
        pytest.param(lambda write: write(PROMPTS, batch_size=3), id="padded batches"),
        pytest.param(lambda write: write(CHATS), id="chats"),
        pytest.param(lambda write: write(PROMPTS[:2], num_beams=3, num_return_sequences=2), id="beams"),
        pytest.param(ask_with_sampling, id="several samples a prompt"),
        pytest.param(ask_in_threads, id="threads"),
    ],
)
def test_the_pipelines_answers_are_the_models_own(write: Any, ask: Callable[[Any], Any]) -> None:
    expected = ask(write)
    with kvhybrid.attach(write.model) as attachment:
        assert ask(write) == expected
        before = attachment.cache.get_stats()["cached_tokens"]
        assert ask(write) == expected
        assert attachment.cache.get_stats()["cached_tokens"] - before > 100
        assert attachment.cache.get_stats()["sequences"] == 0
