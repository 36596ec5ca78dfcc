"""Callables named on the command line, and builders of modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import CalibrationError, ModelFileError
from compress.loading import load_model, resolve_callable

SOURCE = """
import torch
from sibling_of_models import width

def build():
    from late_sibling import depth
    return torch.nn.Linear(width, depth)

class Small(torch.nn.Linear):
    def __init__(self): super().__init__(2, 2)

def raises(): raise KeyError("no such layer")
def returns_dict(): return {}
def returns_class(): return torch.nn.ReLU
def needs(size): return torch.nn.Linear(size, size)
number = 3
ready = torch.nn.Linear(2, 2)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "models_file.py").write_text(SOURCE)
    (folder / "sibling_of_models.py").write_text("width = 2")
    (folder / "late_sibling.py").write_text("depth = 2")
    (folder / "broken_file.py").write_text("import no_such_package")
    (folder / "exits_file.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("sibling_of_models", "late_sibling", "models_file"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("callable_", ["build", "Small", "ready"])
@pytest.mark.parametrize("form", ["file", "module"])
def test_builders(
    weights: Path, models: Path, monkeypatch: pytest.MonkeyPatch, callable_: str, form: str
) -> None:
    monkeypatch.chdir(models if form == "module" else "/")
    spec = f"models_file:{callable_}" if form == "module" else f"{models / 'models_file.py'}:{callable_}"
    module = load_model(weights, model=spec).module
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, torch.load(weights)["weight"])


def test_a_file_is_imported_once(models: Path) -> None:
    spec = f"{models / 'models_file.py'}:Small"
    assert resolve_callable(spec) is resolve_callable(spec)
    assert resolve_callable("torch.nn:Linear.forward") is nn.Linear.forward


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("models_file.py", "names no callable"),
        (":build", "names no callable"),
        ("models_file.py:", "names no callable"),
        ("modles_file.py:build", r"there is no file (.|\n)*models_file\.py"),
        ("models_file.py:biuld", r"has no 'biuld'(.|\n)*models_file\.py:build"),
        ("models_file.py:number", "is a int"),
        ("broken_file.py:x", "importing .* raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("exits_file.py:x", "raised SystemExit: 2"),
        ("no_module_of_this_name:x", "no module 'no_module_of_this_name'"),
        ("torch.nnn:x", r"no module 'torch\.nnn'(.|\n)*torch\.nn"),
        ("models_file.py:raises", "raised KeyError: 'no such layer'"),
        ("models_file.py:returns_dict", "returned a dict"),
        ("models_file.py:returns_class", r"returned the class ReLU(.|\n)*return ReLU\(\)"),
        ("models_file.py:needs", "needs arguments: size"),
    ],
)
def test_bad_builders(
    weights: Path, models: Path, monkeypatch: pytest.MonkeyPatch, spec: str, says: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(ModelFileError, match=says):
        load_model(weights, model=spec)


def test_other_options_name_themselves() -> None:
    with pytest.raises(CalibrationError, match="--calibration 'nothing'"):
        resolve_callable("nothing", "--calibration", error=CalibrationError)
