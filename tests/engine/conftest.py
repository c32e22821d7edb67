"""Engines over tiny models, and what the models themselves would have said."""

import threading

import anyio
import anyio.lowlevel
import pytest
import torch
from families import VOCAB, make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvhybrid import KVCacheConfig, KVEngine
from kvhybrid.model.runner import Runner

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHARACTERS = [chr(code) for code in range(0x20, 0x7F) if chr(code) not in "`~^"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character, so that whatever a random model says is text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    assert len(vocabulary) == VOCAB
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>")
    # No end token: a random model would say it, and most tests are about answers of a known length.
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def llama():
    return make_model("llama")


@pytest.fixture
def make_engine(llama, tokenizer):
    """Engines of small pages and a small pool: ``make_engine(model=, max_tokens=, ...)``."""

    def make(model=None, *, tokenizer=tokenizer, max_tokens=2048, block_size=8, num_workers=8, **options):
        config = KVCacheConfig(max_tokens=max_tokens, block_size=block_size, num_workers=num_workers)
        return KVEngine(model if model is not None else llama, config, tokenizer=tokenizer, **options)

    return make


@pytest.fixture
def own_words():
    """What ``generate`` says alone, with a cache of its own: the new token ids."""

    def generate(model, ids, count):
        ids = torch.as_tensor(ids).view(1, -1)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        return found[0, ids.shape[1] :].tolist()

    return generate


@pytest.fixture
def gate(monkeypatch):
    """Hold a model's forward pass until opened: ``gate(model)``."""
    return lambda model: Gate(model, monkeypatch)


class Gate:
    """Stops forward passes in the lane's thread. Opens by itself after 30 s, so that nothing hangs."""

    def __init__(self, model, monkeypatch):
        self._open = threading.Event()
        self._reached = threading.Event()
        self.threads = set()
        run = Runner.run

        def held(runner, *args, **kwargs):
            if runner.model is model:
                self.threads.add(threading.get_ident())
                self._reached.set()
                assert self._open.wait(30), "nobody opened the gate"
            return run(runner, *args, **kwargs)

        # Not the model's own forward: with another one the model is another model.
        monkeypatch.setattr(Runner, "run", held)

    def open(self):
        self._open.set()

    async def reached(self):
        while not self._reached.is_set():
            await anyio.lowlevel.checkpoint()


@pytest.fixture
def pulse(monkeypatch):
    """Wait for steps of an open engine: ``pulse(engine)``."""
    return lambda engine: Pulse(engine, monkeypatch)


class Pulse:
    """Beats once a step, so that a test waits without spinning: a spinning loop starves the lane's thread."""

    def __init__(self, engine, monkeypatch):
        self._engine = engine
        self._beat = anyio.Event()
        deliver = engine._driver._deliver

        def beat(outcome):
            deliver(outcome)
            past, self._beat = self._beat, anyio.Event()
            past.set()

        monkeypatch.setattr(engine._driver, "_deliver", beat)

    async def beats(self, count):
        for _ in range(count):
            await self._beat.wait()

    async def idle(self):
        while self._engine.get_stats()["running"] or self._engine.get_stats()["queued"]:
            await self._beat.wait()


def assert_balanced(engine):
    """Nothing runs, nothing waits, and every page is free or may leave."""
    pool = engine.cache.pool
    pool.check()
    found = pool.statistics()
    assert found["sequences"] == 0
    assert found["pinned_pages"] == found["mutable_pages"] == found["shared_pages"] == 0
    assert pool.num_free + pool.num_evictable == pool.num_pages


@pytest.fixture
def balanced():
    return assert_balanced
