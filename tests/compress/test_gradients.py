"""Factors of the gradients of single samples against autograd, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress.errors import PassError
from compress.gradients import site_gradients
from compress.testing import MODELS, assert_close, make


def slow(model: nn.Module, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of a parameter -> ``[n, ...]``: a backward pass for each sample."""
    names = dict(model.named_parameters())
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for i in range(len(labels)):
        scores = model(*(x[i : i + 1] for x in inputs))
        loss = nn.functional.cross_entropy(
            scores.flatten(0, -2), labels[i : i + 1].flatten(), reduction="sum"
        )
        for name, g in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
            parts[name].append(g)
    return {name: torch.stack(g) for name, g in parts.items()}


@pytest.mark.parametrize("name", ["convnet", "tied_lm"])
def test_equal_to_one_backward_pass_for_each_sample(name: str) -> None:
    model, inputs = make(name), MODELS[name].inputs(5)
    graph = compress.capture(model, inputs)
    classes = 10 if name == "convnet" else 200
    shape = (5,) if name == "convnet" else (5, 9)
    labels = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(0))
    expected = slow(model.requires_grad_(True), inputs, labels)
    sites = [s for s in graph.sites() if s.kind != "embedding"]
    found = {s.node: f for s, f in site_gradients(graph, sites, inputs, labels, torch.Generator())}
    assert found.keys() == {s.node for s in sites}
    for site in sites:
        if site.weight == "embed.weight":
            continue  # the embedding has its part in the gradient, too
        factors = found[site.node]
        product = torch.einsum("gbto,gbtk->bgok", factors.delta, factors.x)
        assert_close(expected[site.weight], product.reshape(expected[site.weight].shape), db=90)


def test_labels_are_sampled_where_there_are_none() -> None:
    """From the model's probabilities: their mean gradient is zero."""
    torch.manual_seed(0)
    graph = compress.capture(nn.Linear(3, 4), (torch.randn(2, 3),))
    x = torch.randn(1, 3).expand(20000, 3)
    generator = torch.Generator().manual_seed(0)
    for labels in (None, torch.rand(20000), torch.full((20000,), 7)):
        ((_, found),) = site_gradients(graph, graph.sites(), (x,), labels, generator)
        assert float(found.delta.mean((0, 1, 2)).abs().max()) < 0.02
        assert float(found.delta.square().mean()) > 0.05


def test_second_moments_at_a_temperature() -> None:
    """Those of the output's gradients are diag(p) - p p^T, p the probabilities at that temperature."""
    torch.manual_seed(0)
    graph = compress.capture(nn.Linear(3, 4), (torch.randn(2, 3),))
    x = 5 * torch.randn(1, 3)
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 4.0):
        p = (graph.run([x])[0][0] / temperature).softmax(-1)
        inputs = (x.expand(40000, 3),)
        ((_, found),) = site_gradients(graph, graph.sites(), inputs, None, generator, temperature)
        delta = found.delta[0, :, 0]
        assert torch.allclose(delta.T @ delta / 40000, p.diag() - torch.outer(p, p), atol=0.01)


class InPlace(nn.Module):
    """The output of a layer, and the input of another one, are overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y.relu_()
        z = self.b(y)
        y.add_(z)
        out: torch.Tensor = self.head(y)
        return out


def test_values_changed_in_place() -> None:
    torch.manual_seed(0)
    model, x = InPlace().eval().requires_grad_(False), torch.randn(4, 4)
    graph = compress.capture(model, (x,))
    labels = torch.tensor([0, 1, 2, 0])
    found = {s.node: f for s, f in site_gradients(graph, graph.sites()[1:], (x,), labels, torch.Generator())}
    y = model.a(x).relu()
    (site,) = (s for s in graph.sites() if s.name == "b")
    assert_close(y, found[site.node].x[0, :, 0])


def test_a_model_without_logits() -> None:
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    with pytest.raises(PassError, match="no logits"):
        list(site_gradients(graph, [], MODELS["encoder"].inputs(2), None, torch.Generator()))
