"""What compression costs the embedded model: perplexity by scorer and share kept, beside kvpress.

Held-out text in windows of 768 tokens, which are compressed, and the next 256, which are scored. Ours keeps
the first 4 and the last 32 tokens whatever their scores; kvpress, where it is installed, keeps as many tokens
and protects what each press protects by itself. A figure is the change of perplexity in percent: a model this
small, on verse, goes by what is near, so recency looks better here than it is; the divergence from its own
next tokens says how much has changed.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from report import arguments, write_report

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.compress.selection import kept_tokens
from kvhybrid.model.compression_quality import Setting, measure_compression
from kvhybrid.model.embedded_model import load_embedded_model
from kvhybrid.model.versions import over
from kvhybrid.presets import CompressionScorer

TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"
HELD_OUT = 0.9  # what lies behind this share of the text was not trained on
PREFIX, SCORED = 768, 256
KEPT = (0.75, 0.5, 0.25, 0.125)
BATCH = 4
PRESSES = {
    CompressionScorer.STREAMING: ("StreamingLLMPress", {}),
    CompressionScorer.KEYDIFF: ("KeyDiffPress", {}),
    CompressionScorer.LAGKV: ("LagKVPress", {}),
    CompressionScorer.KNORM: ("KnormPress", {}),
    CompressionScorer.SNAPKV: ("SnapKVPress", {"window_size": 32}),
    CompressionScorer.TOVA: ("TOVAPress", {}),
}


def held_out(path: Path) -> torch.Tensor:
    """Return the ids ``[tokens]`` of the part of the text that the model has not seen."""
    text = path.read_text(encoding="utf-8")
    _, tokenizer = load_embedded_model()
    ids: torch.Tensor = tokenizer(text[int(len(text) * HELD_OUT) :], return_tensors="pt")["input_ids"][0]
    return ids


def ours(ids: torch.Tensor, windows: int | None) -> dict[str, float]:
    """Return the change of perplexity in percent and the divergence, by scorer and share."""
    model, _ = load_embedded_model()
    room = 4 * BATCH * (PREFIX + SCORED + 64)
    config = KVCacheConfig(max_tokens=room, compression_scorer="snapkv", _env_file=None)
    settings = [Setting(scorer, kept) for scorer in CompressionScorer for kept in KEPT]
    with kvhybrid.attach(model, config=config) as attachment:
        found = measure_compression(
            attachment,
            ids,
            settings,
            prefix=PREFIX,
            scored=SCORED,
            windows=windows,
            batch_size=BATCH,
            tick=lambda: print(".", end="", file=sys.stderr, flush=True),
        )
    figures = {"whole_ppl": found["full precision"].perplexity}
    for setting in settings:
        name = figure(setting.scorer, setting.kept)
        figures[name] = 100 * found[str(setting)].change
        figures[divergence(name)] = found[str(setting)].divergence
    return figures


def figure(scorer: CompressionScorer, kept: float) -> str:
    """Name a figure: keydiff_125_ppl is KeyDiff at 0.125."""
    return f"{scorer.value}_{f'{kept:g}'.partition('.')[2]}_ppl"


def divergence(name: str) -> str:
    """Name the figure beside it: how far the next tokens are from those behind the whole text, in nats."""
    return f"{name.removesuffix('_ppl')}_kld"


@torch.inference_mode()
def theirs(ids: torch.Tensor, windows: int | None) -> dict[str, float]:
    """Return the same for kvpress; nothing where it is not installed."""
    try:
        import kvpress
    except ImportError as error:
        print(f"kvpress is left out: {error}", file=sys.stderr)
        return {}
    from transformers import DynamicCache

    model, _ = load_embedded_model()
    length = PREFIX + SCORED + 1
    rows = ids[: len(ids) // length * length].view(-1, length)[:windows]
    positions = torch.arange(PREFIX, length - 1)[None]

    def nats(press: Any) -> float:
        total = 0.0
        for batch in rows.split(BATCH):
            past = DynamicCache()
            if press is None:
                model(batch[:, :PREFIX], **over(past))
            else:
                with press(model):
                    model(batch[:, :PREFIX], **over(past))
            logits = model(batch[:, PREFIX:-1], **over(past), position_ids=positions).logits
            chosen = torch.log_softmax(logits.float(), -1).gather(-1, batch[:, PREFIX + 1 :, None])
            total -= float(chosen.double().sum())
        print(".", end="", file=sys.stderr, flush=True)
        return total / (len(rows) * SCORED)

    reference = nats(None)
    figures = {}
    for scorer, (name, options) in PRESSES.items():
        for kept in KEPT:
            # As many tokens as ours: kvpress counts those that go.
            removed = 1 - (kept_tokens(PREFIX, kept) + 0.5) / PREFIX
            press = getattr(kvpress, name)(removed, **options)
            figures[f"kvpress_{figure(scorer, kept)}"] = 100 * math.expm1(nats(press) - reference)
    return figures


def table(figures: dict[str, float]) -> str:
    """Return the figures as a table in Markdown: ours, kvpress's behind a stroke, our divergence."""
    lines = [
        f"| scorer | {' | '.join(f'{kept:g}' for kept in KEPT)} |",
        f"| --- |{' ---: |' * len(KEPT)}",
    ]
    for scorer in CompressionScorer:
        cells = []
        for kept in KEPT:
            name = figure(scorer, kept)
            cell = f"{figures[name]:+.2f} %"
            if (peer := figures.get(f"kvpress_{name}")) is not None:
                cell += f" / {peer:+.2f} %"
            cells.append(f"{cell}; {figures[divergence(name)]:.4f}")
        lines.append(f"| `{scorer.value}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and report figures or a table."""
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of docs/compression.md")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text whose last tenth is scored")
    options = parser.parse_args()
    if not options.text.exists():
        sys.stderr.write("skipped: the held-out text is not beside this repository\n")
        write_report("compression", {}, options.json)
        return
    ids = held_out(options.text)
    windows = BATCH if options.quick else None
    figures = ours(ids, windows) | theirs(ids, windows)
    print(file=sys.stderr)
    if options.table:
        print(table(figures))
    else:
        write_report("compression", figures, options.json)


if __name__ == "__main__":
    main()
