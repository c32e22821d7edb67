"""``kvhybrid simulate``: recorded workloads through the real core, for several sizes and policies."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from threading import Event
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvhybrid._core import Replay
from kvhybrid.cli.plot import plot_curves
from kvhybrid.cli.traces import Workload, read_trace
from kvhybrid.errors import ConfigError
from kvhybrid.presets import CacheStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

BATCH = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one size and policy are worth on one trace."""

    trace: str
    policy: str
    size: float
    blocks: int
    requests: int
    references: int
    hits: int
    hit_ratio: float
    seconds: float


def parse_size(text: str) -> float | int:
    """Return blocks for a whole number, and a fraction of the different blocks for ``0.05`` or ``5%``.

    Raises ``ConfigError``.
    """
    try:
        if text.endswith("%"):
            size: float | int = float(text[:-1]) / 100
        else:
            size = int(text) if text.isdecimal() else float(text)
    except ValueError:
        size = 0
    if size <= 0 or (isinstance(size, float) and not size <= 1):
        raise ConfigError(f"size={text!r}: must be a fraction in (0, 1], a percentage, or a number of blocks")
    return size


def parse_policy(text: str) -> str:
    """Return the policy's name. A replay has no pages to quantize: in it ``paged`` is ``lru``.

    Raises ``ConfigError`` for what is none.
    """
    names = [strategy.value for strategy in CacheStrategy]
    name = text.strip().lower()
    if name not in names:
        raise ConfigError(f"policy={text!r}: must be one of {', '.join(names)}")
    return name


def run_simulate(
    paths: Sequence[Path],
    *,
    policies: Sequence[str],
    sizes: Sequence[str],
    join: int,
    full_blocks_only: bool,
    json_path: Path | None,
    plot_path: Path | None,
    jobs: int | None = None,
) -> list[Outcome]:
    """Replay every trace with every policy at every size, print a table, and return what came out.

    Raises ``TraceError``, ``ConfigError`` and ``UnsupportedError``; nothing was replayed then.
    """
    asked = [parse_size(part) for text in sizes for part in text.split(",")]
    names = [parse_policy(part) for text in policies for part in text.split(",")]
    quiet = str(json_path) == "-"
    console = Console(stderr=quiet)
    with _progress(Console(stderr=True)) as progress:
        workloads = [_load(path, join, full_blocks_only, progress) for path in paths]
        works = [
            (
                workload,
                name,
                size,
                progress.add_task(f"{workload.name} {name} {size:g}", total=len(workload.trace)),
            )
            for workload in workloads
            for name in names
            for size in asked
        ]
        stop = Event()
        with ThreadPoolExecutor(jobs or _cores()) as pool:
            futures = [
                pool.submit(_replay, workload, name, size, partial(progress.advance, task), stop)
                for workload, name, size, task in works
            ]
            try:
                outcomes = [future.result() for future in futures]
            finally:
                stop.set()
    if not quiet:
        console.print(*_tables(outcomes))
    if json_path is not None:
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
        if quiet:
            sys.stdout.write(text)
        else:
            json_path.write_text(text, encoding="utf-8")
    if plot_path is not None:
        curves: dict[str, list[tuple[float, float]]] = {}
        for outcome in outcomes:
            curve = curves.setdefault(f"{outcome.trace}, {outcome.policy}", [])
            curve.append((outcome.blocks, outcome.hit_ratio))
        plot_path.write_text(plot_curves(curves, x="blocks", y="hit ratio, %"), encoding="utf-8")
    return outcomes


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(path: Path, join: int, full_blocks_only: bool, progress: Progress) -> Workload:
    task = progress.add_task(f"reading {path.name}", total=path.stat().st_size)
    workload = read_trace(
        path, join=join, full_blocks_only=full_blocks_only, tick=lambda read: progress.advance(task, read)
    )
    progress.remove_task(task)
    return workload


def _replay(
    workload: Workload, policy: str, size: float, tick: Callable[[float], object], stop: Event
) -> Outcome:
    trace = workload.trace
    blocks = size if isinstance(size, int) else max(1, int(size * trace.num_unique + 0.5))
    # More than there are different ones make no difference, but to the memory.
    replay = Replay(trace, min(blocks, trace.num_unique + 1), policy=policy)
    began, done, total = time.perf_counter(), 0, len(trace)
    step = max(BATCH, total // 200)
    while done < total and not stop.is_set():
        reached = replay.advance(step)
        tick(reached - done)
        done = reached
    return Outcome(
        trace=workload.name,
        policy=policy,
        size=size,
        blocks=blocks,
        requests=done,
        references=replay.references,
        hits=replay.hits,
        hit_ratio=100 * replay.hits / max(1, replay.references),
        seconds=time.perf_counter() - began,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<40}", markup=False),  # names are the file's own
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _tables(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    """Yield a table a trace: their names are long, and terminals are not wide."""
    for trace, group in itertools.groupby(outcomes, attrgetter("trace")):
        found = list(group)
        title = f"{trace}: {found[0].requests:,} requests, {found[0].references:,} blocks"
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("policy")
        for heading in ("size", "blocks", "hits", "hit ratio", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for outcome in found:
            table.add_row(
                outcome.policy,
                f"{outcome.size:,}" if isinstance(outcome.size, int) else f"{outcome.size:.3%}",
                f"{outcome.blocks:,}",
                f"{outcome.hits:,}",
                f"{outcome.hit_ratio:.3f} %",
                f"{outcome.seconds:.2f}",
            )
        yield table
