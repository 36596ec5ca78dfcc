"""The Python API: signatures that stay, and every kind of recipe and calibration."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import CalibrationError, CaptureError, ExportError, RecipeError
from compress.passes.quantize_weights import QuantizeWeights
from compress.testing import MODELS, make

X = MODELS["convnet"].inputs(6)[0]


@pytest.mark.parametrize(
    "recipe",
    [
        "int8",
        compress.Recipe.from_dict({"passes": [{"pass": "cleanup"}]}),
        {"passes": [{"pass": "quantize_weights", "bits": 4}]},
        [QuantizeWeights(bits=4)],
    ],
)
def test_kinds_of_recipes(recipe: Any) -> None:
    result = compress.run(make("convnet"), recipe, example_inputs=(X[:1],))
    assert result.module()(X).shape == (6, 10)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(compress.Recipe.from_dict({"passes": [{"pass": "cleanup"}]}).to_yaml())
    for given in (path, str(path)):
        result = compress.run(make("convnet"), given, example_inputs=(X[:1],))
        assert result.report.recipe["metadata"]["name"] == "mine"


@pytest.mark.parametrize("recipe", [3, [], ["cleanup"], "int44"])
def test_bad_recipes(recipe: Any) -> None:
    with pytest.raises(RecipeError):
        compress.run(make("convnet"), recipe, example_inputs=(X[:1],))


@pytest.mark.parametrize(
    "calibration",
    [
        [X[:3], X[3:]],
        [(X[:3],), (X[3:],)],
        [(X[:3], torch.zeros(3)), (X[3:], torch.zeros(3))],  # with labels
        [{"x": X[:3]}, {"x": X[3:]}],
        (X[i : i + 3] for i in (0, 3)),
    ],
)
def test_kinds_of_calibration_give_the_same_result(calibration: Any) -> None:
    """And the example inputs come from it."""
    want = compress.run(make("convnet"), "int4", example_inputs=(X[:1],), calibration=[X[:3], X[3:]])
    have = compress.run(make("convnet"), "int4", calibration=calibration)
    assert set(want.graph.encodings) == set(have.graph.encodings)
    for name in want.graph.encodings:
        assert torch.equal(want.graph.encodings[name].codes, have.graph.encodings[name].codes)


def test_arrays_of_samples_are_captured_with_two_of_them() -> None:
    samples = torch.randn(1000, 24)
    for calibration in (samples, samples.numpy(), {"x": samples}):
        result = compress.run(make("products"), calibration=calibration)
        assert result.reference.inputs[0].shape == (2, 24)
        assert "512 samples" in result.report.calibration


@pytest.mark.parametrize("item", [{"x": {"a": X}}, (X, "label"), [X, None]])
def test_calibration_items_that_hold_something_else(item: Any) -> None:
    with pytest.raises(CalibrationError, match="of the first calibration item is a"):
        compress.run(make("convnet"), "int8", calibration=[item])


def test_metric_of_original_and_compressed() -> None:
    def metric(module: torch.nn.Module) -> float:
        out: Tensor = module(X)
        return float(out.detach().abs().mean())

    report = compress.run(make("convnet"), "int8", example_inputs=(X[:1],), eval_fn=metric).report
    values = report.provenance["metric"]
    assert values["original"] == pytest.approx(metric(make("convnet")), rel=1e-5)
    assert values["compressed"] == pytest.approx(values["original"], rel=0.05)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    compress.run(make("convnet"), "int4-sparse", example_inputs=(X[:1],), calibration=[X])
    assert torch.equal(before, torch.get_rng_state())


def test_the_module_is_left_alone() -> None:
    module = make("convnet")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    compress.run(module, "int4-sparse", example_inputs=(X[:1],), calibration=[X])
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_signatures_stay() -> None:
    assert list(inspect.signature(compress.capture).parameters)[:2] == ["source", "example_inputs"]
    run = inspect.signature(compress.run).parameters
    assert {"source", "recipe", "example_inputs", "calibration", "eval_fn", "seed"} <= set(run)
    assert run["seed"].default == 0
    assert list(inspect.signature(compress.export).parameters)[:3] == ["graph", "path", "target"]
    assert inspect.signature(compress.export).parameters["target"].default == "onnx"
    assert list(inspect.signature(compress.verify).parameters)[:2] == ["artifact", "reference"]
    assert sorted(compress.__all__) == compress.__all__
    assert all(hasattr(compress, name) for name in compress.__all__)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="the model is 3"):
        compress.run(3, "int8")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="is a Linear"):
        compress.export(torch.nn.Linear(2, 2), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_importing_needs_no_backend() -> None:
    code = "import sys, compress; print([m for m in ('onnx', 'onnxruntime') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_weights_that_no_pass_can_work_on_are_named() -> None:
    module = nn.Sequential(nn.ConvTranspose1d(32, 16, 3), nn.Conv1d(16, 32, 3), nn.GELU())
    result = compress.run(module, "int4", example_inputs=(torch.randn(2, 32, 9),))
    assert result.report.unreached == {"0.weight": "conv_transpose1d"}
    assert [site for _, site, _ in result.report.notes() if site] == ["0.weight"]
    assert "conv_transpose1d, which no pass compresses" in result.report.to_markdown()
