"""Rounded activations in the file: exact, fused, and named where they are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import compress
from compress.exporters.ort import Session, decoded_on_every_call
from compress.numerics import sqnr_db
from compress.passes.quantize_activations import QuantizeActivations
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.solvers.saturation import saturation_free
from compress.testing import MODELS, make
from tests.passes.test_quantize_activations import images, residual


def operators(path: Path, folder: Path) -> Counter[str]:
    """What the runtime makes of a file."""
    Session(path, keep_optimized=folder / "optimized.onnx")
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


def test_linear_layers_are_fused_and_exact(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    result = compress.run(
        make("encoder"), [QuantizeActivations(activations="dynamic")],
        inputs=example.specs, calibration=[example.inputs(4)],
    )  # fmt: skip
    artifact = compress.export(result.graph, tmp_path / "m.onnx", samples=result.samples)
    assert artifact.proof_db > 60
    found = operators(artifact.path, tmp_path)
    assert (found["DynamicQuantizeMatMul"], found["MatMulIntegerToFloat"]) == (2, 3)
    assert found["DynamicQuantizeLinear"] == 1, "what q, k and v read is rounded once"
    forms = {f.weight: f.loads_as for f in artifact.lowered}
    assert {w for w, f in forms.items() if f == "MatMulIntegerToFloat"} == {f"{n}.weight" for n in "qkv"}
    assert forms["up.weight"] == forms["down.weight"] == "DynamicQuantizeMatMul"
    inputs = example.inputs(5)
    fused = Session(artifact.path)(*inputs)
    assert all(sqnr_db(w, h) > 45 for w, h in zip(result.graph.run(inputs), fused, strict=True))
    assert compress.verify(artifact, result.reference, batch_sizes=()).unfused == ()


def test_a_residual_network_runs_in_integers(tmp_path: Path) -> None:
    result = compress.run(residual(), [QuantizeActivations()], inputs=["1,3,16,16"], calibration=[images(8)])
    artifact = compress.export(result.graph, tmp_path / "m.onnx", samples=result.samples)
    assert artifact.proof_db > 40
    found = operators(artifact.path, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (5, 1)
    assert not found["Relu"] and not found["Clip"]
    assert found["QuantizeLinear"] == 1, "only the image is rounded; everything after it is integers"
    assert compress.verify(artifact, result.reference, batch_sizes=()).unfused == ()
    want, have = result.graph.run([images(3, 5)]), Session(artifact.path)(images(3, 5))
    assert all(sqnr_db(w, h) > 60 for w, h in zip(want, have, strict=True))


def test_four_bit_weights_take_the_same_kernels_and_half_the_room(tmp_path: Path) -> None:
    steps = [QuantizeActivations(weight_bits=4)]
    result = compress.run(residual(), steps, inputs=["1,3,16,16"], calibration=[images(8)])
    artifact = compress.export(result.graph, tmp_path / "m.onnx", samples=result.samples)
    assert artifact.proof_db > 40
    assert operators(artifact.path, tmp_path)["QLinearConv"] == 5
    stored = {t.name: t for t in onnx.load(artifact.path).graph.initializer}
    assert stored["conv2.weight.codes"].data_type == TensorProto.INT4
    want, have = result.graph.run([images(3, 5)]), Session(artifact.path)(images(3, 5))
    assert all(sqnr_db(w, h) > 60 for w, h in zip(want, have, strict=True))
    example = MODELS["encoder"]
    steps = [QuantizeActivations(activations="dynamic", weight_bits=4)]
    result = compress.run(make("encoder"), steps, inputs=example.specs, calibration=[example.inputs(4)])
    artifact = compress.export(result.graph, tmp_path / "e.onnx", samples=result.samples)
    found = operators(artifact.path, tmp_path)
    assert (found["DynamicQuantizeMatMul"], found["MatMulIntegerToFloat"]) == (2, 3)
    inputs = example.inputs(5)
    fused = Session(artifact.path)(*inputs)
    assert all(sqnr_db(w, h) > 45 for w, h in zip(result.graph.run(inputs), fused, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_layers_on_known_ranges(bits: int, tmp_path: Path) -> None:
    """Products of three axes (an encoder) and of two (Gemm, with and without an activation behind it)."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    encoder = MODELS["encoder"]
    for module, data, count in ((layers, (torch.randn(9, 64),), 2), (make("encoder"), encoder.inputs(4), 5)):
        steps = [QuantizeActivations(activations="static", weight_bits=bits)]
        result = compress.run(module, steps, example_inputs=data, calibration=[data])
        artifact = compress.export(result.graph, tmp_path / f"{count}.onnx", samples=result.samples)
        assert artifact.proof_db > 80
        assert operators(artifact.path, tmp_path)["MatMulIntegerToFloat"] == count
        decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
        assert decoded_on_every_call(artifact.path, decoders) == []
        running = Session(artifact.path)(*data)
        assert all(sqnr_db(w, h) > 45 for w, h in zip(result.graph.run(data), running, strict=True))


def test_a_float_convolution_between_integer_ones_stays_float(tmp_path: Path) -> None:
    module = residual()
    with torch.no_grad():
        module.conv2.weight[0] *= 30  # type: ignore[index, operator]
    steps = [QuantizeActivations(ignore=("conv2",))]
    result = compress.run(module, steps, inputs=["1,3,16,16"], calibration=[images(8)])
    artifact = compress.export(result.graph, tmp_path / "m.onnx")
    found = operators(artifact.path, tmp_path)
    assert (
        found["QLinearConv"] == 3 and not compress.verify(artifact, result.reference, batch_sizes=()).unfused
    )
    want, have = result.graph.run([images(3, 5)]), Session(artifact.path)(images(3, 5))
    assert all(sqnr_db(w, h) > 45 for w, h in zip(want, have, strict=True))


def test_a_layer_that_is_not_fused_is_named(tmp_path: Path) -> None:
    product = helper.make_node("MatMulInteger", ["a", "w"], ["y"], name="w/matmul")
    graph = helper.make_graph(
        [product], "g", [helper.make_tensor_value_info("a", TensorProto.UINT8, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.int8), "w")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m"
    )
    assert decoded_on_every_call(tmp_path / "m", {"w/matmul": "w", "gone": "v"}) == ["w"]


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_no_processor_saturates(tmp_path: Path, rows: int) -> None:
    """The integer product of this machine against 64-bit sums, on the worst activations there are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(24, 75, generator=generator) + 0.5  # all large, all of one sign
    codes = saturation_free(weight).codes.int().T.numpy() - 128
    a = np.full((rows, 75), 255, np.uint8)
    product = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    graph = helper.make_graph(
        [product], "g", [helper.make_tensor_value_info("a", TensorProto.UINT8, a.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, 24])],
        [numpy_helper.from_array(codes.astype(np.int8), "w")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m"
    )
    (have,) = Session(tmp_path / "m")(torch.from_numpy(a))
    assert np.array_equal(have.numpy(), a.astype(np.int64) @ codes.astype(np.int64))


def test_other_weights_behind_rounded_activations_stay_right(tmp_path: Path) -> None:
    """4-bit and group-wise weights have no integer kernel here: rounded values, float product."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    x = torch.randn(9, 64)
    steps = [QuantizeWeights(bits=4, group_size=16)]
    graph = compress.run(module, steps, example_inputs=[x[:2]], calibration=[x]).graph
    from compress.passes.quantize_activations import round_inputs

    round_inputs(graph, [s for s in graph.sites() if s.kind == "linear"])
    artifact = compress.export(graph, tmp_path / "m.onnx")
    assert artifact.proof_db > 40
