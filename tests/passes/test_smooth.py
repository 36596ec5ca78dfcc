"""Smoothing changes nothing but the ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.numerics import sqnr_db
from compress.passes.quantize_activations import QuantizeActivations
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.smooth import Smooth
from compress.testing import MODELS, assert_close, make


class Block(nn.Module):
    """Norm and two layers; a residual that reads the norm as well, or does not."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.post = post
        self.norm = nn.LayerNorm(32)
        self.a = nn.Linear(32, 48)
        self.b = nn.Linear(32, 48)
        with torch.no_grad():
            self.norm.weight[3] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.a(y) * self.b(y)
        return z + y.sum(-1, keepdim=True) if self.post else z


def block(post: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Block(post).eval(), torch.randn(64, 32)


@pytest.mark.parametrize("post", [False, True])
def test_folded_where_free_multiplied_where_not(post: bool) -> None:
    module, x = block(post)
    result = compress.run(module, [Smooth()], example_inputs=[x[:2]], calibration=[x])
    assert_close(module(x).detach(), result.graph.run([x])[0], db=110)
    products = [n for n in result.graph.ops.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert len(products) == (2 if post else 1)
    summary = result.report.passes[0].notes[0].reason
    assert summary.endswith("free: 0, by a multiplication: 1, not worth one: 0") is post
    changed = {n for n, t in result.reference.tensors.items() if result.graph.tensors.get(n) is not t}
    assert ("norm.weight" in changed) is not post


@pytest.mark.parametrize("post", [False, True])
def test_rounded_activations_profit(post: bool) -> None:
    module, x = block(post)
    found = []
    for passes in ([], [Smooth()]):
        steps = [*passes, QuantizeActivations(activations="dynamic")]
        graph = compress.run(module, steps, example_inputs=[x[:2]], calibration=[x]).graph
        found.append(sqnr_db(module(x), graph.run([x])[0]))
    assert found[1] > found[0] + 5


class Convolutions(nn.Module):
    """A depthwise pair through ReLU, a linear bottleneck, a layer behind a pool, two that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 12, 1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.narrow = nn.Conv2d(12, 6, 1, bias=False)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.first = nn.Conv2d(8, 8, 1)
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            scales = torch.logspace(-1.5, 1.5, 12)  # channels of very different size, all of the same weight
            for layer in (self.wide, self.deep):
                layer.weight *= scales.view(-1, 1, 1, 1)
                layer.bias *= scales
            self.deep.weight /= scales.view(-1, 1, 1, 1)
            self.narrow.weight /= scales.view(-1, 1, 1)
            self.grouped.weight[:4] *= 50
            self.first.weight *= torch.tensor([1, 9]).repeat(4).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.deep(self.wide(x).relu()).relu())
        x = nn.functional.max_pool2d(self.grouped(x), 2)
        x = self.first(x)
        return self.one(x) + self.other(x)


def test_scales_move_between_convolutions() -> None:
    torch.manual_seed(0)
    module = Convolutions().eval()
    x = torch.randn(8, 3, 10, 10)
    result = compress.run(module, [Smooth()], example_inputs=[x[:2]], calibration=[x])
    assert_close(module(x).detach(), result.graph.run([x])[0], db=110)
    # wide -> deep -> narrow -> grouped -> first -> one and other
    assert "free: 5, by a multiplication: 0" in result.report.passes[0].notes[0].reason
    found = []
    for passes in ([], [Smooth()]):
        graph = compress.run(
            module, [*passes, QuantizeActivations()], example_inputs=[x[:2]], calibration=[x]
        ).graph
        found.append(sqnr_db(module(x), graph.run([x])[0]))
    assert found[1] > found[0] + 3


def test_weights_are_fitted_to_the_smoothed_inputs() -> None:
    """What layers read is scaled, and their weights with it: the captured graph is nothing to aim at."""
    module, x = block(post=False)
    steps = [Smooth(), QuantizeWeights(bits=4)]
    graph = compress.run(module, steps, example_inputs=[x[:2]], calibration=[x]).graph
    assert sqnr_db(module(x), graph.run([x])[0]) > 25


def test_a_cheap_error_is_not_worth_a_multiplication() -> None:
    module, x = block(post=True)
    result = compress.run(module, [Smooth(min_error=0.9)], example_inputs=[x[:2]], calibration=[x])
    assert result.report.passes[0].notes[0].reason.endswith("not worth one: 1")
    assert all(result.graph.tensors[k] is v for k, v in result.reference.tensors.items())


def test_without_data_nothing_happens() -> None:
    module, x = block(post=True)
    result = compress.run(module, [Smooth()], example_inputs=[x[:2]])
    assert "no calibration data" in result.report.passes[0].notes[0].reason


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_kind_of_model_stays_the_same(name: str) -> None:
    example = MODELS[name]
    result = compress.run(
        make(name), [Smooth(min_error=0)], example_inputs=example.inputs(2), calibration=[example.inputs(4)]
    )
    expected = torch.utils._pytree.tree_leaves(make(name)(*example.inputs(3)))
    for want, have in zip(expected, result.graph.run(example.inputs(3)), strict=True):
        assert_close(want.detach(), have, db=100)
