"""The proof of files with rounded activations: ties pass, errors do not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import compress
from compress.activations import STATIC
from compress.errors import VerificationError
from compress.exporters.proof import prove
from compress.passes.cleanup import Cleanup
from compress.passes.quantize_activations import QuantizeActivations
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


def test_dynamic_roundings(tmp_path: Path) -> None:
    example = MODELS["products"]
    steps = [Cleanup(), QuantizeActivations(activations="dynamic")]
    graph = compress.run(make("products"), steps, inputs=example.specs).graph
    artifact = compress.export(graph, tmp_path / "m.onnx")
    assert artifact.proof_db > 100
