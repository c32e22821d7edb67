"""What a ladder of pages is worth: conversations kept warm in one byte budget, and what their words cost.

A crowd of conversations over one text takes turns, some of them more often than others; one that has gone
on for long enough ends, and another begins. Three caches with equal ``max_memory_mb`` serve the same turns:
LRU with whole pages, PAGED and ADAPTIVE with the ladder (full precision, 8 bits, 4 bits). Figures of each:

``*_hit_ratio``: prompt tokens that were cached, of all; ``*_warm_sessions``: conversations of which more than
half is cached at the end, of ``sessions``; ``*_bytes``: what the pages own; ``*_computed_tokens``: what had
to be computed; ``*_ppl``: change in percent of the perplexity of the turns' own words, against a model
without any cache; ``*_full_pages``, ``*_int8_pages``, ``*_int4_pages`` are in use at the end. Full pages are
bfloat16 unless ``--dtype`` says otherwise.

The text is the last tenth of the plays that the embedded model learnt the rest of.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvhybrid import KVCache, KVCacheConfig, attach
from kvhybrid.model.embedded_model import load_embedded_model
from kvhybrid.model.versions import over
from kvhybrid.report import write_report

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
SOURCE = "https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt"
# Tokens that a conversation begins with, of a turn, and when it ends.
OPENING, TURN, LONGEST = 192, 32, 480
# How much less often the n-th conversation takes a turn than the first: 1 / n to this.
SKEW = 0.6
# The part of a conversation that is cached where it is warm.
WARM = 0.5
LADDER = {"use_quantization": True, "quantization_bits": 4}
STRATEGIES: dict[str, dict[str, Any]] = {
    "lru": {"cache_strategy": "lru"},
    "paged": {"cache_strategy": "paged", **LADDER},
    "adaptive": {"cache_strategy": "adaptive", **LADDER},
}


class Size(NamedTuple):
    """How large a crowd, how many turns it takes, and the budget: room for about a quarter in whole pages."""

    sessions: int
    turns: int
    memory_mb: float


FULL, QUICK = Size(40, 800, 6), Size(16, 100, 2.5)


class Turn(NamedTuple):
    """A conversation, by place in the crowd and by name, and where its next tokens lie in the text."""

    place: int
    name: str
    start: int
    stop: int


def crowd(size: Size, num_tokens: int) -> list[Turn]:
    """Return who says what when; the same for every strategy."""
    chance = random.Random(0)
    weights = [(place + 1) ** -SKEW for place in range(size.sessions)]
    stretch, begun = num_tokens - LONGEST, 0
    running: dict[int, Turn] = {}
    turns = []
    for _ in range(size.turns):
        (place,) = chance.choices(range(size.sessions), weights)
        known = running.get(place)
        if known is None or known.stop + TURN > known.start + LONGEST:
            # A step that is prime to the length: beginnings lie all over the text, and no two are the same.
            start = begun * 7919 % stretch
            begun += 1
            turn = Turn(place, str(begun), start, start + OPENING)
        else:
            turn = known._replace(stop=known.stop + TURN)
        running[place] = turn
        turns.append(turn)
    return turns


@torch.no_grad()
def nats(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the negative log-likelihood of all but the first of ``ids``, told by the logits of them all."""
    chosen = logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])
    return -float(chosen.sum())


def new_tokens(turn: Turn) -> int:
    """Return how many tokens the turn adds: the first one of a conversation, its opening."""
    return OPENING if turn.stop - turn.start == OPENING else TURN


@torch.no_grad()
def uncached(model: Any, ids: torch.Tensor, turns: list[Turn]) -> list[float]:
    """Return what each turn costs the model alone, in nats."""
    found = []
    for turn in turns:
        text, count = ids[turn.start : turn.stop], new_tokens(turn)
        logits = model(text[None], use_cache=False).logits
        found.append(nats(logits[:, -count:], text[-count:]))
    return found


@torch.no_grad()
def serve(
    model: Any, ids: torch.Tensor, turns: list[Turn], config: KVCacheConfig
) -> tuple[list[float], KVCache]:
    """Return what each turn costs with this cache, and the cache."""
    cache = KVCache.for_model(model, config)
    attachment, found = attach(model, cache), []
    for turn in turns:
        text, count = ids[turn.start : turn.stop], new_tokens(turn)
        session = cache.session(turn.name)
        found.append(nats(model(text[None, -count:], **over(session)).logits, text[-count:]))
        # As behind a call of ``generate``: it remembers its tokens and holds no page.
        session.rows.release()
    attachment.detach()
    return found, cache


def measure(
    name: str, cache: KVCache, costs: list[float], alone: list[float], turns: list[Turn], ids: Any
) -> dict[str, float]:
    """Return one strategy's figures."""
    stats = cache.get_stats()
    last = {turn.place: turn for turn in turns}.values()
    texts = [ids[turn.start : turn.stop].numpy() for turn in last]
    warm = sum(cache.explain(text).cached >= WARM * len(text) for text in texts)
    scored = sum(new_tokens(turn) - 1 for turn in turns)
    asked = sum(turn.stop - turn.start for turn in turns)
    return {
        f"{name}_hit_ratio": stats["cached_tokens"] / asked,
        f"{name}_warm_sessions": warm,
        f"{name}_ppl": 100 * (math.exp((sum(costs) - sum(alone)) / scored) - 1),
        f"{name}_bytes": stats["capacity_bytes"],
        f"{name}_computed_tokens": asked - stats["cached_tokens"],
        f"{name}_int8_pages": stats["int8_pages"],
        f"{name}_int4_pages": stats["int4_pages"],
        f"{name}_full_pages": stats["full_tokens"] // cache.layout.block_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small crowd: a smoke test, not a measurement")
    parser.add_argument("--json", metavar="FILE", help="write one JSON object to FILE; - is stdout")
    parser.add_argument("--text", type=Path, default=TEXT, help=f"the plays ({SOURCE})")
    parser.add_argument("--dtype", default="bfloat16", help="of full pages: bfloat16, float16 or float32")
    options = parser.parse_args()
    if not options.text.is_file():
        print(f"skipped: no text at {options.text}; --text takes {SOURCE}", file=sys.stderr)
        write_report("ladder", {}, options.json)
        return
    whole = options.text.read_text(encoding="utf-8")
    model, tokenizer = load_embedded_model()
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(whole[int(0.9 * len(whole)) :]).ids)
    size = QUICK if options.quick else FULL
    turns = crowd(size, len(ids))
    alone = uncached(model, ids, turns)
    figures: dict[str, float] = {
        "sessions": len({turn.place for turn in turns}),
        "turns": len(turns),
        "budget_bytes": int(size.memory_mb * 2**20),
        "perplexity": math.exp(sum(alone) / sum(new_tokens(turn) - 1 for turn in turns)),
    }
    for name, fields in STRATEGIES.items():
        budget = {"max_tokens": size.sessions * LONGEST, "max_memory_mb": size.memory_mb}
        config = KVCacheConfig(**budget, **fields, dtype=options.dtype, _env_file=None)
        costs, cache = serve(model, ids, turns, config)
        figures |= measure(name, cache, costs, alone, turns, ids)
        cache.close()
    write_report("ladder", figures, options.json)


if __name__ == "__main__":
    main()
