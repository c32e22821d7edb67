"""How a measurement is taken and what it says of itself: machine, versions, one JSON object of figures."""

import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

VERSIONED = ("kvhybrid", "torch", "transformers", "numpy")
"""Distributions whose versions go into a report when they are installed."""

INSTRUCTION_SETS = re.compile(r"^(avx\w*|amx\w*|fma|f16c|sse4_2|sha_ni|asimd\w*|sve\w*|neon|bf16|i8mm)$")


class Machine(TypedDict):
    """Where a figure was measured."""

    cpu: str
    instruction_sets: list[str]
    cores: int
    system: str


def machine() -> Machine:
    """Describe the processor: model, instruction sets that matter to the kernels, cores we may use."""
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n", 1)[0]
        info = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in first.splitlines())
        }
    flags = (info.get("flags") or info.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=sorted(flag for flag in flags if INSTRUCTION_SETS.match(flag)),
        cores=cores,
        system=f"{platform.system()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the distributions that decide a figure."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run the calls in turns and return each one's median time in seconds: noise falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def write_report(bench: str, figures: Mapping[str, float], json_path: str | None) -> None:
    """Write the figures as JSON to ``json_path`` (``-``: stdout), or, when it is ``None``, as a table."""
    report = {"bench": bench, "machine": machine(), "versions": versions(), "figures": dict(figures)}
    if json_path == "-":
        sys.stdout.write(json.dumps(report) + "\n")
        return
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    here = machine()
    sys.stdout.write(f"{bench}: {here['cpu']}, {here['cores']} cores\n")
    sys.stdout.write("  " + ", ".join(f"{name} {version}" for name, version in versions().items()) + "\n")
    width = max((len(name) for name in figures), default=0)
    for name, value in figures.items():
        sys.stdout.write(f"  {name:<{width}}  {value:>14,.3f}\n")
