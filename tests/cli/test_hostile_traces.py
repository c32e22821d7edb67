"""Damaged and hostile traces, and numbers at the edges: a line that says what is wrong, never a traceback."""

import gzip
import json
import random
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from kvhybrid import ConfigError, TraceError
from kvhybrid._core import Replay, Trace
from kvhybrid.cli.app import app
from kvhybrid.cli.traces import read_trace

HEADER = {"name": "some", "block_tokens": 16, "partial_tail_block": True}
REQUESTS = [{"t": 10 * n, "in": 48, "out": 3, "h": [5 * n, 3]} for n in range(40)]


def write(path, header=HEADER, requests=REQUESTS, *, tail=b""):
    lines = [header if isinstance(header, bytes) else json.dumps(header).encode()]
    lines += [each if isinstance(each, bytes) else json.dumps(each).encode() for each in requests]
    path.write_bytes(b"\n".join(lines) + b"\n" + tail)
    return path


def simulate(*arguments):
    found = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "Traceback" not in found.output
    return found


REFUSED = {
    "a negative time": {"t": -1, "in": 48, "h": [0, 3]},
    "a time beyond 64 bits": {"t": 2**70, "in": 48, "h": [0, 3]},
    "no number": {"t": float("nan"), "in": 48, "h": [0, 3]},
    "an infinite time": {"t": float("inf"), "in": 48, "h": [0, 3]},
    "more blocks than tokens": {"t": 500, "in": 32, "h": [0, 10**8]},
    "many runs of more blocks": {"t": 500, "in": 32, "h": [0, 2**62] * 9},
    "half a run": {"t": 500, "in": 48, "h": [0]},
    "blocks that are text": {"t": 500, "in": 48, "h": "abc"},
    "no blocks": {"t": 500, "in": 48},
    "a prompt of text": {"t": 500, "in": "many", "h": [0, 3]},
    "a negative prompt": {"t": 500, "in": -48, "h": [0, 3]},
    "a prompt beyond 32 bits": {"t": 500, "in": 2**40, "h": [0, 3]},
    "a block of another prefix": {"t": 500, "in": 48, "h": [7, 1, 5, 2]},
    "a list": [1, 2, 3],
    "nested without end": b"[" * 100_000,
    "no JSON": b"\xff\xfe\x00",
    "markup": b"[/red][bold]",
}


@pytest.mark.parametrize("wrong", REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused_by_its_own_line(tmp_path, wrong):
    path = write(tmp_path / "trace.jsonl", requests=[*REQUESTS[:20], wrong, *REQUESTS[20:]])
    with pytest.raises(TraceError, match=r"line 22: "):
        read_trace(path)
    found = simulate(path)
    assert found.exit_code == 2
    assert len(found.output) < 1000


SIZES = [{"block_tokens": size} for size in (0, -1, 2**40, "many", None)]


@pytest.mark.parametrize("header", [b"", b"{}", b"[]", b"null", b"[" * 50_000, *SIZES])
def test_a_wrong_header_is_refused(tmp_path, header):
    with pytest.raises(TraceError):
        read_trace(write(tmp_path / "trace.jsonl", header))
    assert simulate(tmp_path / "trace.jsonl").exit_code == 2


def test_a_line_without_end_fills_no_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(json.dumps(HEADER).encode() + b"\n")
        for _ in range(40):
            file.write(b" " * (1 << 20))
    with pytest.raises(TraceError, match="line 2: longer than"):
        read_trace(path)


def test_damaged_files_are_read_or_refused(tmp_path):
    choice, whole = random.Random(6), write(tmp_path / "whole.jsonl").read_bytes()
    packed = gzip.compress(whole)
    outcomes = set()
    for turn in range(400):
        damaged = bytearray(packed if turn % 2 else whole)
        for _ in range(choice.randrange(1, 4)):
            damaged[choice.randrange(len(damaged))] ^= 1 << choice.randrange(8)
        if turn % 5 == 0:
            del damaged[choice.randrange(len(damaged)) :]
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        try:
            read_trace(path)
            outcomes.add("read")
        except TraceError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_refused_request_leaves_nothing_behind():
    trace = Trace(16)
    trace.extend(np.array([0, 48, 1, 2], "q"), np.array([1, 3], "q"))
    before = (len(trace), trace.num_references, trace.num_unique)
    for runs in ([7, 1, 2, 1], [8, 1, -1, 1], [9, 1, 2**62, 2**62], [1, 3, 1, 3]):
        with pytest.raises(ValueError, match="request 0"):
            trace.extend(np.array([0, 48, 1, len(runs)], "q"), np.array(runs, "q"))
        assert (len(trace), trace.num_references, trace.num_unique) == before
    # Blocks that a refused request had named are free to follow any other.
    trace.extend(np.array([0, 48, 1, 4], "q"), np.array([8, 1, 7, 1], "q"))
    assert len(trace) == 2


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_times_may_jump_to_the_end(tmp_path, policy):
    times = [0, 1, 10**14, 2**53, 2**62, 2**63 - 2, 2**63 - 1, 2**63 - 1]
    requests = [{"t": time, "in": 48, "h": [3 * n, 3]} for n, time in enumerate(times * 9)]
    workload = read_trace(write(tmp_path / "trace.jsonl", requests=requests))
    replay = Replay(workload.trace, 7, policy=policy)
    assert replay.advance(len(requests)) == len(requests)


@pytest.mark.parametrize("size", ["4294967296", "9" * 30, "0", "-1", "nan", "inf", "1e400", "%", "[/red]"])
def test_sizes_are_taken_or_refused(tmp_path, size):
    found = simulate(write(tmp_path / "trace.jsonl"), "--size", size)
    assert found.exit_code == (0 if size.isdecimal() and int(size) else 2)


@pytest.mark.parametrize("join", [0, -1, 2**20 + 1, 2**60, 2**64])
def test_joins_are_taken_or_refused(tmp_path, join):
    with pytest.raises((ConfigError, OverflowError)):
        read_trace(write(tmp_path / "trace.jsonl"), join=join)
    assert simulate(write(tmp_path / "trace.jsonl"), "--join", join).exit_code == 2


def test_names_are_no_markup(tmp_path):
    folder = tmp_path / "[bold]" / "[/red]"
    folder.mkdir(parents=True)
    path = write(folder / "[link=x]trace.jsonl", {**HEADER, "name": "[/red][blink]\ud800"})
    found = simulate(path)
    assert found.exit_code == 0
    assert "[/red][blink]" in re.sub(r"\s", "", found.output)
    assert simulate(folder / "[/nothing]").exit_code == 2
    assert simulate(folder).exit_code == 2


def test_what_is_recorded_here_is_read(tmp_path):
    path = write(tmp_path / "trace.jsonl")
    assert read_trace(path).num_requests == len(REQUESTS)
    assert read_trace(path, join=2).trace.num_unique == len(REQUESTS)
