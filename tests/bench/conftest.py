"""The benchmark scripts as modules; the repository root is not on the import path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(script: str):
    """A script of bench/ as a module."""
    name = f"bench_{script}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{script}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True)
def harness():
    """`bench/run.py`, which makes the package `bench` importable."""
    return load("run")


@pytest.fixture
def readme():
    """`bench/readme.py`."""
    return load("readme")
