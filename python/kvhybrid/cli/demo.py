"""``kvhybrid demo``: the same conversations three ways, their times side by side, their texts compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from kvhybrid.cli.conversations import Conversations, write_conversations
from kvhybrid.cli.ways import Way, run_by_hand, run_through_engine
from kvhybrid.model.load import load_model
from kvhybrid.model.threads import in_own_thread
from kvhybrid.report import write_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run_demo(path: Path | None, *, device: str, json_path: Path | None, sessions: int, turns: int) -> bool:
    """Run the demo and print its table. Returns whether all three texts are equal.

    Raises what loading the model raises.
    """
    quiet = json_path is not None and str(json_path) == "-"
    console = Console(stderr=quiet)
    logging.disable_progress_bar()  # ours says more
    model, tokenizer = in_own_thread(load_model, path, device=device)
    assert tokenizer is not None  # a model from a path or our own always has one
    work = write_conversations(model, tokenizer, sessions=sessions, turns=turns)
    with _progress(console) as progress:

        def ticker(name: str) -> Callable[[], object]:
            task = progress.add_task(name, total=work.num_turns)
            return lambda: progress.advance(task)

        none = in_own_thread(run_by_hand, model, work, keep=False, tick=ticker("no reuse"))
        kept = in_own_thread(run_by_hand, model, work, keep=True, tick=ticker("DynamicCache kept by hand"))
        ours = anyio.run(run_through_engine, model, tokenizer, work, ticker("kvhybrid"))
    equal = none.texts == kept.texts == ours.texts
    console.print(_table(none, kept, ours))
    console.print(_summary(work, ours, equal))
    if json_path is not None:
        figures = {
            "texts_equal": float(equal),
            "tokens_reused": float(ours.reused),
            "ttft_speedup_vs_none": none.ttft / ours.ttft,
            "ttft_speedup_vs_dynamic": kept.ttft / ours.ttft,
            "tokens_per_s": ours.tokens_per_s,
        }
        write_report("demo", figures, str(json_path))
    return equal


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("turns"),
        TimeElapsedColumn(),
        console=console,
    )


def _table(*ways: Way) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (
        "first token\nmean",
        "\nslowest",
        "\ntokens/s",
        "prompt tokens\ncomputed",
        "K and V\nkept",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for way in ways:
        table.add_row(
            way.name,
            f"{way.ttft * 1e3:.1f} ms",
            f"{way.slowest * 1e3:.1f} ms",
            f"{way.tokens_per_s:.0f}",
            f"{way.computed:,}",
            f"{way.held_bytes / 2**20:.1f} MiB",
        )
    return table


def _summary(work: Conversations, ours: Way, equal: bool) -> str:
    share = ours.reused / ours.asked
    verdict = "all three texts are equal" if equal else "[red]the texts differ[/]"
    return (
        f"{work.num_sessions} sessions of {work.num_turns // work.num_sessions} turns over an opening of "
        f"{len(work.opening):,} tokens.\n"
        f"{ours.reused:,} of {ours.asked:,} prompt tokens reused ({share:.0%}); {verdict} (greedy, float32)."
    )
