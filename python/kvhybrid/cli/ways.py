"""Three ways to hold the same conversations: no cache kept, one kept by hand a session, and the engine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from kvhybrid.config import KVCacheConfig
from kvhybrid.engine.engine import KVEngine
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvhybrid.cli.conversations import Conversations

BLOCK_SIZE = 16


@dataclass(kw_only=True)
class Way:
    """What one way of holding the conversations took and gave."""

    name: str
    ttfts: list[float] = field(default_factory=list)
    """Seconds to the first token of every turn."""
    seconds: float = 0.0
    asked: int = 0
    """Prompt tokens of all turns together."""
    reused: int = 0
    held_bytes: int = 0
    """K and V that are kept for the next turn, in bytes."""
    texts: list[list[int]] = field(default_factory=list)
    """The answers' token ids, turn by turn."""

    @property
    def ttft(self) -> float:
        """Mean seconds to the first token."""
        return statistics.fmean(self.ttfts)

    @property
    def slowest(self) -> float:
        """Seconds to the first token of the slowest turn."""
        return max(self.ttfts)

    @property
    def computed(self) -> int:
        """Prompt tokens that went through the model."""
        return self.asked - self.reused

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, waiting for the first included."""
        return sum(map(len, self.texts)) / self.seconds


@torch.inference_mode()
def run_by_hand(
    model: PreTrainedModel, work: Conversations, *, keep: bool, tick: Callable[[], object]
) -> Way:
    """Hold the conversations with a plain loop over ``forward``; ``keep`` one DynamicCache a session."""
    way = Way(name="kept by hand" if keep else "no reuse")
    caches: dict[int, DynamicCache] = {}
    transcripts, ends = work.transcripts(), end_tokens(model)
    for session, line in work.turns():
        transcript = transcripts[session]
        transcript += line
        cache = caches.get(session) if keep else None
        if cache is None:
            cache = caches[session] = DynamicCache(config=model.config)
        held = cache.get_seq_length()
        way.asked += len(transcript)
        way.reused += held
        start = time.perf_counter()
        fed, answer = transcript[held:], list[int]()
        while len(answer) < work.answer_tokens and not ends.intersection(answer):
            ids = torch.tensor([fed], device=model.device)
            logits = model(ids, **over(cache), use_cache=True, logits_to_keep=1).logits
            fed = [int(logits[0, -1].argmax())]
            answer += fed
            if len(answer) == 1:
                way.ttfts.append(time.perf_counter() - start)
        way.seconds += time.perf_counter() - start
        way.texts.append(answer)
        transcript += answer
        tick()
    way.held_bytes = sum(_bytes(cache) for cache in caches.values()) if keep else 0
    return way


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _bytes(cache: DynamicCache) -> int:
    return sum(int(side.nbytes) for layer in cache.layers for side in (layer.keys, layer.values))  # type: ignore[union-attr,misc]


async def run_through_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: Conversations,
    tick: Callable[[], object],
) -> Way:
    """Hold the conversations through an engine that is told nothing but each turn's whole prompt."""
    way = Way(name="kvhybrid")
    room = -(-work.total_tokens // BLOCK_SIZE) * BLOCK_SIZE
    config = KVCacheConfig(max_tokens=room, block_size=BLOCK_SIZE, _env_file=None)
    transcripts = work.transcripts()
    async with KVEngine(model, config, tokenizer=tokenizer) as engine:
        for session, line in work.turns():
            transcript = transcripts[session]
            transcript += line
            request = {
                "token_ids": transcript,
                "session_id": f"session {session}",
                "max_length": work.answer_tokens,
            }
            start = time.perf_counter()
            answer = await engine.process_request(request)
            way.seconds += time.perf_counter() - start
            way.ttfts.append(answer["time_to_first_token_ms"] / 1e3)
            way.asked += answer["prompt_tokens"]
            way.reused += answer["cached_tokens"]
            way.texts.append(list(answer["token_ids"]))
            transcript += answer["token_ids"]
            tick()
        way.held_bytes = int(engine.get_stats()["used_bytes"])
    return way
