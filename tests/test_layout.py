"""The import arrows, and that everything is where it can be found: tables, tests, documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
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
    "cli.py": {"compress", "kernels", "passes", "exporters", "api"},
}
FOLDERS = ("kernels", "passes", "exporters")


def sources() -> Iterator[tuple[str, Path]]:
    for room in MAY_IMPORT:
        base = ROOT / room
        for path in [base] if base.is_file() else sorted(base.rglob("*.py")):
            yield room, path


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, at the top or inside functions."""
    yield from imports_in(ast.walk(ast.parse(path.read_text(), str(path))))


def imports_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node that runs on import: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import_time(child)


def room_of(module: str) -> str | None:
    """Which of our rooms a module lives in; None if it is not ours.

    A bare `kernels` is not `compress.kernels`: it works only from the root of a checkout, and elsewhere it
    is somebody else's package. It belongs to no room, so nobody may import it.
    """
    parts = module.split(".")
    if parts[0] in (*FOLDERS, "tests", "bench", "cli"):
        return f"bare {parts[0]}"
    if parts[0] != "compress":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in (*FOLDERS, "cli", "api") else "compress"


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda v: str(getattr(v, "name", v)))
def test_arrows(room: str, path: Path) -> None:
    allowed = MAY_IMPORT[room] | {room}
    if path == ROOT / "compress" / "api.py":
        allowed |= {*FOLDERS}  # on top with cli.py: it looks passes and exporters up
    if path == ROOT / "compress" / "__init__.py":
        allowed |= {"api"}  # the public names
    for module in imported(path):
        found = room_of(module)
        assert found is None or found in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_api_looks_backends_up_lazily() -> None:
    tree = ast.parse((ROOT / "compress" / "api.py").read_text())
    for module in imports_in(at_import_time(tree)):
        assert room_of(module) in (None, "compress"), f"api.py imports {module} at the top"


def test_solvers_know_no_graph() -> None:
    for path in (ROOT / "passes" / "solvers").rglob("*.py"):
        for module in imported(path):
            # the bare package too: its public names bring the graph
            assert module != "compress", f"{path} imports from compress itself"
            assert module not in ("compress.graph", "compress.calibration", "compress.pipeline"), path


def names(folder: str) -> set[str]:
    base = ROOT / folder
    if folder == "kernels":
        return {p.name for p in base.iterdir() if p.is_dir() and any(p.glob("*.py"))}
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
