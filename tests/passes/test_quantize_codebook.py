"""Codebook quantization on whole graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compress
from compress.codebook import CodebookWeight
from compress.errors import RecipeError
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_codebook import QuantizeCodebook
from compress.passes.quantize_weights import QuantizeWeights
from compress.testing import MODELS, assert_close, make


def run(name: str, *passes: compress.Pass, calibrated: bool = True) -> tuple[Any, compress.Result]:
    example = MODELS[name]
    module = make(name)
    batches = [example.inputs(8), example.inputs(5)] if calibrated else None
    result = compress.run(module, list(passes), example_inputs=example.inputs(2), calibration=batches)
    return module, result


@pytest.mark.parametrize(
    ("name", "table"), [("convnet", "nf4"), ("encoder", "kmeans"), ("products", "power")]
)
def test_outputs_stay_close(name: str, table: Any) -> None:
    module, result = run(name, QuantizeCodebook(table=table, group_size=16))
    inputs = MODELS[name].inputs(3)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    for want, have in zip(expected, result.graph.run(inputs), strict=True):
        assert_close(want, have, db=12)
    assert all(isinstance(e, CodebookWeight) for e in result.graph.encodings.values())


def test_descent_helps_and_learned_tables_too() -> None:
    """Nearest entries, a table of its own, then descent: the error on the calibration data falls."""
    errors = []
    for options in ({"table": "power", "method": "rtn"}, {"method": "rtn"}, {}):
        options = {"table": "kmeans", "bits": 2, "group_size": 16, **options}
        module, result = run("encoder", QuantizeCodebook(targets=("linear",), **options))  # type: ignore[arg-type]
        inputs = MODELS["encoder"].inputs(8)
        with torch.no_grad():
            errors.append((module(*inputs)["hidden"] - result.graph.run(inputs)[0]).norm().item())
    assert errors[0] > errors[1] > errors[2]


def test_two_of_four_survives() -> None:
    prune = PruneMagnitude(pattern="2:4")
    _, result = run("encoder", prune, QuantizeCodebook(table="kmeans", bits=3, group_size=16))
    changes = result.report.passes[0].changes
    assert changes
    for change in changes:
        kept = (result.graph.weight(change.weight) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept <= 2).all()


def test_bytes_are_exact_and_small_weights_are_left() -> None:
    _, result = run("convnet", QuantizeCodebook(bits=3, table="kmeans"))
    changes = {c.weight: c for c in result.report.passes[0].changes}
    stored = sum(
        t.numel() * t.element_size()
        for n, t in result.graph.tensors.items()
        if n.startswith("grouped.weight.")
    )
    # 32 rows of 72 columns: 27 bytes of codes and two scales each; eight entries
    assert changes["grouped.weight"].bytes_after == stored == 32 * (27 + 8) + 32
    assert changes["grouped.weight"].action == "kmeans3 g64"
    assert any(n.site == "depthwise" and "bytes to save" in n.reason for n in result.report.passes[0].notes)


def test_a_tied_weight_is_encoded_once() -> None:
    _, result = run("tied_lm", QuantizeCodebook())
    assert list(result.graph.encodings) == ["embed.weight", "mlp.weight"]
    assert {s.weight for s in result.graph.sites()} == {"embed.weight", "mlp.weight"}


def test_encodings_do_not_replace_each_other() -> None:
    _, result = run("encoder", QuantizeWeights(bits=8, targets=("up",)), QuantizeCodebook())
    assert str(result.graph.encodings["up.weight"].encoding) == "int8 g32"
    assert str(result.graph.encodings["down.weight"].encoding) == "nf4 g64"
    assert [n.reason for n in result.report.passes[1].notes] == ["already int8 g32"]


def test_without_data() -> None:
    _, result = run("encoder", QuantizeCodebook(), calibrated=False)
    assert "no calibration data" in result.report.calibration
    assert result.graph.encodings


def test_a_combination_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match="table=kmeans"):
        compress.run(make("products"), {"passes": [{"pass": "quantize_codebook", "bits": 3}]})


def test_same_seed_same_bytes() -> None:
    _, first = run("products", QuantizeCodebook(table="kmeans"))
    _, second = run("products", QuantizeCodebook(table="kmeans"))
    for name, tensor in first.graph.tensors.items():
        assert torch.equal(tensor, second.graph.tensors[name])
