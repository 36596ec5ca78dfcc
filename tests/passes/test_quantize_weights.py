"""Weight quantization on whole graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.passes.cleanup import Cleanup
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.testing import MODELS, assert_close, make


def run(name: str, *passes: compress.Pass, calibrated: bool = True) -> tuple[Any, compress.Result]:
    example = MODELS[name]
    module = make(name)
    batches = [example.inputs(8), example.inputs(5)] if calibrated else None
    result = compress.run(module, list(passes), example_inputs=example.inputs(2), calibration=batches)
    return module, result


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("bits", "db"), [(8, 30), (4, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_stay_close(name: str, bits: int, db: float, symmetric: bool) -> None:
    quantize = QuantizeWeights(bits=bits, group_size=16, symmetric=symmetric)  # type: ignore[arg-type]
    module, result = run(name, quantize)
    inputs = MODELS[name].inputs(3)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    for want, have in zip(expected, result.graph.run(inputs), strict=True):
        assert_close(want, have, db=db)


def test_every_step_of_the_ladder_helps() -> None:
    """Plain rounding, searched scales, descent, all of them: the error on the calibration data falls."""
    errors = []
    plain = {"method": "rtn", "bias_correction": False}
    for options in ({**plain, "scales": "absmax"}, plain, {"method": "descent"}, {}):
        module, result = run("encoder", QuantizeWeights(bits=2, group_size=16, **options))  # type: ignore[arg-type]
        inputs = MODELS["encoder"].inputs(8)
        with torch.no_grad():
            errors.append((module(*inputs)["hidden"] - result.graph.run(inputs)[0]).norm().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["best", "gptq", "gpfq", "descent", "rtn"])
@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_every_method_on_every_layer(name: str, method: str) -> None:
    quantize = QuantizeWeights(bits=4, group_size=16, method=method)  # type: ignore[arg-type]
    module, result = run(name, quantize)
    inputs = MODELS[name].inputs(3)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    for want, have in zip(expected, result.graph.run(inputs), strict=True):
        assert_close(want, have, db=8)


def test_bias_correction_keeps_the_mean_of_every_output() -> None:
    """Also of a layer that had no bias, and of one with groups."""
    for corrected in (True, False):
        module, result = run("convnet", Cleanup(), QuantizeWeights(bits=2, bias_correction=corrected))
        x = torch.cat([MODELS["convnet"].inputs(8)[0], MODELS["convnet"].inputs(5)[0]])
        with torch.no_grad():
            want, have = module(x), result.graph.run([x])[0]
        difference = (want - have).mean(0).norm() / want.std(0).norm()
        assert (difference < 1e-4) == corrected
    _, result = run("tied_lm", QuantizeWeights(bits=4))
    assert not [n for n in result.graph.tensors if n.startswith("embed") and "bias" in n]


def test_a_missing_bias_is_added_and_a_shared_one_left_alone() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(32, 32)
            self.two = torch.nn.Linear(32, 32)
            self.two.bias = self.one.bias
            self.last = torch.nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.two(self.one(x).relu()).relu())
            return out

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    module = Shared().eval()
    result = compress.run(module, [QuantizeWeights(bits=2)], example_inputs=(x,), calibration=[(x,)])
    biases = {n: t for n, t in result.graph.tensors.items() if "bias" in n}
    assert len(biases) == 2
    assert torch.equal(next(t for n, t in biases.items() if n != "last.bias"), module.one.bias)
    assert biases["last.bias"].abs().max() > 0
    notes = {n.site for n in result.report.passes[0].notes if "shared" in n.reason}
    assert notes == {"one", "two"}


def test_three_bits_are_eight_levels_stored_as_four() -> None:
    for symmetric in (True, False):
        _, result = run("encoder", QuantizeWeights(bits=3, group_size=16, symmetric=symmetric))
        for change in result.report.passes[0].changes:
            encoded = result.graph.encodings[change.weight]
            codes = encoded.unpacked()[0]
            low = 4 if symmetric else 0
            assert low <= int(codes.min()) <= int(codes.max()) <= low + 7
            assert "int3" in change.action
            assert change.bits == 8 * encoded.nbytes / encoded.decode().numel() > 4


@pytest.mark.parametrize("method", ["best", "gptq", "gpfq", "descent", "rtn"])
def test_two_of_four_survives(method: Any) -> None:
    _, result = run("encoder", PruneMagnitude(pattern="2:4"), QuantizeWeights(bits=4, method=method))
    pruned = result.report.passes[0].changes
    for change in pruned:
        kept = (result.graph.weight(change.weight) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept <= 2).all()


def test_bytes_are_exact_and_small_weights_are_left() -> None:
    _, result = run("convnet", QuantizeWeights(bits=4, group_size=32))
    by_weight = {c.weight: c for c in result.report.passes[0].changes}
    grouped = result.graph.encodings["grouped.weight"]
    stored = sum(
        t.numel() * t.element_size()
        for n, t in result.graph.tensors.items()
        if n.startswith("grouped.weight.")
    )
    assert by_weight["grouped.weight"].bytes_after == grouped.nbytes == stored
    assert any(n.site == "depthwise" and "bytes to save" in n.reason for n in result.report.passes[0].notes)


def test_a_tied_weight_is_encoded_once() -> None:
    _, result = run("tied_lm", QuantizeWeights(bits=4))
    assert list(result.graph.encodings) == ["embed.weight", "mlp.weight"]
    assert {s.weight for s in result.graph.sites()} == {"embed.weight", "mlp.weight"}


def test_ignoring_one_end_of_a_tie_leaves_the_weight() -> None:
    _, result = run("tied_lm", QuantizeWeights(bits=4, ignore=("head",)))
    assert list(result.graph.encodings) == ["mlp.weight"]


def test_without_data_the_statistics_are_missing_not_made_up() -> None:
    _, result = run("encoder", QuantizeWeights(bits=4), calibrated=False)
    assert "no calibration data" in result.report.calibration
    assert result.graph.encodings


def test_an_encoded_weight_is_not_encoded_again() -> None:
    _, result = run("encoder", QuantizeWeights(bits=8), QuantizeWeights(bits=4))
    assert not result.report.passes[1].changes
    assert all("already int8" in n.reason for n in result.report.passes[1].notes)


@pytest.mark.parametrize(("name", "recipe"), [("convnet", "int2"), ("encoder", "int3"), ("tied_lm", "int2")])
def test_few_bits_and_new_biases_can_be_written(name: str, recipe: str, tmp_path: Path) -> None:
    example = MODELS[name]
    result = compress.run(
        make(name),
        recipe,
        example_inputs=example.inputs(2),
        inputs=example.specs,
        calibration=[example.inputs(8)],
    )
    artifact = compress.export(result.graph, tmp_path / "model.onnx")  # proves the file
    assert {e.encoding.bits for e in result.graph.encodings.values()} <= {2, 4}
    assert artifact.path.stat().st_size > 0


def test_same_seed_same_bytes() -> None:
    _, first = run("encoder", QuantizeWeights(bits=4))
    _, second = run("encoder", QuantizeWeights(bits=4))
    for name, tensor in first.graph.tensors.items():
        assert torch.equal(tensor, second.graph.tensors[name])
