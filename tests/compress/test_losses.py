"""Losses on hidden values: which there are, and what they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import PassError
from compress.losses import Loss, hidden_points, mse_loss, returning, variances, widened, with_hidden
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
    spreads = torch.tensor([0.3, 2.0])
    found = float(with_hidden(mse_loss, spreads, 0.7)(ours, theirs, None))
    expected = float(((ours[0] - theirs[0]) ** 2).mean())
    for a, b, spread in zip(ours[1:], theirs[1:], spreads.tolist(), strict=True):
        squares = sum((u - v) ** 2 for u, v in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        expected += 0.7 * squares / b.numel() / spread / 2
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gradients_of_hidden_values_against_autograd(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3), (4, 3, 5, 7), (6, 11))
    ours, theirs = ([torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(2))
    ours[1] = ours[1].contiguous(memory_format=torch.channels_last).requires_grad_()
    ours[2] = theirs[2].clone().requires_grad_()  # no error: its gradient is zero, not 0 / 0
    spreads = torch.tensor([0.5, 1.5])
    plain = mse_loss(ours[:1], theirs[:1], None)
    for a, b, spread in zip(ours[1:], theirs[1:], spreads, strict=True):
        plain = plain + 3.0 * (a.double() - b.double()).square().mean() / spread / 2
    value = with_hidden(mse_loss, spreads, 3.0)(ours, theirs, None)
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=torch.finfo(dtype).eps)
    found, expected = (torch.autograd.grad(loss, ours[1:]) for loss in (value, plain))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


def test_variances_of_hidden_values() -> None:
    graph = captured("convnet")
    names = hidden_points(graph, graph)
    batches = [MODELS["convnet"].inputs(3), MODELS["convnet"].inputs(5)]
    more = returning(graph, names)
    own = len(graph.output_names)
    per_batch = [[y.double().var(correction=0) for y in more.run(x)[own:]] for x in batches]
    expected = torch.tensor(per_batch).mean(0)
    torch.testing.assert_close(variances(more, own, batches), expected, check_dtype=False)


def test_hidden_values_that_are_constant_have_no_scale() -> None:
    g = torch.Generator().manual_seed(0)
    out, live, dead = torch.randn(4, 2, generator=g), torch.randn(4, 5, generator=g), torch.zeros(4, 3)
    spread = live.var(correction=0)
    both = with_hidden(mse_loss, torch.stack((spread, torch.tensor(0.0))), 1.0)
    found = float(both([out, live + 0.1, dead + 1e-3], [out, live, dead], None))
    assert found == pytest.approx(0.01 / float(spread) / 2, rel=1e-4)
    assert float(with_hidden(mse_loss, torch.zeros(1), 1.0)([out, dead + 1e-3], [out, dead], None)) == 0


def test_losses_are_given_outputs_in_float32() -> None:
    x, tokens = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([3])

    def of_floats(outputs: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
        assert [y.dtype for y in (*outputs, *wanted[:2])] == [torch.float32, torch.int64] * 2
        assert wanted[2] is None and labels is tokens
        return outputs[0].sum()

    loss: Loss = widened(of_floats)
    assert float(loss([x, tokens], [x, tokens, None], tokens)) == 3.0


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
