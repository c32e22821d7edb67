"""Run every bench, one after the other, and print the table of the project's README.

Its own process a bench, so that none warms another's caches or threads. Takes ``--quick`` for a smoke test.
"""

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE / "peers"

# bench, what is measured, and its cell: figures by name, formatted; a row is left out when one is missing
TTFT = (
    "{{{0}_ours_ms:,.0f}} ms; no reuse {{{0}_none_ms:,.0f}}; `DynamicCache` in place {{{0}_in_place_ms:,.0f}}"
)
DECODE = (
    "{{{0}_8k_ours_ms:.1f}} ms; `DynamicCache` {{{0}_8k_dynamic_ms:.1f}}; "
    "`StaticCache` {{{0}_8k_static_ms:.1f}}"
)
REPRODUCIBLE = "{reproducible_prefill_ratio:.2f} times the usual in float32"
COLD = "{overhead_128:.3f} times the model's own time; 2,048 in: {overhead_2k:.3f}"
LAYER = "{layer8b_bf16_ours_us:,.0f} us; torch as called {layer8b_bf16_called_us:,.0f}"
CODEC = "{f32_int8_quantize_gb_per_s:.0f} / {f32_int8_dequantize_gb_per_s:.0f} GB/s"
LADDER = (
    "{lru_warm_sessions:.0f} / {paged_warm_sessions:.0f} / {adaptive_warm_sessions:.0f} of {sessions:.0f}; "
    "perplexity {paged_ppl:+.3f} / {adaptive_ppl:+.3f} %"
)
EVICTING = "{evicting_128_us:.1f} / {evicting_32768_us:.1f} us, {victim_us:.2f} us a victim"
ROWS = [
    ("replay", "conversations replayed", "{requests_per_s:,.0f} requests/s, hit ratio {hit_ratio:.3f}"),
    ("cycle", "a cached request, 128 / 32,768 tokens", "{hot_128_us:.1f} / {hot_32768_us:.1f} us"),
    ("cycle", "a new one, pool full", EVICTING),
    ("cycle", "a decode step of 256 sequences", "{decode_256_us:.1f} us"),
    ("ttft", "first token behind {shared_tokens:,.0f} shared, float32", TTFT.format("f32")),
    ("ttft", "the same, bfloat16", TTFT.format("bf16")),
    ("ttft", "a prefill of {reproducible_tokens:,.0f} with `reproducible`", REPRODUCIBLE),
    ("generate", "`generate`, 128 new tokens in, 64 out, attached", COLD),
    ("decode", "a token at 8k of context, float32", DECODE.format("f32")),
    ("decode", "the same, bfloat16", DECODE.format("bf16")),
    ("decode", "the same over pages of 8 / 4 bits", "{bf16_8k_int8_ms:.1f} / {bf16_8k_int4_ms:.1f} ms"),
    ("decode", "attention of one Llama-8B layer at 8k, bfloat16", LAYER),
    ("codec", "a page to 8 bits and back, float32", CODEC),
    ("evict", "a victim of 300,000 pages, learned order", "{victim_us_300k:.2f} us"),
    ("ladder", "conversations warm in equal bytes, LRU / PAGED / ADAPTIVE at 4 bits", LADDER),
]


def run(bench: str, *, quick: bool) -> dict[str, Any]:
    """Run one bench and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        script = next(path for place in (PEERS, HERE) if (path := place / f"{bench}.py").is_file())
        command = [sys.executable, str(script), "--json", str(report)]
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
            except KeyError:  # not measured here: no text, or bfloat16 on a CPU that does not compute it
                continue
    today = dt.datetime.now(tz=dt.UTC).date()
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
