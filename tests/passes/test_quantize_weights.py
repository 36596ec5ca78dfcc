"""Weight quantization on whole graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compress
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
    """Plain rounding, searched scales, descent: the error on the calibration data falls."""
    errors = []
    for options in ({"scales": "absmax", "method": "rtn"}, {"method": "rtn"}, {}):
        module, result = run("encoder", QuantizeWeights(bits=2, group_size=16, **options))  # type: ignore[arg-type]
        inputs = MODELS["encoder"].inputs(8)
        with torch.no_grad():
            errors.append((module(*inputs)["hidden"] - result.graph.run(inputs)[0]).norm().item())
    assert errors[0] > errors[1] > errors[2]


def test_two_of_four_survives() -> None:
    _, result = run("encoder", PruneMagnitude(pattern="2:4"), QuantizeWeights(bits=4))
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


def test_same_seed_same_bytes() -> None:
    _, first = run("encoder", QuantizeWeights(bits=4))
    _, second = run("encoder", QuantizeWeights(bits=4))
    for name, tensor in first.graph.tensors.items():
        assert torch.equal(tensor, second.graph.tensors[name])
