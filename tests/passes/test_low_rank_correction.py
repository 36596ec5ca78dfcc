"""Low-rank branches beside quantized layers: they lower the error, cost what is said, and can be exported."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.passes.low_rank_correction import LowRankCorrection
from compress.passes.quantize_weights import QuantizeWeights
from compress.pipeline import Context, PassResult
from compress.testing import MODELS, make

INT2 = QuantizeWeights(bits=2, group_size=16, method="rtn", targets=("linear",))


@functools.cache
def quantized() -> tuple[compress.Graph, compress.Graph, Context]:
    """The original, the same in int2, and the data."""
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (40, 9), generator=generator)
    context = Context(graph, load_calibration([(ids, torch.ones_like(ids))], inputs=graph.inputs))
    return graph, INT2.apply(graph, context).graph, context


def corrected(**options: Any) -> PassResult:
    _, coded, context = quantized()
    return LowRankCorrection(**options).apply(coded, context)


def far(one: compress.Graph, other: compress.Graph) -> float:
    ids = torch.randint(0, 90, (30, 9), generator=torch.Generator().manual_seed(9))
    inputs: list[Tensor] = [ids, torch.ones_like(ids)]
    a, b = one.run(inputs)[0], other.run(inputs)[0]
    return float((a - b).square().sum() / a.square().sum())


def test_more_rank_less_error() -> None:
    graph, coded, _ = quantized()
    errors = [far(graph, coded), *(far(graph, corrected(rank=r).graph) for r in (2, 12))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_what_it_costs_and_leaves() -> None:
    _, coded, _ = quantized()
    result = corrected(rank=4)
    assert {c.site for c in result.changes} == {"q", "k", "v", "up", "down"}
    for change in result.changes:
        parts = [f"{change.site}.correction.{i}.weight" for i in range(2)]
        added = sum(result.graph.tensors[p].numel() * 4 for p in parts)
        assert change.bytes_after - change.bytes_before == added == 16 * sum(coded.shape(change.weight))
    assert result.graph.encodings.keys() == coded.encodings.keys()
    assert result.graph.nbytes == coded.nbytes + sum(c.bytes_after - c.bytes_before for c in result.changes)
    assert set(coded.tensors) < set(result.graph.tensors)


def test_what_is_declined() -> None:
    graph, _, context = quantized()
    result = LowRankCorrection(targets=("linear", "embedding"), rank=16).apply(quantized()[1], context)
    reasons = {n.site: n.reason for n in result.notes}
    assert "linear layers" in reasons["embed"] and "more numbers" in reasons["q"]
    result = LowRankCorrection().apply(graph, context)
    assert all("nothing to correct" in n.reason for n in result.notes) and not result.changes


def test_one_correction_is_enough() -> None:
    _, _, context = quantized()
    once = corrected(rank=4)
    twice = LowRankCorrection(rank=4).apply(once.graph, context)
    reasons = {n.site: n.reason for n in twice.notes}
    assert not twice.changes and "already" in reasons["q"]
    assert twice.graph.tensors.keys() == once.graph.tensors.keys()


def test_names_that_are_taken() -> None:
    """A model with layers called like those of a correction keeps them."""

    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.correction = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.correction[1](self.correction[0](x))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(Own()).eval(), torch.randn(30, 64)
    graph = compress.capture(model, (x[:2],))
    context = Context(graph, load_calibration([x], inputs=graph.inputs))
    coded = INT2.model_copy(update={"ignore": ("0.correction",)}).apply(graph, context).graph
    result = LowRankCorrection(rank=8).apply(coded, context)
    assert {c.site for c in result.changes} == {"0"}
    for i in range(2):
        name = f"0.correction.{i}.weight"
        assert torch.equal(result.graph.tensors[name], graph.tensors[name])
        assert sorted(result.graph.tensors[f"{name}_"].shape) == [8, 64]
    errors = [float((graph.run([x])[0] - g.run([x])[0]).norm()) for g in (coded, result.graph)]
    assert errors[1] < 0.9 * errors[0]


def test_without_data() -> None:
    graph, coded, _ = quantized()
    blind = LowRankCorrection(rank=8).apply(coded, Context(graph))
    assert len(blind.changes) == 5
    assert far(graph, blind.graph) < far(graph, coded)


def test_factors_are_quantized_and_the_file_is_proven(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    graph, _, context = quantized()
    eight = QuantizeWeights(bits=8, group_size=16, targets=("re:.*correction",), method="rtn")
    result = compress.run(graph, [INT2, LowRankCorrection(rank=8), eight], calibration=context.calibration)
    assert "up.correction.0.weight" in result.graph.encodings
    assert far(graph, result.graph) < 0.8 * far(graph, quantized()[1])
    assert compress.export(result.graph, tmp_path / "corrected.onnx", samples=result.samples).path.exists()
