"""Streaming observation of activations: ranges, moments and histograms of any value in the graph.

Where `compress.calibration.sweep` collects what a layer's weight is solved with, this collects what an
activation's grid is chosen with. One forward pass; memory is that of one batch and the observers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from compress.errors import CalibrationError
from compress.graph import Graph, last_uses


class Observer(Protocol):
    """Told about one value, batch after batch."""

    def update(self, value: Tensor) -> None:
        """Take in the value of one batch."""


def observe(
    graph: Graph, batches: Iterable[Sequence[Tensor]], observers: Mapping[str, Sequence[Observer]]
) -> None:
    """Run the graph over all batches and show each observer the value of its node.

    Args:
        graph: what to run.
        batches: flat inputs.
        observers: by name of the node whose value they look at.

    Raises:
        CalibrationError: there are no batches.
    """
    nodes = list(graph.ops.nodes)
    wanted = [i for i, node in enumerate(nodes) if node.name in observers]
    nodes = nodes[: max(wanted, default=-1) + 1]
    last_use = last_uses(graph.ops)
    seen = 0
    constants: dict[fx.Node, Any] = {}
    for batch in batches:
        seen += 1
        feed = iter(batch)
        values: dict[fx.Node, Any] = dict(constants)
        for node in nodes:
            if node in values:
                continue
            values[node] = next(feed) if node.op == "placeholder" else graph.evaluate(node, values)
            if node.op == "get_attr" or _constant(node, constants):
                constants[node] = values[node]  # decoded once, not on every batch
            for observer in observers.get(node.name, ()):
                observer.update(values[node])
            for dead in last_use.get(node, ()):
                values.pop(dead, None)
    if not seen:
        raise CalibrationError("the calibration data is empty", expected="at least one sample")


def _constant(node: fx.Node, constants: Mapping[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(i in constants for i in inputs)


class Channels:
    """Range and second moment of every channel (an axis), float32 ``[N]``.

    Attributes:
        low, high: smallest and largest value of each channel.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.rows = 0
        self.low = self.high = self.squares = torch.zeros(0)

    def update(self, value: Tensor) -> None:
        rows = value.detach().float().movedim(self.axis, -1).flatten(0, -2)
        if not rows.numel():
            return
        low, high = torch.aminmax(rows, dim=0)
        squares = rows.double().square().sum(0)
        if self.rows:
            low, high = self.low.minimum(low), self.high.maximum(high)
            squares = self.squares + squares
        self.low, self.high, self.squares = low, high, squares
        self.rows += len(rows)

    @property
    def energy(self) -> Tensor:
        """``E[x_j^2]``, float32 ``[N]``."""
        return (self.squares / max(self.rows, 1)).float()


class Largest:
    """The largest magnitude of a value's elements, `value`; 0 before the first batch."""

    def __init__(self) -> None:
        self.value = 0.0

    def update(self, value: Tensor) -> None:
        if value.numel():
            self.value = max(self.value, float(value.detach().abs().max()))


class Histogram:
    """Counts of a value's elements over a range that grows by doubling, float64 ``[BINS]``.

    Bins are merged in pairs when the range doubles, so the result depends on the data only.

    Attributes:
        low, high: smallest and largest element seen, exactly.
        counts: of elements in `BINS` equal bins over ``[-reach, reach]``.
    """

    BINS = 4096

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.reach = 0.0
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        x = value.detach().float().flatten()
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = max(-low, high)
        if top == 0:
            top = self.reach or 1.0
        if not self.reach:
            self.reach = top
        while self.reach < top:
            half = self.counts.view(-1, 2).sum(1)
            quarter = self.BINS // 4
            self.counts = torch.nn.functional.pad(half, (quarter, quarter))
            self.reach *= 2
        self.counts += torch.histc(x, self.BINS, -self.reach, self.reach).double()

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64 ``[BINS]``."""
        step = 2 * self.reach / self.BINS
        return -self.reach + step * (torch.arange(self.BINS, dtype=torch.float64) + 0.5)
