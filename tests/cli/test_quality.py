"""``kvhybrid quality`` as a person runs it: a table, figures, a plot, and clear words when there is none."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvhybrid.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

runner = CliRunner()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 40, encoding="utf-8")
    return path


def quality(text: Path, *options: str) -> Result:
    small = ("--prefix", "128", "--scored", "32", "--windows", "2")
    return runner.invoke(app, ["quality", "--text", str(text), *small, *options])


def test_the_table_names_every_codec_and_scorer_with_its_bytes(text: Path) -> None:
    result = quality(text)
    assert result.exit_code == 0, result.output
    for said in (
        "full precision",
        "int8",
        "int4",
        "streaming 0.5",
        "keydiff 0.125",
        "2 windows",
        "perplexity",
    ):
        assert said in result.output
    assert "tova" not in result.output


def test_json_stands_alone_and_eight_bits_cost_next_to_nothing(text: Path) -> None:
    result = quality(text, "--json", "-")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert 0.25 < figures["int8_bytes"] < 0.3  # of float32
    assert abs(figures["int8_change"]) < 1e-3
    assert figures["int8_divergence"] < figures["int4_divergence"]
    assert figures["int4_refused_pages"] == 0


def test_a_plot_is_drawn_where_it_is_asked_for(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    result = quality(text, "--plot", str(tmp_path / "costs.svg"))
    assert result.exit_code == 0, result.output
    assert "streaming" in (tmp_path / "costs.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_without_matplotlib_a_plot_is_refused_before_the_work(text: Path, tmp_path: Path) -> None:
    result = quality(text, "--plot", str(tmp_path / "costs.svg"))
    assert result.exit_code == 2
    assert "kvhybrid[plot]" in result.stderr


def test_a_text_that_is_too_short_or_a_prefix_that_is_too_long_is_said_in_a_line(text: Path) -> None:
    result = quality(text, "--prefix", "4090")
    assert result.exit_code == 2
    assert "4096 tokens at most" in result.stderr
    text.write_text("Too short.", encoding="utf-8")
    result = quality(text)
    assert result.exit_code == 2
    assert "a window takes 161" in result.stderr
    assert "Traceback" not in result.stderr
