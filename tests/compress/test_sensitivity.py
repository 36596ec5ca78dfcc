"""Damage of single replacements against running the whole model again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.encoding import IntEncoding
from compress.errors import PassError
from compress.passes.quantize_weights import quantized
from compress.sensitivity import Damage, logits, output_layers
from compress.testing import MODELS, make


def captured(name: str) -> compress.Graph:
    return compress.capture(make(name), MODELS[name].inputs(2))


def noisy(weight: Tensor, seed: int, size: float = 0.05) -> Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + size * weight.std() * noise


@pytest.mark.parametrize("name", ["convnet", "encoder", "tied_lm"])
def test_equals_running_everything_again(name: str) -> None:
    """Every weight, plain and encoded replacements, ties, casts, two batches of different size."""
    graph = captured(name)
    damage = Damage(graph, [MODELS[name].inputs(3), MODELS[name].inputs(5)])
    weights = dict.fromkeys(site.weight for site in graph.sites())
    at = graph.copy()  # measured around a point that is not the reference
    first = next(iter(weights))
    at.set_weight(first, noisy(graph.weight(first), 99))
    replacements = {
        w: [noisy(graph.weight(w), 0), quantized(graph.weight(w), None, IntEncoding(4, 16))] for w in weights
    }
    found = damage.of_each(at, replacements)
    assert list(found) == list(weights)
    for weight, values in found.items():
        for value, new in zip(values, replacements[weight], strict=True):
            whole = at.copy()
            whole.set_weight(weight, new if isinstance(new, Tensor) else new.decode())
            assert value == pytest.approx(damage.of(whole), rel=1e-4)
            assert value > 0


def test_encoded_neighbours_and_no_change() -> None:
    """Weights that are encoded already are only passed through; the same weight again does no damage."""
    graph = captured("encoder")
    other = graph.copy()
    other.set_encoding("down.weight", quantized(graph.weight("down.weight"), None, IntEncoding(8, 16)))
    damage = Damage(graph, [MODELS["encoder"].inputs(3)])
    assert damage.of(graph) == 0
    assert damage.of_each(graph, {"q.weight": [graph.weight("q.weight")]}) == {"q.weight": [0.0]}
    found = damage.of_each(other, {"q.weight": [graph.weight("q.weight")]})["q.weight"][0]
    assert found == pytest.approx(damage.of(other)) and found > 0


class Cast(nn.Module):
    """A weight read through a cast, and by two operators, one of which has no site."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6).half())

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.float()
        out: Tensor = nn.functional.linear((x * w.abs().mean()).tanh(), w)
        return out


def test_every_reader_of_a_weight_sees_the_new_one() -> None:
    torch.manual_seed(0)
    graph = compress.capture(Cast(), (torch.randn(2, 6),))
    (name,) = {s.weight for s in graph.sites()}
    damage = Damage(graph, [(torch.randn(4, 6),)], "error")
    new = noisy(graph.weight(name).float(), 1).half()
    whole = graph.copy()
    whole.set_weight(name, new)
    assert damage.of_each(graph, {name: [new]})[name][0] == pytest.approx(damage.of(whole), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    classes=st.integers(2, 9),
    size=st.sampled_from([1e-3, 1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_divergence_against_its_definition(rows: int, classes: int, size: float, seed: int) -> None:
    from compress.sensitivity import _kl

    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, classes, generator=generator)
    b = a + size * torch.randn(rows, classes, generator=generator)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    total, count = _kl(a.log_softmax(-1), b)
    assert count == rows
    assert total == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_divergence_with_masked_classes() -> None:
    from compress.sensitivity import _kl

    a = torch.tensor([[0.0, 1.0, -math.inf]])
    log_p = a.log_softmax(-1)
    assert _kl(log_p, a) == (0.0, 1.0)
    other = torch.tensor([[0.0, 1.0, 0.0]])
    expected = float((log_p.exp() * (log_p - other.log_softmax(-1)))[:, :2].sum())
    assert _kl(log_p, other)[0] == pytest.approx(expected, rel=1e-5)


class TwoHeads(nn.Module):
    """Classes and boxes in one output, in an order of their own or not, of one input or of two."""

    def __init__(self, axis: int, order: int | None) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(6, 5), nn.Linear(6, 5)
        self.axis, self.order = axis, order

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.boxes(x.tanh() if self.axis == -1 else x)
        out = torch.cat([self.classes(x), boxes], self.axis)
        return out if self.order is None else out.index_select(self.order, torch.arange(4).flip(0))


@pytest.mark.parametrize(("axis", "order"), [(1, None), (0, None), (-1, -1), (0, 0)])
def test_concatenated_heads_are_no_logits(axis: int, order: int | None) -> None:
    graph = compress.capture(TwoHeads(axis, order), (torch.randn(3, 6),))
    assert logits(graph) == []
    assert not output_layers(graph) & {site.node for site in graph.sites()}
    assert Damage(graph, []).measure == "error"


def test_what_the_outputs_are() -> None:
    assert logits(captured("convnet")) == [0]
    assert logits(captured("tied_lm")) == [0]
    assert logits(captured("encoder")) == []
    assert output_layers(captured("tied_lm")) == {"linear_1"}
    encoder = captured("encoder")
    assert Damage(encoder, []).measure == "error"
    with pytest.raises(PassError, match="damage: error"):
        Damage(encoder, [], "kl")
