"""The experiments of the GPFQ papers: an MLP on MNIST and a CNN on CIFAR-10, quantized to a few levels.

The alphabet is that of the first paper: M values evenly spaced on ``[-a, a]``, one ``a = C median|W|`` for
each layer, C swept (Lybrand and Saab 2021, section 6; the numbers are those of their logs). Biases are not
corrected, and batch normalisation stays as it is. Four methods share data and sweep:

- MSQ, their name for round-to-nearest, C swept on the test accuracy as they do;
- GPFQ, C swept likewise;
- ours, GPTQ with act-order and coordinate descent against the original's activations, where every layer
  chooses its own C by its output error, so that the test set chooses nothing;
- ours with one scale for each neuron instead of each layer, chosen in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import compress
from bench import train_small
from bench.measure import Measurement, Setup, measured, true
from compress.calibration import Statistics, sweep
from compress.graph import Graph, Site
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.gpfq import gpfq
from compress.passes.solvers.gptq import gptq
from compress.passes.solvers.grids import Grid, columns_of

_LEVELS = {"ternary": 3, "2 bits": 4, "3 bits": 8, "4 bits": 16}
_CONSTANTS = (2, 3, 4, 5, 6)
_LOST = {
    # points the papers' GPFQ lost: float accuracy minus the best over C
    "mlp": {"ternary": 98.24 - 97.39},
    "cnn": {
        "ternary": 89.22 - 74.87,
        "2 bits": 89.22 - 80.36,
        "3 bits": 89.22 - 87.10,
        "4 bits": 89.22 - 88.88,
    },
}

Quantize = Callable[[Tensor, Statistics], Tensor]


@dataclass(frozen=True)
class Even:
    """`levels` values evenly spaced on ``[-a, a]``; even numbers of them have no zero.

    Attributes:
        limit: a, float ``[groups, rows]`` or a scalar.
    """

    limit: Tensor
    levels: int

    def nearest(self, values: Tensor, column: int) -> Tensor:
        step = 2 * self.limit / (self.levels - 1)
        code = torch.div(values + self.limit, step).round_().clamp_(0, self.levels - 1)
        return code * step - self.limit


def run(setup: Setup) -> list[Measurement]:
    """Both networks; when quick the MLP in ternary, trained on 20,000 images."""
    found = list(_network(setup, "mlp"))
    return found if setup.quick else found + list(_network(setup, "cnn"))


def _network(setup: Setup, name: str) -> Iterator[Measurement]:
    torch.manual_seed(0)
    if name == "mlp":
        images, labels, test, test_labels = train_small.mnist(setup.file("data/mnist.npz"))
        epochs, rows = (2, 2000) if setup.quick else (15, 25_000)
    else:
        files = setup.file("data/cifar10.npz"), setup.file("data/cifar10_jpeg.npz")
        images, labels, test, test_labels = train_small.cifar(*files)
        epochs, rows = 12, 1000
    seen = 20_000 if setup.quick else len(images)
    model = train_small.trained(getattr(train_small, name), images[:seen], labels[:seen], epochs=epochs)
    dense = train_small.accuracy(model, test, test_labels)
    yield measured(f"{name}: accuracy, float", dense, "%")
    yield measured(f"{name}: calibration images", rows)
    graph = compress.capture(model, (test[:2],))
    batches = [(part,) for part in images[torch.randperm(len(images))[:rows]].split(500)]

    def accuracy(quantize: Quantize) -> float:
        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Tensor:
            assert statistics is not None
            return quantize(weight.flatten(1), statistics).view_as(weight).to(weight.dtype)

        needs = frozenset({"diag", "H", "G"})
        done = sweep(graph, _layers(graph), visit, batches=batches, reference=graph, needs=needs)
        return train_small.accuracy(done.module(), test, test_labels)

    wanted = ("ternary",) if setup.quick else _LEVELS
    for label in wanted:
        yield from _compared(name, label, dense, accuracy)


def _compared(
    name: str, label: str, dense: float, accuracy: Callable[[Quantize], float]
) -> Iterator[Measurement]:
    levels = _LEVELS[label]
    msq = max(accuracy(lambda w, s, c=c: _rounded(w, _layer_grid(w, c, levels))) for c in _CONSTANTS)
    greedy = {
        c: accuracy(lambda w, s, c=c: gpfq(w, _H(s), _layer_grid(w, c, levels), G=s.G)) for c in _CONSTANTS
    }
    constant = max(greedy, key=lambda c: greedy[c])
    ours = accuracy(lambda w, s: _ours(w, s, levels, per_neuron=False))
    finer = accuracy(lambda w, s: _ours(w, s, levels, per_neuron=True))
    what = f"{name} {label}"
    yield measured(f"{what}: points lost, MSQ", dense - msq, "points")
    yield measured(f"{what}: points lost, GPFQ (C = {constant})", dense - greedy[constant], "points")
    limit = _LOST[name].get(label)
    target = "" if limit is None else f"<= {limit:.2f}"
    yield measured(f"{what}: points lost, ours", dense - ours, "points", target)
    yield measured(f"{what}: points lost, ours with a scale for each neuron", dense - finer, "points")
    if levels <= 4:  # with more of them all are within a few images of the float network
        yield true(f"{what}: MSQ < GPFQ <= ours", msq < greedy[constant] <= max(ours, finer))


def _layers(graph: Graph) -> list[Site]:
    return [site for site in graph.sites() if site.kind in ("linear", "conv")]


def _H(statistics: Statistics) -> Tensor:  # noqa: N802
    assert statistics.H is not None
    return statistics.H


def _layer_grid(weight: Tensor, constant: float, levels: int) -> Grid:
    return Even(constant * weight.abs().median(), levels)


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    columns = columns_of(weight)
    return torch.stack([grid.nearest(columns[:, t], t)[0] for t in range(weight.shape[1])], 1)


def _ours(weight: Tensor, statistics: Statistics, levels: int, *, per_neuron: bool) -> Tensor:
    """The scale that gives the least output error, of those tried, for the layer or for each neuron."""
    H, G = _H(statistics), statistics.G
    spread = weight.abs().median(1).values if per_neuron else weight.abs().median().expand(len(weight))
    best, least = weight, torch.full((len(weight),), torch.inf)
    for constant in (1, 1.5, 2, 2.5, 3, 4, 5, 6):
        grid = Even((constant * spread).unsqueeze(0), levels)
        values = gptq(weight, H, grid).values
        values = coordinate_descent(weight, values, H, grid, G=G)
        error = _error(weight, values, H[0], H[0] if G is None else G[0])
        if not per_neuron:
            error = error.sum().expand(len(weight))
        best = torch.where((error < least).unsqueeze(1), values, best)
        least = torch.minimum(error, least)
    return best


def _error(weight: Tensor, values: Tensor, H: Tensor, G: Tensor) -> Tensor:
    """``E (w x - q x~)^2`` of each row, but for what does not depend on q."""
    return ((values @ H) * values).sum(1) - 2 * ((values @ G) * weight).sum(1)
