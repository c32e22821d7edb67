"""``kvhybrid quality``: what fewer bits and fewer tokens cost a model on a text, as a table and a plot.

Knows names, shares of bytes and how to draw; measures nothing itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from kvhybrid.cache.compress.scorers import NEED_QUERIES
from kvhybrid.cache.compress.selection import kept_tokens
from kvhybrid.cache.measured import measure_layers
from kvhybrid.errors import ConfigError, UnsupportedError
from kvhybrid.model.load import load_model
from kvhybrid.model.perplexity import Compressed, Quality, Quantized, can_be_shortened, measure_quality
from kvhybrid.model.threads import in_own_thread
from kvhybrid.presets import CompressionScorer
from kvhybrid.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from kvhybrid.cache.codec import Codec
    from kvhybrid.cache.measured import MeasuredLayers

BLOCK: Final = 64
SHARES: Final = (0.75, 0.5, 0.25, 0.125)
"""Of the old tokens, where compression is asked about."""


class Point(NamedTuple):
    """One way of keeping less."""

    name: str
    family: str
    share: float
    """Of the bytes of full precision, everything counted."""
    quality: Quality


def run_quality(
    path: Path | None,
    text: Path,
    *,
    device: str,
    prefix: int,
    scored: int,
    windows: int,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Measure the model at ``path`` on a text; print a table, and write figures and a plot where asked.

    Raises what loading the model raises, and what ``measure_quality`` does.
    """
    figure = _figure() if plot is not None else None  # before minutes of work, not after
    quiet = json_path is not None and str(json_path) == "-"
    console = Console(stderr=quiet)
    logging.disable_progress_bar()  # ours says more
    model, tokenizer = in_own_thread(load_model, path, device=device)
    assert tokenizer is not None  # a model from a path or our own always has one
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and prefix + scored > longest:
        raise ConfigError(f"prefix={prefix} and scored={scored}: the model takes {longest} tokens at most")
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"], device="cpu")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = min(windows, max(0, len(ids) - prefix - scored - 1) // scored + 1)
        task = progress.add_task("windows", total=total)
        points = in_own_thread(_measure, model, ids, prefix, scored, windows, lambda: progress.advance(task))
    console.print(_table(points, prefix, scored, min(windows, total)))
    if json_path is not None:
        write_report("quality", _figures(points), str(json_path))
    if plot is not None:
        _draw(figure, points, plot)


def _measure(
    model: PreTrainedModel, ids: torch.Tensor, prefix: int, scored: int, windows: int, tick: Any
) -> list[Point]:
    shapes = measure_layers(model)
    families = {"int8": "codec", "int4": "codec"}
    changes: dict[str, Any] = {"int8": Quantized(8, BLOCK), "int4": Quantized(4, BLOCK)}
    shares = {name: _codec_share(shapes, change.codec) for name, change in changes.items()}
    if can_be_shortened(model):
        for scorer in CompressionScorer:
            if scorer not in NEED_QUERIES:
                for kept in SHARES:
                    name = f"{scorer} {kept}"
                    changes[name], families[name] = Compressed(scorer, kept), str(scorer)
                    shares[name] = kept_tokens(prefix, kept) / prefix
    found = measure_quality(
        model, ids, changes, prefix=prefix, scored=scored, windows=windows, batch_size=1, tick=tick
    )
    families["full precision"], shares["full precision"] = "codec", 1.0
    return [Point(name, families[name], shares[name], quality) for name, quality in found.items()]


def _codec_share(layers: MeasuredLayers, codec: Codec) -> float:
    """Return the bytes of a quantized page of all layers, in those of a full one."""
    full = records = 0
    for shape in layers.shapes:
        if shape is not None:
            widths = shape.head_dim + shape.value_head_dim
            full += shape.num_kv_heads * BLOCK * widths * layers.dtype.itemsize
            records += shape.num_kv_heads * (
                codec.key_bytes(shape.head_dim, BLOCK) + codec.value_bytes(shape.value_head_dim, BLOCK)
            )
    return records / full


def _table(points: list[Point], prefix: int, scored: int, windows: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=f"{windows:,} windows: {prefix:,} tokens kept as the row says, the next {scored:,} scored",
    )
    table.add_column("", no_wrap=True)
    for heading in ("bytes", "perplexity", "change", "divergence\nnats"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point.name,
            f"{point.share:.3f}",
            f"{point.quality.perplexity:.3f}",
            f"{100 * point.quality.change:+.3f} %",
            f"{point.quality.divergence:.2e}",
        )
    return table


def _figures(points: list[Point]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for point in points:
        name = point.name.replace(" ", "_")
        figures |= {
            f"{name}_perplexity": point.quality.perplexity,
            f"{name}_change": point.quality.change,
            f"{name}_divergence": point.quality.divergence,
            f"{name}_bytes": point.share,
            f"{name}_refused_pages": point.quality.refused_pages,
        }
    return figures


def _figure() -> Any:
    """Return an empty figure of matplotlib, which nothing else here needs."""
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    except ImportError as error:
        raise UnsupportedError("a plot needs matplotlib: pip install kvhybrid[plot]") from error


def _draw(figure: Any, points: list[Point], path: Path) -> None:
    """Draw divergence over bytes, a line a family; the format is the file name's."""
    axes = figure.subplots()
    for family in dict.fromkeys(point.family for point in points):
        line = [point for point in points if point.family == family and point.quality.divergence > 0]
        axes.plot(
            [point.share for point in line],
            [point.quality.divergence for point in line],
            marker="o",
            label=family,
        )
        for point in line:
            change = f"{100 * point.quality.change:+.2g} %"
            axes.annotate(
                change,
                (point.share, point.quality.divergence),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set(yscale="log", xlabel="bytes of K and V, full precision = 1", ylabel="divergence, nats a token")
    axes.set_title("What keeping less costs; beside the points: change of perplexity")
    axes.legend()
    figure.savefig(path)
