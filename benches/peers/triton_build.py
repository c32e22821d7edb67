"""Registers, spills and shared memory of the CUDA kernels, compiled here for sm_80 and sm_90; needs no GPU.

Every variant is what ``kvhybrid.model.triton.decode`` would launch for that shape, compiled by Triton down to
a cubin with the assembler in its wheel, and read back from that cubin. Spills are bytes of local memory a
thread; ``own`` is a step of one row, ``prefix`` one of eight rows over one prefix.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from report import arguments, write_report

from kvhybrid.cache.codec import Codec
from kvhybrid.cache.pages import PageTable
from kvhybrid.cache.step import Span

if TYPE_CHECKING:
    from kvhybrid.model.triton.decode import Launch

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
FORMATS = {"full": (), "int8": (8,), "int4": (4,), "mixed": (8, 4)}
PROCESSORS = 108
BLOCK = 64
KV_HEADS = 8
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) ")


class Shape(NamedTuple):
    """What a variant is compiled for."""

    dtype: str
    head_dim: int
    group: int
    format: str
    rows: str
    extras: bool = False
    """With a window, a soft cap and sinks."""


def shapes(*, quick: bool) -> list[Shape]:
    if quick:
        common = [Shape("bf16", 128, 4, "full", "own"), Shape("bf16", 128, 4, "mixed", "prefix")]
        return [*common, Shape("bf16", 128, 4, "mixed", "own", extras=True)]
    return [
        *(Shape(*of) for of in product(("bf16",), (64, 128), (1, 4, 8), FORMATS, ("own", "prefix"))),
        *(Shape(*of) for of in product(("bf16",), (256,), (4,), FORMATS, ("own", "prefix"))),
        *(Shape(*of) for of in product(("f32",), (64, 128, 256), (4,), FORMATS, ("own", "prefix"))),
        *(Shape("bf16", 128, 4, form, "own", extras=True) for form in FORMATS),
    ]


def launches_of(shape: Shape) -> dict[str, Launch]:
    """Return the attention and the merge of a step of that shape."""
    from kvhybrid.model.triton.decode import LayerPages, Records, launches
    from kvhybrid.model.triton.plan import DecodePlan

    dtype, dim = DTYPES[shape.dtype], shape.head_dim
    pages = torch.empty(8, KV_HEADS, BLOCK, dim, dtype=dtype)
    records = []
    for codec in map(Codec, FORMATS[shape.format]):
        sizes = codec.key_bytes(dim, BLOCK), codec.value_bytes(dim, BLOCK)
        records.append(
            Records(codec.bits, *(torch.empty(4, KV_HEADS, size, dtype=torch.uint8) for size in sizes))
        )
    rows = 8 if shape.rows == "prefix" else 1
    tables = [PageTable(torch.tensor([0, 1, 2, 3 + row])) for row in range(rows)]
    spans = [Span(0, row, 1, 3 * BLOCK + 5, table) for row, table in enumerate(tables)]
    window = 150 if shape.extras else None
    plan = DecodePlan.of(spans, BLOCK, window, torch.device("cpu"))
    heads = KV_HEADS * shape.group
    query = torch.empty(1, rows, heads, dim, dtype=dtype).transpose(1, 2)
    found = launches(
        plan,
        LayerPages(pages, pages, tuple(records)),
        query,
        torch.empty(1, rows, heads, dim, dtype=dtype),
        dim**-0.5,
        window=window,
        cap=30.0 if shape.extras else None,
        sinks=torch.empty(heads, dtype=dtype) if shape.extras else None,
        processors=PROCESSORS,
    )
    return {"attend": found[0], "merge": found[-1]}


def compiled(launch: Launch, architecture: int) -> Any:
    """Compile as a launch on that device would, specialised for the same arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if signature[name] != "constexpr" and aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def usage(kernel: Any) -> dict[str, int]:
    """Read what a thread and a program of it take out of the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(said.stdout)
    if found is None:
        raise SystemExit(f"cuobjdump says nothing of registers: {said.stdout}")
    registers, stack = map(int, found.groups())
    return {"registers": registers, "spills": stack, "memory_bytes": kernel.metadata.shared}


def markdown(figures: dict[str, int], names: list[str]) -> str:
    """Return one row a variant, groups together: their worst."""
    lines = [
        f"# CUDA kernels as compiled by Triton {importlib.metadata.version('triton')}",
        "",
        "Registers a thread, bytes of local memory a thread (spills) and bytes of shared memory a program,",
        "the worst of the groups named. `own`: one row; `prefix`: eight rows over one prefix; `mixed`: full",
        "precision, 8 and 4 bits by turns; `extras`: with a window, a soft cap and sinks. Written by",
        "`make cuda-kernels`, which needs no GPU.",
        "",
        "| kernel | sm_80 registers | spills | memory | sm_90 registers | spills | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(re.sub(r"_g\d+_", "_", name), []).append(name)
    for row, members in rows.items():
        groups = [found[1] for name in members if (found := re.search(r"_g(\d+)_", name))]
        label = row.replace("_", " ") + (f", group {', '.join(groups)}" if groups else "")
        cells = [
            max(figures[f"sm{architecture}_{name}_{what}"] for name in members)
            for architecture in (80, 90)
            for what in ("registers", "spills", "memory_bytes")
        ]
        lines.append(f"| {label} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table of docs/ to FILE")
    options = parser.parse_args()
    try:
        import triton  # noqa: F401 - asked for here, so that its absence is one line
    except ImportError:
        print("skipped: Triton is not installed", file=sys.stderr)
        return
    figures: dict[str, int] = {}
    names: dict[str, None] = {}
    for shape in shapes(quick=options.quick):
        extras = "_extras" if shape.extras else ""
        attend = f"{shape.dtype}_d{shape.head_dim}_g{shape.group}_{shape.format}_{shape.rows}{extras}"
        merge = f"{shape.dtype}_d{shape.head_dim}_merge{extras}"
        for kind, launch in launches_of(shape).items():
            name = attend if kind == "attend" else merge
            if name in names:
                continue
            names[name] = None
            for architecture in (80, 90):
                found = usage(compiled(launch, architecture))
                figures |= {f"sm{architecture}_{name}_{what}": value for what, value in found.items()}
    if options.markdown is not None:
        options.markdown.write_text(markdown(figures, list(names)), encoding="utf-8")
    write_report("triton_build", figures, options.json)


if __name__ == "__main__":
    main()
