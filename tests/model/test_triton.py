"""Attention over pages in Triton: its answers, in Triton's interpreter and on a GPU, and what it plans."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases
from triton_cases import CASES, Case

from kvhybrid.cache.codec import Codec
from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Span, Step
from kvhybrid.errors import LayoutError
from kvhybrid.layout import KVLayout
from kvhybrid.model.triton.attention import TritonAttention
from kvhybrid.model.triton.plan import LEAST_SHARED, DecodePlan

RANDOM = 16
# Of the largest number of the answer: what rounding weights and output to the dtype leaves.
LARGEST_ERROR = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with torch's wheels for CUDA, on Linux",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def answers(device: str, **environment: str) -> dict[str, dict[str, object]]:
    """Run every case in a process of its own: Triton asks for the interpreter when it is first imported."""
    # Older interpreters of Triton do what numpy has come to regret.
    warnings = ("-W", "error", "-W", "ignore::DeprecationWarning")
    program = [sys.executable, *warnings, triton_cases.__file__, str(RANDOM), device]
    done = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter needs an older numpy")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, object]]:
    path = os.pathsep.join(path for path in sys.path if Path(path).is_dir())
    return answers("cpu", TRITON_INTERPRET="1", PYTHONPATH=path)


@needs_triton
@pytest.mark.parametrize("name", [*CASES, *(f"random {n}" for n in range(RANDOM))])
def test_attention_over_pages_equals_exact_arithmetic(
    interpreted: dict[str, dict[str, object]], name: str
) -> None:
    found = interpreted[name]
    assert found["error"] <= LARGEST_ERROR[found["dtype"]]
    if name in CASES:
        assert found["shared"] == name.startswith("shared prefix")


def test_pages_on_a_cpu_are_not_for_triton() -> None:
    storage = PageStorage(KVLayout(num_layers=1, num_kv_heads=1, head_dim=8), 2)
    assert not TritonAttention.serves(storage)


def test_a_page_that_is_not_there_is_an_error_before_anything_is_read() -> None:
    storage = PageStorage(KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=32), 2)
    step = Step(storage, None, (span(0, 40, 1, [1, 2]),), torch.tensor([0]))
    step.mark_written(0)
    new = torch.zeros(1, 1, 1, 8)
    with pytest.raises(LayoutError, match="names page 2, there are 2"):
        TritonAttention(storage).attend(step, 0, new, new, new, 1.0)


@needs_triton
def test_a_model_over_shared_pages_gives_its_own_logits(interpreted: dict[str, dict[str, object]]) -> None:
    found = interpreted["model"]
    assert found["taken"] == 4 * found["layers"]
    assert found["error"] <= 1e-4


@needs_triton
def test_a_session_reads_pages_of_every_class(interpreted: dict[str, dict[str, object]]) -> None:
    found = interpreted["quantized"]
    assert found["int8"] > 0
    assert found["int4"] > 0
    assert found["error"] <= 2e-4


@needs_triton
@needs_cuda
def test_a_gpu_finds_the_same() -> None:
    found = answers("cuda")
    model, quantized = found.pop("model"), found.pop("quantized")
    assert quantized["error"] <= 1e-3
    assert model["error"] <= 1e-3
    assert model["taken"] == 4 * model["layers"]
    for name, of in found.items():
        assert of["error"] <= LARGEST_ERROR[of["dtype"]], name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (20, 13)])
def test_the_records_of_these_tests_are_the_codecs(bits: int, head_dim: int, value_dim: int) -> None:
    case = Case(head_dim=head_dim, value_dim=value_dim)
    records = triton_cases.records(case, bits, 3)
    keys, values = (torch.empty(3, 2, 16, width) for width in (head_dim, value_dim))
    Codec(bits).dequantize_keys(records.stored[0], None, keys)
    Codec(bits).dequantize_values(records.stored[1], None, values)
    assert torch.allclose(keys.double(), records.exact[0], atol=1e-5)
    assert torch.allclose(values.double(), records.exact[1], atol=1e-5)


def span(row: int, past: int, count: int, ids: list[int]) -> Span:
    return Span(row, 0, count, past, PageTable(torch.tensor(ids)))


def planned(*spans: Span, window: int | None = None) -> DecodePlan:
    return DecodePlan.of(spans, 32, window, torch.device("cpu"))


def test_a_row_alone_is_one_work_over_all_of_it() -> None:
    plan = planned(span(3, 40, 2, [7, 5]))
    assert plan.rows.tolist() == [[3, 40 * 0, 2, 40, 0, 7, 5]]
    assert plan.own.table.tolist() == [[0, 1, 0, 42]]
    assert plan.shared is None


def test_rows_of_one_prefix_become_neighbours_and_read_it_once() -> None:
    a, b, c = span(0, 70, 1, [1, 2, 3]), span(1, 65, 1, [9, 8, 7]), span(2, 100, 1, [1, 2, 4, 6])
    plan = planned(a, b, c)
    assert plan.rows[:, 0].tolist() == [0, 2, 1]
    assert plan.rows[:, 4].tolist() == [1, 1, 0]
    assert plan.shared is not None
    assert plan.shared.table.tolist() == [[0, 2, 0, 64]]
    assert plan.own.table.tolist() == [[0, 1, 64, 71], [1, 1, 64, 101], [2, 1, 0, 66]]


def test_a_page_that_is_being_written_is_nobody_elses() -> None:
    # The same page id in both rows, but one of them has its new token on it.
    plan = planned(span(0, 64, 1, [1, 2, 3]), span(1, 96, 1, [1, 2, 3, 4]))
    assert plan.shared is not None
    assert plan.shared.table.tolist() == [[0, 2, 0, 64]]


def test_a_short_prefix_is_read_by_each_row() -> None:
    assert LEAST_SHARED > 32
    assert planned(span(0, 40, 1, [1, 2]), span(1, 40, 1, [1, 3])).shared is None


def test_a_window_leaves_out_what_nobody_sees() -> None:
    plan = planned(span(0, 70, 1, [1, 2, 3]), span(1, 90, 2, [1, 2, 4]), window=10)
    assert plan.shared is None
    assert plan.own.table.tolist() == [[0, 1, 61, 71], [1, 1, 81, 92]]
