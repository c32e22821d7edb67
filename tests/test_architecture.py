"""The rules of the house, checked on the sources: who imports whom, sizes, names, frozen classes.

Every check also asserts that it found something to check.
"""

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "kvhybrid"

# From the bottom up. A module imports from its own layer and from those below it.
LAYERS = [
    {"_core", "errors"},
    {"config", "config_sources", "layout", "model_shape", "presets", "report"},
    {"store"},
    {"cache"},
    {"model"},
    {"engine"},
    {"security", "monitor", "backup"},
    {"server", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Who may import what is not ours, by the first layer or the rooms that may.
ONLY_IN = {
    "anyio": {"engine", *LAYERS[-2], *LAYERS[-1]},
    "transformers": {"model", "engine", *LAYERS[-2], *LAYERS[-1]},
    "typer": {"cli"},
    "rich": {"cli"},
}

NOT_A_NAME = re.compile(
    r"(^|_)(manager|controller|coordinator|handler|helpers?|utils?|common|misc|base|impl|advanced|smart|"
    r"enhanced|ultra|hyper|v2|new|legacy|final)(_|$)"
)

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
RUST_FILES = sorted((ROOT / "rust").rglob("*.rs"))


def room(path):
    """The first part of a module's place inside the package: a folder or a top-level file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every imported module with the name taken from it; those for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(id(inner) for child in node.body for inner in ast.walk(child))
        elif id(node) in skipped:
            continue
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# The public surface is not among them: it looks at everything, lazily.
MODULES = [
    pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in PYTHON_FILES if room(path) != "__init__"
]


def test_every_room_of_the_package_has_its_layer():
    rooms = {room(path) for path in PYTHON_FILES} - {"__init__"}
    assert {"cache", "config", "errors", "layout", "model"} <= rooms
    assert rooms <= set(LEVEL), "a new room: give it a layer"


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_downwards(path):
    for name in imports(path):
        if name.startswith("kvhybrid."):
            target = name.split(".")[1]
            assert target in LEVEL or target == "__version__", f"{name} has no layer"
            assert LEVEL.get(target, 0) <= LEVEL[room(path)], f"{path.name} imports upwards: {name}"


@pytest.mark.parametrize("path", MODULES)
def test_foreign_libraries_stay_in_their_rooms(path):
    for name in imports(path):
        rooms = ONLY_IN.get(name.partition(".")[0])
        assert rooms is None or room(path) in rooms, f"{path.name} imports {name}"


def test_the_import_checks_saw_imports_of_ours_and_of_others():
    seen = {name.partition(".")[0] for path in PYTHON_FILES for name in imports(path)}
    assert {"kvhybrid", "torch", "transformers"} <= seen


def test_the_package_itself_imports_only_the_core():
    ours = [name for name in imports(PACKAGE / "__init__.py") if name.startswith("kvhybrid")]
    assert ours == ["kvhybrid._core.__version__"]


def test_files_stay_small():
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*PYTHON_FILES, *RUST_FILES]
    }
    assert min(len(PYTHON_FILES), len(RUST_FILES)) >= 10
    over = {str(path.relative_to(ROOT)): lines for path, lines in sizes.items() if lines > 500}
    assert not over
    assert statistics.median(sizes.values()) < 120
    assert statistics.quantiles(sizes.values(), n=10)[-1] < 350


def test_every_module_says_what_it_holds():
    assert PYTHON_FILES
    silent = [
        path for path in PYTHON_FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
    silent = [path for path in RUST_FILES if not path.read_text(encoding="utf-8").lstrip().startswith("//!")]
    assert RUST_FILES
    assert not silent


def test_names_say_something():
    names = [path.stem for path in [*PYTHON_FILES, *RUST_FILES]]
    assert "layout" in names
    assert NOT_A_NAME.search("cache_utils")
    assert not [name for name in names if NOT_A_NAME.search(name)]


def test_classes_of_the_extension_are_frozen():
    found = []
    for path in (ROOT / "rust" / "py").rglob("*.rs"):
        text = path.read_text(encoding="utf-8")
        found += [(path.name, arguments) for arguments in re.findall(r"#\[pyclass(?:\(([^)]*)\))?\]", text)]
        assert text.count("#[pyclass") == len(re.findall(r"#\[pyclass(?:\([^)]*\))?\]", text)), path
    assert found
    assert all("frozen" in arguments for _, arguments in found), found


def test_the_core_has_never_heard_of_python():
    manifest = (ROOT / "rust" / "core" / "Cargo.toml").read_text(encoding="utf-8")
    assert "[dependencies]" in manifest
    assert not re.search(r"pyo3|numpy|tch", manifest)
