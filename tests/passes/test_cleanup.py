"""Cleanup keeps the function and leaves what it cannot fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.passes.cleanup import Cleanup
from compress.pipeline import Context
from compress.testing import MODELS, assert_close, make


def clean(module: nn.Module, *inputs: Tensor, **options: object) -> tuple[compress.Graph, compress.Graph]:
    graph = compress.capture(module, inputs)
    result = Cleanup(**options).apply(graph, Context(graph))  # type: ignore[arg-type]
    return graph, result.graph


def operators(graph: compress.Graph) -> list[str]:
    return [str(n.target) for n in graph.ops.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_outputs_are_kept(name: str) -> None:
    inputs = MODELS[name].inputs(4)
    graph, cleaned = clean(make(name), *inputs)
    for before, after in zip(graph.run(inputs), cleaned.run(inputs), strict=True):
        assert_close(before, after, db=90)


def test_batch_norms_and_dropout_are_gone() -> None:
    _, cleaned = clean(make("convnet"), *MODELS["convnet"].inputs(2))
    left = " ".join(operators(cleaned))
    assert "batch_norm" not in left
    assert "dropout" not in left
    assert not [n for n in cleaned.tensors if "running" in n]


def test_products_become_linear_sites() -> None:
    graph, cleaned = clean(make("products"), *MODELS["products"].inputs(2))
    assert not graph.sites()
    assert [s.weight for s in cleaned.sites()] == ["a", "b", "d"]


class Shared(nn.Module):
    """A norm that must stay: the convolution's output, or its weight, is also used elsewhere."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_mean = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        other = y if self.what == "output" else self.conv(x + 1)
        out: Tensor = self.bn(y) + other
        return out


@pytest.mark.parametrize("what", ["output", "weight"])
def test_shared_layers_are_not_folded(what: str) -> None:
    x = torch.randn(2, 4, 3, 3)
    module = Shared(what).eval()
    _, cleaned = clean(module, x)
    assert "batch_norm" in " ".join(operators(cleaned))
    assert_close(module(x).detach(), cleaned.run([x])[0], db=90)


def test_ignored_layers_are_not_folded() -> None:
    _, cleaned = clean(make("convnet"), *MODELS["convnet"].inputs(2), ignore=("conv1",))
    assert sum("batch_norm" in o for o in operators(cleaned)) == 1


def test_norm_over_the_middle_axis_is_not_folded_into_a_linear_layer() -> None:
    """BatchNorm1d on [batch, channels, length] normalises axis 1, a linear layer's channels are the last."""
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval()
    nn.init.uniform_(module[1].running_var, 0.5, 2)
    x = torch.randn(3, 6, 5)
    _, cleaned = clean(module, x)
    assert_close(module(x).detach(), cleaned.run([x])[0], db=90)
