"""``kvhybrid bench`` as a person runs it: tables, figures, what is left out, clear words for bad lengths."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from families import make_model
from typer.testing import CliRunner

from kvhybrid.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

runner = CliRunner()
SMALL = ("--quick", "--prefix", "70", "--context", "130")


def saved(tmp_path: Path, family: str) -> str:
    make_model(family).save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def test_the_tables_show_every_way_of_the_embedded_model() -> None:
    result = runner.invoke(app, ["bench", *SMALL])
    assert result.exit_code == 0, result.output
    for said in (
        "float32 on cpu, paged route",
        "K and V of a token: 3,072 bytes",
        "First token behind 70 shared tokens, 64 of its own",
        "A decode step behind 130 tokens",
        "generate: 64 new tokens in, 64 out",
        "DynamicCache kept by hand",
        "StaticCache",
        "kvhybrid, 4 bits",
        "kvhybrid, the same again",
    ):
        assert said in result.output
    assert "left out" not in result.output


def test_json_stands_alone_and_has_a_ratio_for_every_way(tmp_path: Path) -> None:
    result = runner.invoke(app, ["bench", *SMALL, "--model", saved(tmp_path, "llama"), "--json", "-"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    figures = report["figures"]
    assert report["bench"] == "bench"
    assert figures["first_token_vs_no_reuse"] > 0
    assert figures["step_130_vs_dynamiccache"] > 0
    assert figures["generate_equal"] == figures["first_token_equal"] == figures["step_130_equal"] == 1


def test_a_way_that_the_model_does_not_allow_is_left_out_with_the_reason(tmp_path: Path) -> None:
    result = runner.invoke(app, ["bench", *SMALL, "--model", saved(tmp_path, "mistral-window")])
    assert result.exit_code == 0, result.output
    assert "left out: DynamicCache kept by hand: " in result.output


def test_what_cannot_be_measured_is_said_in_a_line_before_the_work() -> None:
    for options, says in (
        (("--prefix", "4000"), "prefix=4000: the model takes 4096"),
        (("--context", "4000"), "context=4000: the model takes 4096"),
        (("--dtype", "int8"), "dtype='int8': one of float32, bfloat16, float16"),
    ):
        result = runner.invoke(app, ["bench", *options])
        assert result.exit_code == 2
        assert says in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr
