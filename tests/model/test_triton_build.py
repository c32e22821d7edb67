"""The CUDA kernels compile to machine code for sm_80 and sm_90, on a machine without a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benches" / "peers" / "triton_build.py"
OLDEST = (3, 4)
REGISTERS = 255


def version_of_triton() -> tuple[int, ...]:
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


@pytest.mark.skipif(
    version_of_triton() < OLDEST,
    reason="no Triton, which comes with torch's wheels for CUDA on Linux, or one older than 3.4",
)
def test_the_kernels_compile_for_gpus_without_spilling(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", str(BENCH), "--quick", "--json", "-"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)["figures"]
    registers = {name: value for name, value in figures.items() if name.endswith("_registers")}
    spills = {name: value for name, value in figures.items() if name.endswith("_spills")}
    assert len(registers) == len(spills) >= 10
    for architecture in ("sm80", "sm90"):
        for kernel in ("full_own", "mixed_prefix", "mixed_own_extras", "merge"):
            assert any(architecture in name and kernel in name for name in registers)
    assert all(0 < value <= REGISTERS for value in registers.values())
    assert not any(spills.values()), spills
