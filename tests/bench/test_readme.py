"""README.md shows what bench/results holds."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_that_of_the_results(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = readme.table(readme.read(ROOT / "bench" / "results"))
    assert readme.current(text) == made, "run: python bench/readme.py"


def test_results_are_of_whole_runs_of_one_source():
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        found = json.loads(path.read_text())
        assert not found["environment"]["quick"], path.name
        assert not found["source_changed_meanwhile"], path.name


def test_a_cell_is_filled(readme):
    assert readme._filled("{a: b|.1f} MB · {c|.2f}", {"a: b": 1.25, "c": 3}) == "1.2 MB · 3.00"
