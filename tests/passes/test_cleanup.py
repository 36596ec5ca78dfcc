"""Cleanup keeps the function and leaves what it cannot fold."""

from __future__ import annotations

from collections.abc import Callable

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


class Product(nn.Module):
    """A stored square matrix, made an operand by some function, so that a wrong transpose keeps the shape."""

    def __init__(self, operand: Callable[[Tensor], Tensor], shared: bool) -> None:
        super().__init__()
        self.operand = operand
        self.shared = shared
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.operand(self.w)
        return y + x @ self.w if self.shared else y


OPERANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-1, 0),
    "permute": lambda w: w.permute(1, -2),
    "transpose nothing": lambda w: w.transpose(1, 1),
    "transpose nothing, negative": lambda w: w.transpose(-1, 1),
    "permute nothing": lambda w: w.permute(0, 1),
    "scaled": lambda w: w * 2,
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("operand", OPERANDS)
def test_every_way_to_turn_a_weight(operand: str, shared: bool) -> None:
    x = torch.randn(3, 6)
    module = Product(OPERANDS[operand], shared)
    _, cleaned = clean(module, x)
    assert_close(module(x).detach(), cleaned.run([x])[0], db=100)
    turned = "nothing" not in operand and operand != "scaled"
    assert bool(cleaned.sites()) == (not shared or turned)
    assert sum(t.numel() for t in cleaned.tensors.values()) == 36


class Sliced(nn.Module):
    """A packed projection of which each consumer takes its rows, as in cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.packed.split([5, 3])
        return torch.cat([nn.functional.linear(x, first), nn.functional.linear(x * 2, second)], -1)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), ["weight"]),
        (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), ["weight"]),
        (torch.nn.utils.weight_norm(nn.Linear(4, 5)), ["weight"]),
        (Sliced(), ["packed", "packed_1"]),
    ],
)
def test_computed_weights_become_weights(module: nn.Module, names: list[str]) -> None:
    x = torch.randn(3, 4)
    _, cleaned = clean(module.eval(), x)
    assert [s.weight for s in cleaned.sites()] == names
    assert_close(module(x).detach(), cleaned.run([x])[0], db=100)
    assert_close(module(x).detach(), cleaned.module()(x), db=100)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return x + (self.calls * 2)[0]


def test_buffers_that_are_written_to_are_no_constants() -> None:
    x = torch.randn(3, 2)
    _, cleaned = clean(Counting(), x)
    for _ in range(2):
        assert_close(x + 2, cleaned.run([x])[0], db=100)


class SharedBias(nn.Module):
    """Several convolutions with one bias, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.bias = self.convs[0].bias
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


def test_a_shared_bias_is_folded_into_each_layer() -> None:
    x = torch.randn(2, 3, 4, 4)
    module = SharedBias().eval()
    _, cleaned = clean(module, x)
    assert "batch_norm" not in " ".join(operators(cleaned))
    assert_close(module(x).detach(), cleaned.run([x])[0], db=90)
    assert_close(module(x).detach(), cleaned.module()(x), db=90)


def test_norm_after_a_convolution_without_batch_is_not_folded() -> None:
    """[channels, length] is [batch, channels] to the norm, and the sizes happen to agree."""
    module = nn.Sequential(nn.Conv1d(3, 6, 2), nn.BatchNorm1d(6)).eval()
    nn.init.uniform_(module[1].running_var, 0.5, 2)
    x = torch.randn(3, 7)
    graph = compress.capture(module, (x,), inputs=["!3,7"])
    cleaned = Cleanup().apply(graph, Context(graph)).graph
    assert_close(module(x).detach(), cleaned.run([x])[0], db=90)


class Positions(nn.Module):
    """A head of which some positions are returned."""

    def __init__(self, take: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.take = nn.Linear(6, 8), nn.Linear(8, 20), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.head(self.body(x).relu()))


@pytest.mark.parametrize(
    ("take", "rows"),
    [
        (lambda y: y[:, -1:], 3),
        (lambda y: y[:, -1], 3),
        (lambda y: y[:, -1:, :], 3),
        (lambda y: y[:, 1:4:2, 3:], 6),
        (lambda y: y[1:, -2:], 4),
        (lambda y: y[..., 2:9], 15),
        (lambda y: y[: y.shape[0] // 2 + 1], 15),
        (lambda y: y[0, 0], 5),
        (lambda y: y[:, -1:] + y.mean(), 15),
    ],
)
def test_positions_are_taken_before_the_head(take: Callable[[Tensor], Tensor], rows: int) -> None:
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    graph, cleaned = clean(Positions(take).eval(), x)
    assert_close(graph.run([x])[0], cleaned.run([x])[0], db=120)
    seen: dict[str, Tensor] = {}
    cleaned.run([x], lambda node, value: seen.setdefault(node.name, value))
    heads = [site for site in cleaned.sites() if site.name == "head"]
    assert [seen[site.node].shape[:-1].numel() for site in heads] == [rows]
