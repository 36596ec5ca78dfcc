"""The import arrows, and that everything is where it can be found: tables, tests, documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.exporters import EXPORTERS
from compress.kernels import OPS
from compress.passes import PASSES

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    # folder -> what it may import of ours, besides itself
    "compress": set(),
    "kernels": {"compress"},
    "passes": {"compress", "kernels"},
    "exporters": {"compress", "kernels"},
    "cli.py": {"compress", "kernels", "passes", "exporters"},
}
FOLDERS = ("kernels", "passes", "exporters")


def sources() -> Iterator[tuple[str, Path]]:
    for room in MAY_IMPORT:
        base = ROOT / room
        for path in [base] if base.is_file() else sorted(base.rglob("*.py")):
            yield room, path


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """Which of our rooms a module lives in; None if it is not ours."""
    parts = module.split(".")
    if parts[0] in (*FOLDERS, "tests", "bench", "cli"):
        return parts[0]
    if parts[0] != "compress":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in (*FOLDERS, "cli") else "compress"


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda v: str(getattr(v, "name", v)))
def test_arrows(room: str, path: Path) -> None:
    if path == ROOT / "compress" / "api.py":
        return  # on top with cli.py: it looks passes and exporters up
    allowed = MAY_IMPORT[room] | {room}
    for module in imported(path):
        found = room_of(module)
        assert found is None or found in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_api_looks_backends_up_lazily() -> None:
    tree = ast.parse((ROOT / "compress" / "api.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert room_of(str(node.module)) in (None, "compress"), f"api.py imports {node.module} at the top"


def test_solvers_know_no_graph() -> None:
    for path in (ROOT / "passes" / "solvers").glob("*.py"):
        for module in imported(path):
            assert module not in ("compress.graph", "compress.calibration", "compress.pipeline"), path


def names(folder: str) -> set[str]:
    base = ROOT / folder
    if folder == "kernels":
        return {p.name for p in base.iterdir() if (p / "__init__.py").exists()}
    if folder == "exporters":
        return {p.stem for p in base.glob("to_*.py")}
    return {p.stem for p in base.glob("*.py")} - {"__init__"}


def test_tables_are_complete() -> None:
    assert set(PASSES) == names("passes")
    assert all(PASSES[name].name == name for name in PASSES)
    assert set(OPS) == names("kernels")
    assert {entry.split(":")[0].rsplit(".", 1)[1] for entry in EXPORTERS.values()} == names("exporters")


@pytest.mark.parametrize("folder", FOLDERS)
def test_everything_has_a_test(folder: str) -> None:
    for name in names(folder):
        assert (ROOT / "tests" / folder / f"test_{name}.py").exists(), f"{folder}/{name} has no test"


def test_every_pass_and_recipe_is_documented() -> None:
    from compress.recipes import RECIPES

    text = (ROOT / "README.md").read_text()
    for name in (*PASSES, *RECIPES):
        assert f"`{name}`" in text, f"{name} is not in README.md"


def test_files_can_be_read_in_one_sitting() -> None:
    for _, path in sources():
        lines = len(path.read_text().splitlines())
        assert lines <= 520, f"{path.relative_to(ROOT)} has {lines} lines"
