"""The questions of ``kvhybrid bench``: first tokens, decode steps and whole answers, with us and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.cache_utils import DynamicCache, StaticCache

from kvhybrid.cli.bench_model import OURS, Bench, Comparison
from kvhybrid.errors import KVHybridError
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.model.attach import Attachment

UNTOUCHED: Final = "no reuse"
BY_HAND: Final = "DynamicCache kept by hand"
NEW: Final = 64
"""Tokens behind a shared prefix, of a prompt that nobody has sent, and of its answer."""
PEERS_FAIL: Final = (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError, IndexError)
"""What transformers' caches raise for models that they do not serve: that way is left out, and said so."""


def first_token(bench: Bench, prefix: int) -> Comparison:
    """Time to the first token behind a prefix that somebody else has sent: ``NEW`` tokens are new."""
    shared = bench.prompt(prefix)
    plain = bench.twin()
    tokens: dict[str, list[int]] = {OURS: [], BY_HAND: []}
    left_out: dict[str, str] = {}
    kept = DynamicCache(config=plain.config)
    text = torch.cat([shared, bench.prompt(NEW)], dim=1)
    with bench.attached(prefix + (bench.rounds + 3) * 2 * NEW) as attachment:
        bench.answer(attachment.model, shared, 1)

        def ours() -> None:
            nonlocal text
            text = torch.cat([shared, bench.prompt(NEW)], dim=1)
            tokens[OURS] += bench.answer(attachment.model, text, 1)

        def by_hand() -> None:
            tokens[BY_HAND] += bench.answer(plain, text, 1, **over(kept))
            kept.crop(-NEW)

        calls = {OURS: ours, BY_HAND: by_hand}
        ours()
        try:
            with torch.inference_mode():
                plain(shared, **over(kept), use_cache=True)
            by_hand()
        except PEERS_FAIL as error:
            left_out[BY_HAND] = _reason(error)
            del calls[BY_HAND], tokens[BY_HAND]
        seconds = bench.turns(calls, bench.rounds)
        alone: list[int] = []
        seconds |= bench.turns({UNTOUCHED: lambda: alone.extend(bench.answer(plain, text, 1))}, 1)
    equal = all(found == tokens[OURS] for found in tokens.values()) and tokens[OURS][-1:] == alone
    title = f"First token behind {prefix:,} shared tokens, {NEW} of its own"
    return Comparison(name="first_token", title=title, seconds=seconds, equal=equal, left_out=left_out)


def decode_step(bench: Bench, context: int) -> Comparison:
    """Time of one decode step behind ``context`` tokens, full pages and quantized ones."""
    ids = bench.prompt(context)
    token = ids[:, -1:]
    room = context + bench.rounds + 8
    left_out: dict[str, str] = {}
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    attachments: list[Attachment] = []
    # Budgets that hold the text: with bits, not in full precision alone.
    ours = {OURS: (16, room), f"{OURS}, 8 bits": (8, room + 512), f"{OURS}, 4 bits": (4, room + 512)}
    theirs = {"DynamicCache": DynamicCache, "StaticCache": StaticCache}

    def way(model: Any, cache: object) -> Callable[[], torch.Tensor]:
        @torch.inference_mode()
        def step(new: torch.Tensor = token) -> torch.Tensor:
            logits: torch.Tensor = model(new, **over(cache), use_cache=True).logits
            return logits[0, -1]

        step(ids)
        return step

    try:
        for name, kind in theirs.items():
            plain = bench.twin()
            more = {"max_cache_len": room} if kind is StaticCache else {}
            try:
                calls[name] = way(plain, kind(config=plain.config, **more))
            except PEERS_FAIL as error:
                left_out[name] = _reason(error)
        for name, (bits, budget) in ours.items():
            try:
                attachment = bench.attached(budget, bits)
                attachments.append(attachment)
                calls[name] = way(attachment.model, attachment.cache.session("bench"))
            except KVHybridError as error:
                if name == OURS:
                    raise
                left_out[name] = _reason(error)
        first = {name: int(call().argmax()) for name, call in calls.items()}
        seconds = bench.turns(calls, bench.rounds)
    finally:
        for attachment in attachments:
            attachment.detach()
    equal = len({token for name, token in first.items() if "bits" not in name}) == 1
    title = f"A decode step behind {context:,} tokens"
    return Comparison(name=f"step_{context}", title=title, seconds=seconds, equal=equal, left_out=left_out)


def whole_answer(bench: Bench) -> Comparison:
    """Time of ``generate`` for a prompt that nobody has sent before, and for the same one again."""
    again = f"{OURS}, the same again"
    plain = bench.twin()
    tokens: dict[str, list[list[int]]] = {OURS: [], UNTOUCHED: [], again: []}
    with bench.attached((bench.rounds + 2) * 3 * NEW) as attachment:
        ids = bench.prompt(NEW)

        def ask(way: str, model: Any) -> Callable[[], None]:
            return lambda: tokens[way].append(bench.answer(model, ids, NEW))

        def ours() -> None:
            nonlocal ids
            ids = bench.prompt(NEW)
            tokens[OURS].append(bench.answer(attachment.model, ids, NEW))

        calls = {OURS: ours, UNTOUCHED: ask(UNTOUCHED, plain), again: ask(again, attachment.model)}
        bench.turns(calls, 1)
        seconds = bench.turns(calls, bench.rounds)
    equal = tokens[OURS] == tokens[UNTOUCHED] == tokens[again]
    title = f"generate: {NEW} new tokens in, {NEW} out"
    return Comparison(name="generate", title=title, seconds=seconds, equal=equal)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
