"""The proof of files with rounded activations: ties pass, errors do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import compress
from compress.activations import STATIC
from compress.errors import VerificationError
from compress.exporters import find
from compress.exporters.proof import _HALF, _SINGLE, prove
from compress.passes.cleanup import Cleanup
from compress.passes.quantize_activations import QuantizeActivations
from compress.progress import Silent
from compress.testing import MODELS, make
from tests.passes.test_quantize_activations import images, residual


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> compress.Artifact:
    path = tmp_path_factory.mktemp("static") / "m.onnx"
    result = compress.run(residual(), [QuantizeActivations()], inputs=["1,3,16,16"], calibration=[images(8)])
    return compress.export(result.graph, path)


def again(artifact: compress.Artifact, path: Path) -> float:
    return prove(path, artifact.graph, artifact.lowered, [[images(4, 3)]])


def test_the_limit_is_as_tight_as_for_floats(static: compress.Artifact) -> None:
    assert static.proof_db > 100
    assert again(static, static.path) > 100


@pytest.mark.parametrize("part", ["scales", "codes", "bias"])
def test_a_changed_tensor_is_found(static: compress.Artifact, tmp_path: Path, part: str) -> None:
    model = onnx.load(static.path)
    tensor = next(t for t in model.graph.initializer if part in t.name and "conv2" in t.name)
    values = numpy_helper.to_array(tensor).copy()
    values[:2] = values[:2] // 2 if part == "codes" else values[:2] * 1.5 + 0.1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match="other codes"):
        again(static, tmp_path / "m.onnx")


def test_another_grid_is_found(static: compress.Artifact) -> None:
    graph = static.graph.copy()
    node = next(n for n in graph.ops.nodes if n.target is STATIC and n.args[2] > 0)
    node.update_arg(2, node.args[2] - 1)
    with pytest.raises(VerificationError, match="other codes"):
        prove(static.path, graph, static.lowered, [[images(4, 3)]])


class Small(nn.Sequential):
    """Activations of 16 and 64 values, so that one tie is a large share of them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))


def small(seed: int, recipe: str) -> compress.Result:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, rows = Small().eval(), [torch.randn(1, 64) for _ in range(24)]
    return compress.run(module, recipe, inputs=["!1,64"], calibration=rows)


@pytest.mark.parametrize("recipe", ["int8-static", "fp8"])
def test_ties_among_few_values_are_ties(recipe: str, tmp_path: Path) -> None:
    for seed in range(7):
        result = small(seed, recipe)
        trials = [list(sample) for sample in result.samples]
        found = find("tensorrt", gpu="sm89")._write(result.graph, tmp_path / "m.onnx", {}, trials, Silent())
        assert found[2] > 50


@pytest.mark.parametrize("wrong", ["bias", "scales"])
def test_one_wrong_row_among_few_is_found(wrong: str, tmp_path: Path) -> None:
    result = small(0, "int8-static")
    artifact = compress.export(result.graph, tmp_path / "m.onnx", samples=result.samples)
    model = onnx.load(artifact.path)
    tensor = next(t for t in model.graph.initializer if t.name.startswith("0.") and wrong in t.name)
    values = numpy_helper.to_array(tensor).copy()
    row = int(values.argmax())  # one that ReLU lets through
    values[row] = values[row] * 1.1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(VerificationError, match="other codes"):
        prove(tmp_path / "wrong.onnx", artifact.graph, artifact.lowered, result.samples)


class Outside(nn.Module):
    """Some of 16,384 values leave the range of float16's digits and come back before they are rounded."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 1 << 14), nn.Linear(128, 4)
        self.register_buffer("far", torch.zeros(1 << 14).index_fill_(0, torch.arange(count), 8192.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.up(x) + self.far - self.far).relu()
        out: torch.Tensor = self.down(y.unflatten(1, (128, 128)))
        return out


@pytest.mark.parametrize(("count", "passes"), [(0, True), (1, True), (8, False)])
def test_few_values_of_float16_may_be_far_off(count: int, passes: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, rows = Outside(count).eval(), torch.randn(32, 16)
    result = compress.run(module, "int8-static", inputs=["8,16"], calibration=rows)
    trials = [list(sample) for sample in result.samples[:1]]
    exporter = find("tensorrt", gpu="sm89")
    if passes:
        assert exporter._write(result.graph, tmp_path / "m.onnx", {}, trials, Silent())[2] > 30
    else:
        with pytest.raises(VerificationError, match="4 steps at most but for few"):
            exporter._write(result.graph, tmp_path / "m.onnx", {}, trials, Silent())


@pytest.mark.parametrize("ties", [_SINGLE, _HALF])
def test_how_many_ties_chance_makes(ties: Any) -> None:
    for count in (1, 16, 64, 400, 2000, 10**6, 10**9):
        most = ties.allowed(count)
        assert most >= ties.share * count
        assert most == ties.share * count or count <= 2000
        expected = torch.tensor(ties.measured * count, dtype=torch.float64)
        at_most = torch.special.gammaincc(torch.tensor(most // 1 + 1.0, dtype=torch.float64), expected)
        assert float(at_most) > 1 - 1e-6
    assert _SINGLE.allowed(16) == 1 and _HALF.allowed(16) == 5


def test_dynamic_roundings(tmp_path: Path) -> None:
    example = MODELS["products"]
    steps = [Cleanup(), QuantizeActivations(activations="dynamic")]
    graph = compress.run(make("products"), steps, inputs=example.specs).graph
    artifact = compress.export(graph, tmp_path / "m.onnx")
    assert artifact.proof_db > 100
