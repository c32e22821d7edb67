"""``kvhybrid bench``: what a user's own model takes with us and without, as tables and as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from kvhybrid.cache.quantized import record_bytes
from kvhybrid.cli.bench_model import BLOCK, Bench, Comparison
from kvhybrid.cli.bench_report import Facts, figures, show
from kvhybrid.cli.comparisons import decode_step, first_token, whole_answer
from kvhybrid.errors import ConfigError
from kvhybrid.model.load import load_model, load_weights
from kvhybrid.model.threads import in_own_thread
from kvhybrid.report import write_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

ROUNDS, QUICK_ROUNDS = 9, 3
SHARED, QUICK_SHARED = 2048, 256
CONTEXTS, QUICK_CONTEXTS = (64, 2048), (64, 256)
SPARE: Final = 256
"""Positions that new tokens and answers take beside prefix or context."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_bench(
    path: Path | None,
    *,
    device: str,
    dtype: str | None,
    prefix: int | None,
    contexts: list[int] | None,
    quick: bool,
    json_path: Path | None,
) -> bool:
    """Measure the model at ``path`` and print the tables. Returns whether all ways came to the same tokens.

    Tokens are compared in float32 alone: in fewer bits, equal sums may round otherwise. Raises what loading
    and attaching the model raise, and ``ConfigError`` for lengths that it does not take.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
    quiet = json_path is not None and str(json_path) == "-"
    console = Console(stderr=quiet)
    logging.disable_progress_bar()  # ours says more
    model = in_own_thread(_load, path, device, None if dtype is None else DTYPES[dtype])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) else None
    prefix = _length("prefix", prefix, QUICK_SHARED if quick else SHARED, longest)
    usual = QUICK_CONTEXTS if quick else CONTEXTS
    lengths = [_length("context", length, 0, longest) for length in contexts or ()]
    lengths = lengths or sorted({_length("context", None, length, longest) for length in usual})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("comparisons", total=2 + len(lengths))
        found, facts = in_own_thread(
            _measure,
            model,
            prefix,
            lengths,
            QUICK_ROUNDS if quick else ROUNDS,
            lambda: progress.advance(task),
        )
    show(console, found, facts)
    if json_path is not None:
        write_report("bench", figures(found, facts), str(json_path))
    return model.dtype != torch.float32 or all(comparison.equal for comparison in found)


def _load(path: Path | None, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model; what is asked of it are numbers, so that no tokenizer is needed."""
    if path is None:
        return load_model(device=device, dtype=dtype)[0]
    return load_weights(path, torch.device(device), dtype)


def _length(name: str, asked: int | None, usual: int, longest: int | None) -> int:
    """Return what was asked for, or what is usual and the model takes."""
    most = longest - SPARE if longest is not None else None
    if asked is None:
        return usual if most is None else max(1, min(usual, most))
    if most is not None and asked > most:
        raise ConfigError(
            f"{name}={asked}: the model takes {longest} tokens, {SPARE} are for what comes behind"
        )
    return asked


def _measure(
    model: PreTrainedModel, prefix: int, contexts: list[int], rounds: int, tick: Callable[[], object]
) -> tuple[list[Comparison], Facts]:
    bench = Bench(model, rounds)
    with bench.attached(16 * BLOCK) as attachment:
        layout = attachment.cache.layout
        sizes = {bits: record_bytes(layout, bits) / layout.block_size for bits in (8, 4)}
        facts: Facts = {
            "model": f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters",
            "route": str(attachment.route.value),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "bytes_per_token": layout.bytes_per_page / layout.block_size,
            "int8_bytes_per_token": sizes[8],
            "int4_bytes_per_token": sizes[4],
        }
    found = []
    steps: list[Callable[[], Comparison]] = [
        lambda: first_token(bench, prefix),
        *(lambda context=context: decode_step(bench, context) for context in contexts),
        lambda: whole_answer(bench),
    ]
    for step in steps:
        found.append(step())
        tick()
    return found, facts
