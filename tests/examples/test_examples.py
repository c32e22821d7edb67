"""Every example runs as a user runs it, says what it saved, and gives the answers of the bare model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples"
# The program, the client it shows, the least share of the tokens that it must save.
EXAMPLES = [
    ("forks", "kvhybrid", 0.5),
    ("langchain_pipeline", "langchain_huggingface", 0.5),
    ("lm_eval_task", "lm_eval", 0.5),
    ("outlines_json", "outlines", 0.5),
    ("peft_adapters", "peft", 0.4),
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a program of the folder, which is on the path as for a script."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in [name for name, module in sys.modules.items() if is_ours(module)]:
        del sys.modules[name]


def is_ours(module: ModuleType) -> bool:
    return FOLDER in Path(getattr(module, "__file__", None) or "/").parents


def test_every_program_of_the_folder_is_run() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs == {name for name, _, _ in EXAMPLES}


def test_the_folders_page_names_every_program() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not [name for name, _, _ in EXAMPLES if f"{name}.py" not in page]


@pytest.mark.parametrize(("name", "client", "least"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_the_example_saves_tokens_and_changes_no_answer(
    load, capsys: pytest.CaptureFixture[str], name: str, client: str, least: float
) -> None:
    pytest.importorskip(client, reason=f"{client} is not installed: it is in the dependency group 'examples'")
    outcome = load(name).main()
    assert outcome.equal
    assert 0 < outcome.with_kvhybrid < outcome.plain
    assert 1 - outcome.with_kvhybrid / outcome.plain >= least
    printed = capsys.readouterr().out
    assert "the same answers" in printed
    assert f"{outcome.with_kvhybrid:,} with it" in printed
