"""What transformers itself wraps around ``generate``: pipelines, chat templates, streamers, recipes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import VOCAB, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

CONFIG = {"max_tokens": 2048, "block_size": 16}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
SYSTEM = " ".join(f"w{3 + index % 60}" for index in range(30))
TEMPLATE = "{% for m in messages %}{{ 'w1 ' + m['content'] + ' w2 ' }}{% endfor %}"
RECIPE = f"""
import torch

def generate(model, inputs=None, {CACHE}=None, max_new_tokens=6, **kwargs):
    cache = {CACHE}
    fed = inputs[:, cache.get_seq_length():] if cache is not None else inputs
    for _ in range(max_new_tokens):
        output = model(input_ids=fed, {CACHE}=cache, use_cache=True)
        cache, fed = output.{CACHE}, output.logits[:, -1].argmax(-1, keepdim=True)
        inputs = torch.cat([inputs, fed], dim=1)
    return inputs
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", padding_side="left")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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


def cached(attachment: Attachment) -> int:
    return int(attachment.cache.get_stats()["cached_tokens"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_answers_alike_one_by_one_and_in_batches(
    attached: Attachment, own: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    texts = [f"{SYSTEM} w5 w9", f"{SYSTEM} w7", f"{SYSTEM} w5 w9 w11 w40 w41", "w12 w13"]
    options = {"batch_size": batch_size, "return_full_text": False, **GREEDY}
    expected = pipeline("text-generation", model=own, tokenizer=tokenizer)(texts, **options)
    asked = pipeline("text-generation", model=attached.model, tokenizer=tokenizer)
    for _ in range(2):
        assert asked(texts, **options) == expected
    assert cached(attached) > 60


def test_a_conversation_through_a_chat_template_reuses_its_turns(
    attached: Attachment, own: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [pipeline("text-generation", model=model, tokenizer=tokenizer) for model in (own, attached.model)]
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(3):
        messages.append({"role": "user", "content": f"w{10 + turn} w20"})
        expected, found = (chat(messages, **GREEDY)[0]["generated_text"] for chat in chats)
        assert found == expected
        messages = expected
    assert cached(attached) > 60


def test_a_streamer_in_a_thread_tells_the_models_own_words(
    attached: Attachment, own: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(SYSTEM, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(own.generate(ids, **GREEDY)[0, ids.shape[1] :])
    for _ in range(2):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=attached.model.generate, args=(ids,), kwargs={"streamer": streamer, **GREEDY}
        )
        thread.start()
        told = "".join(streamer)
        thread.join()
        assert told.split() == expected.split()
    assert cached(attached) == ids.shape[1] - 1


def test_a_recipe_from_a_folder_runs_over_the_cache(
    attached: Attachment, own: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(RECIPE)
    ids = tokenizer(SYSTEM, return_tensors="pt")["input_ids"]
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True, "max_new_tokens": 6}
    with torch.no_grad():
        expected = own.generate(ids, **options)
        for _ in range(2):
            assert torch.equal(attached.model.generate(ids, **options), expected)
    assert torch.equal(expected, own.generate(ids, **GREEDY))
    assert cached(attached) == ids.shape[1] - 1
