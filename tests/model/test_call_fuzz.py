"""Random sequences of calls on small models: every answer is the one that the model gives without us.

Each sequence is drawn from its own seed and begins with a cache of its own, so that a seed that fails can
be played alone: a failure names the call ``play(name, seed)``. The room is small: pages are evicted all the
time, and a call that does not fit is a typed error that changes nothing.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import SIZES, VOCAB
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError
from kvhybrid.layout import KVLayout
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from kvhybrid.model.transformers_cache import PagedSession

SEQUENCES = 2000
BLOCKS = 10  # of seeds, a model; each is one test
ACTIONS = 8
NEW = 3
LONGEST = 48
SMALL = {
    **SIZES,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
MODELS: dict[str, tuple[Any, Any, Route]] = {
    "grouped": (LlamaForCausalLM, LlamaConfig(**SMALL), Route.PAGED),
    "windowed": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=10), Route.PAGED),
    "materialised": (
        Qwen2ForCausalLM,
        Qwen2Config(**{name: size for name, size in SMALL.items() if name != "head_dim"}),
        Route.MATERIALISED,
    ),
}
# Few pieces, so that texts share beginnings; of lengths around the block's.
PIECES = [
    tuple(random.Random(seed).randrange(3, VOCAB) for _ in range(length))
    for seed, length in enumerate((1, 2, 3, 5, 7, 8, 9, 15))
]

Text = tuple[int, ...]


class CancelledError(Exception):
    """Stands for whatever may end a call in the middle."""


class Reference:
    """A model without us, and what it was asked already."""

    def __init__(self, name: str) -> None:
        kind, config, self.route = MODELS[name]
        self.layout = KVLayout.from_model_config(config, dtype=torch.float32, block_size=8)
        torch.manual_seed(0)
        self.model: PreTrainedModel = kind(copy.deepcopy(config)).eval()
        for parameter, weight in self.model.named_parameters():
            if weight.dim() == 2 and "embed" not in parameter:
                weight.data.mul_(4.0)  # far apart logits: equal tokens mean equal attention
        self.model.generation_config.eos_token_id = None
        self.twin = copy.deepcopy(self.model)  # the one that is attached
        self._logits: dict[Text, torch.Tensor] = {}

    def logits(self, text: Text) -> torch.Tensor:
        """Return the logits behind every token, ``[tokens, vocab]``."""
        if text not in self._logits:
            with torch.no_grad():
                self._logits[text] = self.model(torch.tensor([text]), use_cache=False).logits[0]
        return self._logits[text]

    def continued(self, text: Text, count: int) -> Text:
        """Return the text with its ``count`` likeliest next tokens."""
        for _ in range(count):
            text = (*text, int(self.logits(text)[-1].argmax()))
        return text


@cache
def reference(name: str) -> Reference:
    return Reference(name)


@dataclass
class Talk:
    """A session, and the text that it holds."""

    session: PagedSession
    text: Text


class CancelAt(LogitsProcessor):
    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise CancelledError
        return scores


class Player:
    """Draws calls from a seed, makes them, and compares every answer."""

    def __init__(self, own: Reference, attachment: Attachment, seed: int) -> None:
        self.own, self.attachment, self.model = own, attachment, attachment.model
        self.random = random.Random(seed)
        self.talks: list[Talk] = []
        self.steps: list[str] = []
        self.refused = 0

    def play(self) -> None:
        for step in range(ACTIONS):
            action = self.random.choice(self.actions()) if step else self.new_session
            self.steps.append(action.__name__)
            try:
                action()
            except CapacityError:
                self.refused += 1
                # Whoever gives up a text makes room.
                if self.talks:
                    self.talks.pop(self.random.randrange(len(self.talks))).session.close()
            assert all(talk.session.get_seq_length() == len(talk.text) for talk in self.talks)
        for talk in self.talks:
            talk.session.close()
        pool = self.attachment.cache.pool
        pool.check()
        assert pool.num_free + pool.num_evictable == pool.num_pages

    def actions(self) -> list[Callable[[], None]]:
        always = [self.generate, self.generate_batch, self.new_text, self.new_session, self.evict]
        with_talk = [self.forward, self.generate_in_session, self.fork, self.truncate, self.crop]
        cancelled = [self.cancel_forward, self.cancel_generate]
        return always if not self.talks else [*always, *with_talk * 3, *cancelled * 2]

    def draw(self, begin: Text = ()) -> Text:
        """A text that goes on from ``begin`` by a piece or two."""
        text = begin
        for _ in range(self.random.randint(1, 2)):
            text = (*text, *self.random.choice(PIECES))
        return text if len(text) <= LONGEST else text[: self.random.randint(1, LONGEST)]

    def talk(self) -> Talk:
        return self.random.choice(self.talks)

    def settle(self, talk: Talk, whole: Text) -> None:
        """Note what the session holds of a text that was written through it."""
        talk.text = whole[: talk.session.get_seq_length()]

    def ask(self, text: Text, **options: Any) -> Text:
        ids = torch.tensor([text])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options
        )
        return tuple(found[0].tolist())

    def generate(self) -> None:
        text = self.draw(self.talk().text if self.talks and self.random.random() < 0.5 else ())
        assert self.ask(text) == self.own.continued(text, NEW)

    def generate_batch(self) -> None:
        rows = [self.draw(), self.draw(self.talk().text if self.talks else ())]
        width = max(map(len, rows))
        ids = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = self.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        for row, answer in zip(rows, found[:, width:].tolist(), strict=True):
            assert (*row, *answer) == self.own.continued(row, NEW)

    def new_session(self) -> None:
        if len(self.talks) > 2:
            self.talks.pop(0).session.close()
        name = f"{len(self.steps)}"
        self.talks.append(Talk(self.attachment.cache.session(name), ()))
        self.feed(self.talks[-1], self.draw())

    def forward(self) -> None:
        talk = self.talk()
        self.feed(talk, self.random.choice(PIECES))

    def feed(self, talk: Talk, new: Text) -> None:
        with torch.no_grad():
            logits = self.model(torch.tensor([new]), **over(talk.session), use_cache=True).logits[0]
        whole = (*talk.text, *new)
        assert torch.allclose(logits, self.own.logits(whole)[len(talk.text) :], atol=2e-3, rtol=1e-3)
        talk.text = whole
        assert talk.session.get_seq_length() == len(whole)

    def generate_in_session(self) -> None:
        talk = self.talk()
        self.write(talk, self.draw(talk.text))

    def new_text(self) -> None:
        if self.talks:
            self.write(self.talk(), self.draw())

    def write(self, talk: Talk, text: Text, **options: Any) -> None:
        """Generate through a session; what was written before an error is held."""
        whole = self.own.continued(text, NEW)
        try:
            assert self.ask(text, **over(talk.session), **options) == whole
        finally:
            self.settle(talk, whole)

    def fork(self) -> None:
        talk = self.talk()
        if len(self.talks) < 4:
            self.talks.append(Talk(talk.session.fork()[0], talk.text))

    def truncate(self) -> None:
        talk = self.talk()
        count = self.random.randint(0, len(talk.text))
        talk.session.truncate(count)
        talk.text = talk.text[:count]

    def crop(self) -> None:
        talk = self.talk()
        if not talk.text:
            return  # before transformers 5, crop(0) keeps nothing
        count = self.random.randint(1, min(4, len(talk.text)))
        talk.session.crop(-count)
        talk.text = talk.text[: len(talk.text) - count]

    def evict(self) -> None:
        self.attachment.cache.clear()

    def cancel_forward(self) -> None:
        """A pass that ends in the middle of a layer never happened."""
        talk = self.talk()
        part = self.model.model.layers[self.random.randrange(2)].mlp

        def cancel(*args: Any) -> None:
            raise CancelledError

        vars(part)["forward"] = cancel
        try:
            with pytest.raises(CancelledError), torch.no_grad():
                self.model(torch.tensor([self.random.choice(PIECES)]), **over(talk.session))
        finally:
            del vars(part)["forward"]
        assert talk.session.get_seq_length() == len(talk.text)
        self.feed(talk, self.random.choice(PIECES))

    def cancel_generate(self) -> None:
        """What was written before the end is held, and goes on."""
        talk = self.talk()
        text = self.draw(talk.text)
        stop = LogitsProcessorList([CancelAt(self.random.randint(0, NEW - 1))])
        with pytest.raises(CancelledError):
            self.write(talk, text, logits_processor=stop)
        if talk.text:
            self.feed(talk, self.random.choice(PIECES))


def play(name: str, seed: int) -> tuple[int, int]:
    """Play one sequence; return how many tokens were found, and how many pages evicted.

    A failure names its seed and the calls up to it.
    """
    own = reference(name)
    room = KVCacheConfig(max_tokens=64, block_size=own.layout.block_size)
    with Attachment(own.twin, KVCache(room, layout=own.layout), own.route, "test").install() as attachment:
        player = Player(own, attachment, seed)
        try:
            player.play()
        except Exception as error:
            error.add_note(f"play({name!r}, {seed}): {' -> '.join(player.steps)}")
            raise
        statistics = attachment.cache.get_stats()
        return statistics["cached_tokens"], statistics["evicted_pages"]


@pytest.mark.filterwarnings("ignore:generate runs without the cache")  # where there are no pages left
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("name", MODELS)
def test_every_answer_in_a_random_sequence_of_calls_is_the_models_own(name: str, block: int) -> None:
    place = list(MODELS).index(name) * BLOCKS + block
    each = len(MODELS) * BLOCKS
    found, evicted = zip(*(play(name, seed) for seed in range(place, SEQUENCES, each)), strict=True)
    assert sum(found) > 1000
    assert sum(evicted) > 50
