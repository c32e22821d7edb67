"""An engine's own trace: replayable, and nothing in it but numbers."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from kvhybrid import KVCacheConfig, KVEngine
from kvhybrid.cli.app import app
from kvhybrid.cli.traces import read_trace
from kvhybrid.engine.recorder import Recorder

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4


def tokens(*blocks: int) -> bytes:
    return np.repeat(np.array(blocks, dtype=np.uint32), BLOCK).tobytes()


def lines(path: Path) -> list[dict]:
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return [json.loads(line) for line in text.splitlines()]


def test_equal_beginnings_get_equal_numbers_and_other_tenants_others(tmp_path):
    recorder = Recorder(tmp_path / "own.jsonl.gz", block_size=BLOCK)
    recorder.write(tokens(1, 2, 3), 5, "a")
    recorder.write(tokens(1, 2, 9, 9) + tokens(1)[:8], 6, "a")
    recorder.write(tokens(1, 2, 3), 7, "b")
    recorder.write(tokens(2), 7, "a")
    recorder.close()
    recorder.record(SimpleNamespace())  # closed: nothing is looked at
    header, *requests = lines(tmp_path / "own.jsonl.gz")
    assert (header["name"], header["block_tokens"]) == ("own", BLOCK)
    assert [request["h"] for request in requests] == [[0, 3], [0, 2, 3, 2], [5, 3], [8, 1]]
    assert [(request["in"], request["out"]) for request in requests] == [(12, 5), (18, 6), (12, 7), (4, 7)]
    assert len(read_trace(tmp_path / "own.jsonl.gz").trace) == 4


def test_what_is_forgotten_comes_back_as_another_block_and_the_trace_stays_one(tmp_path):
    recorder = Recorder(tmp_path / "own.jsonl", block_size=BLOCK, most_blocks=6)
    rng = np.random.default_rng(0)
    for _ in range(200):
        recorder.write(tokens(*np.cumsum(rng.integers(1, 3, rng.integers(1, 9)))), 1)
    recorder.close()
    assert read_trace(tmp_path / "own.jsonl").trace.num_unique > 6


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "own").write_text("mine")
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "own", block_size=BLOCK)
    assert (tmp_path / "own").read_text() == "mine"


async def test_an_engine_records_what_it_serves_without_its_text(tmp_path):
    path = tmp_path / "own.jsonl"
    async with KVEngine(config=KVCacheConfig(block_size=16, max_tokens=2048)) as engine:
        engine.record(path)
        text = "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him."
        for _ in range(2):
            answer = await engine.process_request({"text": text, "max_length": 3, "temperature": 0})
        engine.stop_recording()
        await engine.process_request({"text": "After it.", "max_length": 2})
    _, first, second = lines(path)
    assert first["h"] == second["h"] == [0, answer["prompt_tokens"] // 16]
    assert (second["in"], second["out"]) == (answer["prompt_tokens"], answer["completion_tokens"])
    assert first["t"] <= second["t"]
    assert "Romans" not in path.read_text()


def test_the_command_serves_a_file_of_requests(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    prompts.write_text('{"text": "To be, or not to be"}\n\n{"text": "To be", "max_length": 2}\n')
    result = CliRunner().invoke(app, ["record", str(prompts), str(out), "--max-length", "2"])
    assert result.exit_code == 0, result.output
    assert len(read_trace(out).trace) == 2
    prompts.write_text('{"text": "To be"}\nnothing\n')
    result = CliRunner().invoke(app, ["record", str(prompts), str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "line 2" in result.output.replace("\n", " ")
    assert not (tmp_path / "other").exists()
