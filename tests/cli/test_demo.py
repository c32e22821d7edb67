"""The commands as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvhybrid import __version__
from kvhybrid.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

runner = CliRunner()


def test_demo_shows_equal_texts_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    result = runner.invoke(app, ["demo", "--sessions", "2", "--turns", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "all three texts are equal" in result.output.replace("\n", " ")
    report = json.loads(file.read_text())
    assert report["bench"] == "demo"
    figures = report["figures"]
    assert figures["texts_equal"] == 1
    assert figures["tokens_reused"] > 0
    assert set(figures) == {
        "texts_equal",
        "tokens_reused",
        "ttft_speedup_vs_none",
        "ttft_speedup_vs_dynamic",
        "tokens_per_s",
    }


def test_json_on_standard_output_stands_alone() -> None:
    result = runner.invoke(app, ["demo", "--sessions", "1", "--turns", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"]["texts_equal"] == 1


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--model", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "nowhere" in result.output
    assert "Traceback" not in result.output


def test_chat_answers_each_line_and_says_what_was_reused() -> None:
    result = runner.invoke(
        app, ["chat", "--temperature", "0", "--max-length", "8"], input="Good morrow\nAnd thou?\n\n"
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("prompt tokens reused") == 2


def test_version_is_the_packages() -> None:
    assert __version__ in runner.invoke(app, ["--version"]).output


@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["chat", "--help"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "kvhybrid.cli", *command], capture_output=True, text=True, check=True
    ).stdout
    assert "Usage" in shown
