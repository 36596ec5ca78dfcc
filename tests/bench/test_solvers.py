"""The solver benchmark runs and names every method."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_in_small():
    spec = importlib.util.spec_from_file_location("bench_solvers", ROOT / "bench" / "solvers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = CliRunner().invoke(module.main, ["--size", "32", "--rows", "64", "--raw"])
    assert done.exit_code == 0, done.output
    for word in ("rtn", "descent", "gpfq", "gptq", "best", "on samples", "peak memory"):
        assert word in done.output
