"""A whole trace through the pool: 3,000 prompts of 64 conversations, the full cycle for each.

The trace is the fixed synthetic one on which the peers were measured: sessions by a Zipf law, four
shared system prompts, mean 7,402 tokens, into 16,384 pages of 16 with exact recency. It is written
by a tool that lies beside the repository and is skipped where that is absent. The ratio of hits is
part of the figure: a fast replay that caches less is not a fast replay.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cycle import Step
from report import arguments, write_report

from kvhybrid import _core

TRACE_TOOL = Path(__file__).resolve().parents[3] / "shared" / "tools" / "multi_turn_trace.py"
NUM_PAGES = 16_384
BLOCK_SIZE = 16

PUBLISHED = (
    ("vLLM 0.33", 675, 0.896),
    ("SGLang unified cache, Python core", 1_024, 0.895),
    ("SGLang RadixCache", 2_072, 0.895),
    ("SGLang unified cache, Rust core", 3_684, 0.895),
    ("mistral.rs (Rust, no interpreter)", 8_275, 0.895),
    ("TGI v3 radix (Rust, no interpreter)", 26_760, 0.896),
)
"""Requests per second and ratio of cached tokens, measured earlier on a loaded two-core Zen 4."""

Prompts = list[np.ndarray]


def read_trace(path: Path) -> Prompts:
    """Read ``u32 count, u32 lengths, u32 tokens`` and cut it into prompts."""
    words = np.fromfile(path, np.uint32)
    count = int(words[0])
    ends = np.cumsum(words[1 : count + 1])
    return np.split(words[count + 1 :], ends[:-1])


def replay(prompts: Prompts) -> tuple[list[float], float]:
    """Return microseconds of each request, and cached tokens / prompt tokens."""
    longest = max(len(prompt) for prompt in prompts)
    pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
    step = Step(pool, 1, longest, longest // BLOCK_SIZE + 1)
    clock = time.perf_counter_ns
    times = []
    gc.collect()
    gc.freeze()
    for prompt in prompts:
        start = clock()
        step.request(prompt)
        times.append((clock() - start) / 1_000)
    gc.unfreeze()
    counted = pool.statistics()
    return times, counted["cached_tokens"] / counted["queried_tokens"]


def main() -> None:
    """Write the trace, replay it, report the best of a few runs."""
    options = arguments(__doc__ or "").parse_args()
    if not TRACE_TOOL.exists():
        sys.stderr.write("skipped: the trace's generator is not beside this repository\n")
        write_report("replay", {}, options.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.bin"
        subprocess.run([sys.executable, TRACE_TOOL, trace], check=True, stdout=subprocess.DEVNULL)
        prompts = read_trace(trace)
    runs = [replay(prompts) for _ in range(3 if options.quick else 15)]
    rates = [len(times) / sum(times) * 1e6 for times, _ in runs]
    best = runs[rates.index(max(rates))][0]
    figures = {
        "requests_per_s": statistics.median(rates),
        "best_requests_per_s": max(rates),
        "hit_ratio": runs[0][1],
        "request_us": statistics.median(best),
        "request_p99_us": statistics.quantiles(best, n=100)[-1],
        "prompts": float(len(prompts)),
    }
    write_report("replay", figures, options.json)
    if options.json != "-":
        sys.stdout.write("published, on another day and a slower machine (requests/s, hit ratio):\n")
        for name, rate, ratio in PUBLISHED:
            sys.stdout.write(f"  {name:<36} {rate:>7,}  {ratio}\n")


if __name__ == "__main__":
    main()
