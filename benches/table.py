"""Run every bench, one after the other, and print the table of the project's README.

Its own process a bench, so that none warms another's caches or threads. Takes ``--quick`` for a smoke test.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"

# bench, what is measured, and its cell: figures by name, formatted; a row is left out when one is missing
ROWS = [
    (
        "replay",
        "conversations replayed from Python",
        "{requests_per_s:,.0f} requests/s, hit ratio {hit_ratio:.3f}",
    ),
    (
        "cycle",
        "bookkeeping of a request, cached, 128 / 32,768 tokens",
        "{hot_128_us:.1f} / {hot_32768_us:.1f} us",
    ),
    (
        "cycle",
        "the same, pool full, evicting",
        "{evicting_128_us:.1f} / {evicting_32768_us:.1f} us, {victim_us:.2f} us a victim",
    ),
    ("cycle", "bookkeeping of a decode step, 256 sequences", "{decode_256_us:.1f} us"),
    ("cycle", "bookkeeping of a cached block of 16", "{bytes_per_block:.0f} bytes"),
    (
        "ttft",
        "time to first token, {shared_tokens:,.0f} shared + {new_tokens:.0f} new, float32",
        "{f32_ours_ms:.0f} ms; no reuse {f32_none_ms:,.0f} ms; `DynamicCache` in place {f32_in_place_ms:.0f} ms",
    ),
    (
        "ttft",
        "the same, bfloat16",
        "{bf16_ours_ms:.0f} ms; no reuse {bf16_none_ms:,.0f} ms; `DynamicCache` in place {bf16_in_place_ms:.0f} ms",
    ),
    (
        "decode",
        "a decoded token at 8k of context, float32",
        "{f32_8k_ours_ms:.1f} ms; `DynamicCache` {f32_8k_dynamic_ms:.1f} ms; `StaticCache` {f32_8k_static_ms:.1f} ms",
    ),
    (
        "decode",
        "the same, bfloat16",
        "{bf16_8k_ours_ms:.1f} ms; `DynamicCache` {bf16_8k_dynamic_ms:.1f} ms; "
        "`StaticCache` {bf16_8k_static_ms:.1f} ms",
    ),
]


def run(bench: str, *, quick: bool) -> dict[str, Any]:
    """Run one bench and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(PEERS / f"{bench}.py"), "--json", str(report)]
        subprocess.run([*command, *(["--quick"] if quick else [])], check=True, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def render(reports: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, under a line that says where and when."""
    some = next(iter(reports.values()))
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    machine = some["machine"]
    lines = ["| measured | result |", "| --- | --- |"]
    for bench, what, cell in ROWS:
        if bench in reports:
            figures = reports[bench]["figures"]
            try:
                lines.append(f"| {what.format(**figures)} | {cell.format(**figures)} |")
            except KeyError:  # not measured on this machine: bfloat16 on a CPU that does not compute it
                continue
    today = datetime.datetime.now(tz=datetime.UTC).date()
    lines += ["", f"`make bench`, {today}: {machine['cpu']}, {machine['cores']} cores, {versions}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test, not a measurement")
    options = parser.parse_args()
    names = list(dict.fromkeys(bench for bench, _, _ in ROWS))
    reports = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        reports[name] = run(name, quick=options.quick)
    print(render(reports))


if __name__ == "__main__":
    main()
