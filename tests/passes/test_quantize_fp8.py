"""Float8 weights and activations on whole graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.activations import FLOAT8, fake_quantize_float8
from compress.exporters.ort import Session
from compress.float8 import LARGEST, Float8Weight
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_fp8 import QuantizeFP8
from compress.testing import MODELS, assert_close, make


def run(name: str, *passes: compress.Pass, calibrated: bool = True) -> tuple[Any, compress.Result]:
    example = MODELS[name]
    module = make(name)
    batches = [example.inputs(8), example.inputs(5)] if calibrated else None
    result = compress.run(module, list(passes), example_inputs=example.inputs(2), calibration=batches)
    return module, result


def roundings(graph: compress.Graph) -> list[Any]:
    return [node for node in graph.ops.nodes if node.target is FLOAT8]


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_outputs_stay_close_and_files_compute_the_same(name: str, tmp_path: Path) -> None:
    module, result = run(name, QuantizeFP8())
    inputs = MODELS[name].inputs(3)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    for want, have in zip(expected, result.graph.run(inputs), strict=True):
        assert_close(want, have, db=20)
    assert all(isinstance(e, Float8Weight) for e in result.graph.encodings.values())
    assert roundings(result.graph)
    artifact = compress.export(result.graph, tmp_path / "m.onnx", samples=result.samples)
    assert artifact.proof_db > 100
    assert {form.loads_as for form in artifact.lowered} == {"decoded at load"}
    running = Session(artifact.path)(*inputs)  # as ONNX Runtime optimises it
    for want, have in zip(result.graph.run(inputs), running, strict=True):
        assert_close(want, have, db=60)
    again = compress.export(result.graph, tmp_path / "m.safetensors", "torch")
    loaded = compress.load(again.path)
    for want, have in zip(
        result.graph.run(inputs), torch.utils._pytree.tree_leaves(loaded(*inputs)), strict=True
    ):
        assert_close(want, have, db=100)


def test_scales_of_activations_are_those_of_the_largest_value() -> None:
    module, result = run("encoder", QuantizeFP8(targets=("up",)))
    (node,) = roundings(result.graph)
    seen = []
    module.up.register_forward_hook(lambda _, inputs, __: seen.append(float(inputs[0].abs().max())))
    with torch.no_grad():
        for count in (8, 5):
            module(*MODELS["encoder"].inputs(count))
    assert float(node.args[1]) == pytest.approx(max(seen) / LARGEST, rel=1e-5)
    x = torch.linspace(-1, 1, 50)
    assert torch.equal(fake_quantize_float8(x, 2.0**-8), (256 * x).to(torch.float8_e4m3fn).float() / 256)


def test_weights_only() -> None:
    for step, calibrated in ((QuantizeFP8(activations="none"), True), (QuantizeFP8(), False)):
        _, result = run("encoder", step, calibrated=calibrated)
        assert not roundings(result.graph) and result.graph.encodings
        told = [n.reason for n in result.report.passes[0].notes if "need calibration data" in n.reason]
        assert bool(told) is not calibrated


def test_two_of_four_survives_and_bytes_are_exact() -> None:
    _, result = run("encoder", PruneMagnitude(pattern="2:4", targets=("linear",)), QuantizeFP8())
    changes = {c.weight: c for c in result.report.passes[1].changes}
    kept = (result.graph.weight("up.weight") != 0).unflatten(-1, (-1, 4)).sum(-1)
    assert (kept <= 2).all()
    rows, columns = result.graph.shape("up.weight")
    assert changes["up.weight"].bytes_after == rows * (columns + 4)
    assert changes["up.weight"].action == "fp8 per row, activations fp8 static"
    assert changes["embed.weight"].action == "fp8 per row"


def test_descent_helps() -> None:
    errors = []
    for step in (QuantizeFP8(method="rtn", activations="none"), QuantizeFP8(activations="none")):
        module, result = run("encoder", step)
        inputs = MODELS["encoder"].inputs(8)
        with torch.no_grad():
            errors.append((module(*inputs)["hidden"] - result.graph.run(inputs)[0]).norm().item())
    assert errors[1] < errors[0]
