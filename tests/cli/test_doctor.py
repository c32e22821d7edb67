"""``kvhybrid doctor`` as a person runs it: served, served another way, or refused with the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from families import make_model
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from kvhybrid.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

runner = CliRunner()


def doctor(model: torch.nn.Module | None, path: Path, *options: str) -> Result:
    if model is not None:
        model.save_pretrained(path)
    return runner.invoke(app, ["doctor", "--model", str(path), *options])


def test_the_embedded_model_is_served_over_pages() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for said in ("transformers", "LlamaForCausalLM", "3,072 bytes a token", "paged route", "ragged packing"):
        assert said in result.output


def test_json_stands_alone_and_has_every_finding(tmp_path: Path) -> None:
    result = doctor(make_model("mistral-window"), tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"machine", "versions", "model", "layout", "routes", "attach", "engine"}
    assert found["layout"]["layers"] == [{"layers": 3, "num_kv_heads": 2, "head_dim": 8, "value_head_dim": 8}]
    (trial,) = found["routes"]
    assert 0 <= trial["difference"] <= trial["allowed"]


def test_why_a_faster_route_is_not_taken_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6))
    result = doctor(model, tmp_path)
    assert result.exit_code == 0, result.output
    assert "materialised route: it does not attend through transformers' attention interface" in result.output
    assert "rowwise packing" in result.output


def test_a_refused_model_is_exit_code_1_and_its_reason(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    result = doctor(model, tmp_path)
    assert result.exit_code == 1
    assert "MambaForCausalLM" in result.output
    assert "state" in result.output
    assert "Traceback" not in result.output
    assert "refused" in json.loads(doctor(None, tmp_path, "--json").stdout)


def test_what_is_no_model_is_exit_code_1_and_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 16}')
    for path in (tmp_path, tmp_path / "nowhere"):
        result = doctor(None, path)
        assert result.exit_code == 1
        assert "refused" in result.output
        assert "Traceback" not in result.output
