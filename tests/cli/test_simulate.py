"""``kvhybrid simulate``: recency replayed by the core is recency counted naively, and bad input is one line.

Where the recorded traces are at hand (in ``KVHYBRID_TRACES``, or beside the repository in
``shared/traces``), they are replayed, too.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from kvhybrid._core import Replay
from kvhybrid.cli.app import app
from kvhybrid.cli.traces import read_trace

if TYPE_CHECKING:
    from click.testing import Result

HERE = Path(__file__).parent
SYNTHETIC = HERE / "synthetic_chat.jsonl"
RECORDED = Path(os.environ.get("KVHYBRID_TRACES", HERE.parents[2] / "shared" / "traces"))

runner = CliRunner()


def simulate(*arguments: object) -> Result:
    return runner.invoke(app, ["simulate", *map(str, arguments)])


def outcomes(*arguments: object) -> list[dict[str, Any]]:
    result = simulate(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def prompts(path: Path, *, full_blocks_only: bool, join: int) -> list[list[int]]:
    header, *requests = map(json.loads, path.read_text().splitlines())
    paths = []
    for request in requests:
        pairs = zip(request["h"][::2], request["h"][1::2], strict=True)
        blocks = [first + i for first, count in pairs for i in range(count)]
        if full_blocks_only:
            blocks = blocks[: request["in"] // header["block_tokens"]]
        paths.append(blocks[join - 1 :: join])
    return paths


def naive_lru(paths: list[list[int]], capacity: int) -> tuple[int, int]:
    """Hits and references: deepest block oldest, a request's own blocks never victims."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = references = 0
    for path in paths:
        references += len(path)
        cached = 0
        while cached < len(path) and path[cached] in order:
            cached += 1
        hits += cached
        kept = path[:capacity]
        for block in reversed(kept):
            order.pop(block, None)
        while len(order) + len(kept) > capacity:
            order.popitem(last=False)
        order.update((block, None) for block in reversed(kept))
    return hits, references


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("join", [1, 3])
def test_lru_is_recency_to_the_last_hit(full: bool, join: int) -> None:
    paths = prompts(SYNTHETIC, full_blocks_only=full, join=join)
    sizes = [1, 2, 7, 30, 100, 333, 5000]
    options = ["--full-blocks-only"] if full else []
    found = outcomes(SYNTHETIC, "--join", join, "--size", ",".join(map(str, sizes)), *options)
    assert [row["size"] for row in found] == sizes
    for row, size in zip(found, sizes, strict=True):
        hits, references = naive_lru(paths, size)
        assert (row["hits"], row["references"]) == (hits, references)
        assert row["hit_ratio"] == pytest.approx(100 * hits / references)
        assert (row["trace"], row["policy"], row["requests"]) == ("synthetic_chat", "lru", len(paths))
        assert row["seconds"] > 0
    assert 0 < found[2]["hits"] < found[-1]["hits"]


def test_fractions_are_of_the_different_blocks() -> None:
    unique = read_trace(SYNTHETIC).trace.num_unique
    found = outcomes(SYNTHETIC, "--size", "0.1", "--size", "10%,1.0")
    assert [row["blocks"] for row in found] == [round(unique / 10), round(unique / 10), unique]


# As the reference simulator prints them: size, hit ratio with five digits.
REFERENCE = {
    "mooncake_conversation_h1.jsonl.gz": (
        ["--full-blocks-only"],
        {
            0.001: 0.04087,
            0.01: 0.04474,
            0.02: 0.05294,
            0.05: 0.10722,
            0.1: 0.20360,
            0.25: 0.30670,
            0.5: 0.34992,
        },
    ),
    "claude_code_a.jsonl.gz": (["--join", 8], {0.005: 0.14226, 0.01: 0.42178, 0.02: 0.76179, 0.05: 0.93347}),
    "arc_oltp.txt.gz": ([], {0.01: 0.41640, 0.1: 0.66521}),
    "cache2k_web07.txt.gz": ([], {0.001: 0.21320, 0.01: 0.39166, 0.1: 0.55665, 0.5: 0.69199}),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_recorded_traces_give_the_reference_figures(name: str) -> None:
    if not (RECORDED / name).exists():
        pytest.skip("the recorded traces are not at hand")
    options, expected = REFERENCE[name]
    found = outcomes(RECORDED / name, *options, "--size", ",".join(map(str, expected)))
    assert {row["size"]: round(row["hit_ratio"] / 100, 5) for row in found} == expected


@pytest.mark.parametrize("name", ["mooncake_conversation_h1.jsonl.gz", "cache2k_web07.txt.gz"])
def test_on_recorded_traces_the_learned_order_is_nowhere_far_below_recency(name: str) -> None:
    if not (RECORDED / name).exists():
        pytest.skip("the recorded traces are not at hand")
    sizes = ["--size", "0.1%,1%,5%,25%,50%"]
    found = outcomes(RECORDED / name, *REFERENCE[name][0], *sizes, "--policy", "lru,adaptive")
    recent, learned = ([row["hit_ratio"] for row in found if row["policy"] == p] for p in ("lru", "adaptive"))
    assert all(ours >= theirs - 0.2 for ours, theirs in zip(learned, recent, strict=True))
    assert learned[1] > recent[1] + 2.5
    assert learned[2] > recent[2] + 4


def test_a_flat_trace_is_one_block_a_request(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt.gz"
    path.write_bytes(gzip.compress(b'{"name": "keys", "flat": true}\n1\n2\n1\n3\n2\n'))
    (row,) = outcomes(path, "--size", 2)
    assert (row["requests"], row["hits"], row["references"]) == (5, 1, 5)


def test_the_plot_has_a_curve_for_each_trace_and_policy(tmp_path: Path) -> None:
    result = simulate(
        SYNTHETIC, "--size", "1%,10%,1.0", "--plot", tmp_path / "p.svg", "--json", tmp_path / "j"
    )
    assert result.exit_code == 0, result.output
    root = ET.fromstring((tmp_path / "p.svg").read_text())
    (curve,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(curve.attrib["points"].split()) == 3
    assert len(json.loads((tmp_path / "j").read_text())) == 3


def test_rows_stand_on_one_line_in_a_narrow_terminal(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "long.txt.gz"
    name = b"a trace whose name takes most of the line it stands on"
    path.write_bytes(gzip.compress(b'{"name": "%s", "flat": true}\n1\n2\n1\n' % name))
    result = simulate(path, "--policy", "lru,paged,adaptive", "--size", "100%")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if "33.333 %" in line]
    assert [row[0] for row in rows] == ["lru", "paged", "adaptive"]


HEADER = b'{"name": "x", "block_tokens": 16}\n'
GOOD = b'{"t": 0, "in": 32, "out": 1, "h": [0, 2]}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1"),
        (b"not json\n", "line 1"),
        (b'{"name": "x"}\n', "block_tokens"),
        (HEADER, "no requests"),
        (HEADER + GOOD + b"{}\n", "line 3"),
        (HEADER + GOOD + b'{"t": 0, "in": 32, "h": [5, 1, 1, 1]}\n', "block 1 follows another block"),
        (HEADER + b'{"t": 0, "in": -1, "h": [5, 1]}\n', "no request"),
        (HEADER + b'{"t": 0, "in": 1, "h": [-5, 1]}\n', "no run of blocks"),
        (HEADER + b'{"t": 0, "in": 1, "h": [5]}\n', "pairs"),
        (HEADER + b'{"t": 0, "in": 1, "h": [1e99, 1]}\n', "line 2"),
        (gzip.compress(HEADER + 400 * GOOD)[:-9], "EOFError"),
    ],
)
def test_what_is_no_trace_is_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    result = simulate(path)
    assert result.exit_code == 2
    assert said in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("size", ["0", "0.0", "-3", "1.5", "200%", "many", "nan", ""])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    result = simulate(SYNTHETIC, f"--size={size}")
    assert result.exit_code == 2
    assert "must be a fraction" in result.output


def test_policies_that_are_none_are_refused() -> None:
    result = simulate(SYNTHETIC, "--policy", "fifo")
    assert result.exit_code == 2
    assert "fifo" in result.output


def test_a_trace_that_is_replayed_takes_no_more_requests() -> None:
    workload = read_trace(SYNTHETIC)
    replay = Replay(workload.trace, 10)
    assert replay.advance(5) == 5
    with pytest.raises(RuntimeError, match="complete"):
        workload.trace.extend(memoryview(b"").cast("q"), memoryview(b"").cast("q"))
    assert replay.advance(10**9) == len(workload.trace)
