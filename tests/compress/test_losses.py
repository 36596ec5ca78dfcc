"""Losses on hidden values: which there are, and what they add."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress.errors import PassError
from compress.losses import hidden_points, mse_loss, returning, with_hidden
from compress.passes.cleanup import Cleanup
from compress.passes.decompose import Decompose
from compress.pipeline import Context
from compress.testing import MODELS, make


def captured(name: str) -> compress.Graph:
    return compress.capture(make(name), MODELS[name].inputs(2))


def test_the_points_of_a_decomposed_network_are_those_of_its_original() -> None:
    graph = captured("convnet")
    folded = Cleanup().apply(graph, Context(graph)).graph
    after = Decompose(parameter_reduction=0.3, method="svd").apply(folded, Context(folded)).graph
    assert len(after.sites()) > len(folded.sites())
    names = hidden_points(after, graph)
    assert names == hidden_points(graph, graph) and len(names) >= 3
    values = returning(after, names).run(MODELS["convnet"].inputs(2))
    hidden = values[len(after.output_names) :]
    assert len(hidden) == len(names)
    assert all(bool((value >= 0).all()) for value in hidden), "they are those of ReLUs"
    assert torch.equal(values[0], after.run(MODELS["convnet"].inputs(2))[0])


def test_the_loss_against_a_slow_one() -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(4, n, generator=g) for n in (2, 5, 3)] for _ in range(2))
    found = float(with_hidden(mse_loss, 1, 0.7)(ours, theirs, None))
    expected = float(((ours[0] - theirs[0]) ** 2).mean())
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        mean = sum(b.flatten().tolist()) / b.numel()
        spread = sum((v - mean) ** 2 for v in b.flatten().tolist()) / b.numel()
        squares = sum((u - v) ** 2 for u, v in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        expected += 0.7 * squares / b.numel() / spread / 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_hidden_values_that_are_constant_have_no_scale() -> None:
    g = torch.Generator().manual_seed(0)
    out, live, dead = torch.randn(4, 2, generator=g), torch.randn(4, 5, generator=g), torch.zeros(4, 3)
    both = with_hidden(mse_loss, 1, 1.0)
    found = float(both([out, live + 0.1, dead + 1e-3], [out, live, dead], None))
    assert found == pytest.approx(0.01 / float(live.var(correction=0)) / 2, rel=1e-4)
    assert float(both([out, dead + 1e-3], [out, dead], None)) == 0


class WritesLater(nn.Module):
    """The value of the first activation function is overwritten, that of the second is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        y.mul_(2)
        out: torch.Tensor = self.b(y).relu() + 1
        return out


def test_values_that_are_overwritten_are_no_points() -> None:
    graph = compress.capture(WritesLater().eval(), (torch.randn(2, 4),))
    assert len(hidden_points(graph, graph)) == 1
    plain = compress.capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    with pytest.raises(PassError, match="share no activation function"):
        hidden_points(plain, plain)
