"""What is known of a layer's input: second-order statistics over the rows of the calibration data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from compress.graph import argument
from compress.numerics import magnitude

Need = Literal["diag", "mean", "H", "G", "held_out"]

HELD_OUT_EVERY = 5
"""Every fifth sample is kept apart where a method asks for held-out statistics."""


@dataclass(frozen=True)
class Statistics:
    """Second-order statistics of a site's input, normalised by the number of rows.

    A row ``x`` (N entries) is one token of a linear layer or one flattened patch ``(C_in/groups, kh, kw)``
    of a convolution; ``x~`` is the same row in the compressed graph. The first axis counts
    convolution groups (1 elsewhere). What was not asked for is None.

    Attributes:
        rows: number of rows seen.
        diag: float32 ``[groups, N]``, ``E[x~_j^2]``.
        mean: float32 ``[groups, N]``, ``E[x]`` in the original graph.
        mean_compressed: float32 ``[groups, N]``, ``E[x~]``.
        H: float32 ``[groups, N, N]``, ``E[x~ x~^T]``.
        G: float32 ``[groups, N, N]``, ``E[x~ x^T]``.
        held_out: the same of every fifth sample alone, to judge what was made of the others (`fitting`); all
            of the above include them. None if there are fewer than five samples.
    """

    rows: int
    diag: Tensor
    mean: Tensor | None = None
    mean_compressed: Tensor | None = None
    H: Tensor | None = None
    G: Tensor | None = None
    held_out: Statistics | None = None

    @property
    def fitting(self) -> Statistics | None:
        """Statistics of the samples that are not held out; None where none are."""
        held = self.held_out
        if held is None:
            return None
        rows = self.rows - held.rows
        parts = {
            name: (total * (self.rows / rows)).sub_(getattr(held, name), alpha=held.rows / rows)
            for name in _MOMENTS
            if (total := getattr(self, name)) is not None
        }
        return Statistics(rows, **parts)

    @property
    def centred(self) -> Statistics:
        """Covariances instead of second moments: ``H - E[x~] E[x~]^T``, ``G - E[x~] E[x]^T``; the means stay.

        They measure the output error of a layer whose bias is corrected for the mean afterwards.

        Raises:
            ValueError: means were not collected.
        """
        if self.mean is None or self.mean_compressed is None:
            raise ValueError("covariances need the means")
        m, m_tilde = self.mean.unsqueeze(1), self.mean_compressed.unsqueeze(1)
        # rounding must not make a variance negative
        return replace(
            self,
            diag=(self.diag - self.mean_compressed.square()).clamp_min_(0),
            H=None if self.H is None else self.H - m_tilde.mT @ m_tilde,
            G=None if self.G is None else self.G - m_tilde.mT @ m,
            held_out=None if self.held_out is None else self.held_out.centred,
        )


_MOMENTS = ("diag", "mean", "mean_compressed", "H", "G")


def output_error(weight: Tensor, new: Tensor, statistics: Statistics | None) -> float:
    """Relative error of a layer's output when its weight changes, a fraction.

    ``sqrt(E|(w - w') x|^2 / E|w x|^2)``, from H if it was collected, else with the covariance taken as
    diagonal, else (no data) of the weight itself.

    Args:
        weight, new: ``[O, ...]``, same shape.
    """
    groups = 1 if statistics is None else statistics.diag.shape[0]
    w = weight.detach().float().reshape(groups, weight.shape[0] // groups, -1)
    size = magnitude(w.flatten())  # squares of very small and very large weights do not fit float32
    w, d = w / size, (w - new.detach().float().reshape_as(w)) / size

    def energy(m: Tensor) -> float:
        if statistics is None:
            return float(m.double().square().sum())
        if statistics.H is not None:
            return float(((m @ statistics.H) * m).double().sum())
        return float((m.square() * statistics.diag.unsqueeze(1)).double().sum())

    total = energy(w)
    return math.sqrt(max(energy(d), 0.0) / total) if total > 0 else 0.0


# -- collecting -----------------------------------------------------------------------------------


class Sums:
    """Running sums over rows, on the way to `Statistics`."""

    def __init__(self, needs: frozenset[Need], geometry: Geometry | None, every: int = 1) -> None:
        self.needs = needs
        self.geometry = geometry
        self.every = every
        self.samples = 0
        self.rows = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x_tilde: Tensor, x: Tensor | None) -> None:
        """Add inputs of the compressed and of the original layer; None where those are the same."""
        mine = self._rows(x_tilde)
        self.rows += mine.shape[1]
        self._sum("diag", mine.square().sum(1))
        if "H" in self.needs:
            self._sum("H", mine.mT @ mine)
        if self.needs & {"mean", "G"}:
            other = mine if x is None else self._rows(x)
            self._sum("mean", other.sum(1))
            self._sum("mean_compressed", mine.sum(1))
            if "G" in self.needs:
                self._sum("G", mine.mT @ other)
        self.samples += len(x_tilde)

    def _rows(self, x: Tensor) -> Tensor:
        if self.geometry is None or self.every == 1 or not batched(x, self.geometry):
            return rows_of(x, self.geometry)
        # sample after sample another of the grids of places, so that all places count alike
        grids = list(itertools.product(range(self.every), repeat=len(self.geometry.kernel)))
        parts = []
        for i in range(min(len(x), len(grids))):
            offsets = grids[(self.samples + i) % len(grids)]
            parts.append(columns_of(x[i :: len(grids)], self.geometry, self.every, offsets))
        return torch.cat(parts, 2).mT

    def include(self, others: Sums) -> None:
        """Add the rows of another one."""
        self.rows += others.rows
        for name, value in others.sums.items():
            self._sum(name, value)

    def statistics(self) -> Statistics:
        means: dict[str, Any] = {n: total / max(self.rows, 1) for n, total in self.sums.items()}
        return Statistics(self.rows, **means)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value if name not in self.sums else self.sums[name].add_(value)


@dataclass(frozen=True)
class Geometry:
    """What turns a convolution's input into rows."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: fx.Node, kernel: tuple[int, ...]) -> Geometry:
        rank = len(kernel)

        def each(name: str, default: int) -> tuple[int, ...]:
            value = argument(node, name, default)
            values = (value,) if isinstance(value, int) else tuple(value)
            return values * rank if len(values) == 1 else values

        dilation = each("dilation", 1)
        padding = argument(node, "padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        elif padding == "valid":
            pads = ((0, 0),) * rank
        else:
            pads = tuple((p, p) for p in each("padding", 0))
        return cls(kernel, each("stride", 1), pads, dilation, int(argument(node, "groups", 1)))

    def places(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output along the kernel's axes, given the shape of the input."""
        sizes = shape[len(shape) - len(self.kernel) :]
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)


ROWS, ROWS_PER_COLUMN = 1 << 15, 32
"""Rows of a convolution that are enough: neighbouring patches are nearly the same, and to take them all was
most of the time of a run."""


def thinning(places: Sequence[int], samples: int, columns: int) -> int:
    """k, to take every k-th place of a convolution along each axis and still have rows enough.

    Args:
        places: of its output, along each axis.
        samples: number of them.
        columns: N of a row.
    """
    if not places:
        return 1
    enough = max(ROWS, ROWS_PER_COLUMN * columns)
    every = int((samples * math.prod(places) / enough) ** (1 / len(places)))
    return max(1, min(every, *places))


def rows_of(x: Tensor, geometry: Geometry | None, every: int = 1, offsets: Sequence[int] = ()) -> Tensor:
    """Inputs as float32 rows ``[groups, rows, N]``; of a convolution a view of its `columns_of`.

    Linear: ``x`` is ``[..., N]``. Convolution: ``x`` is ``[B, C, *spatial]`` (or unbatched), a row is
    the patch ``(C/groups, *kernel)`` in the order of ``weight.flatten(1)``; of its places along each axis
    every `every`-th is taken, from `offsets` on.
    """
    if geometry is None:
        return x.float().reshape(1, -1, x.shape[-1])
    return columns_of(x, geometry, every, offsets).mT


def columns_of(x: Tensor, geometry: Geometry, every: int = 1, offsets: Sequence[int] = ()) -> Tensor:
    """Patches of a convolution as float32 columns ``[groups, N, rows]``; see `rows_of`.

    They are put together from one slice of the input for each position of the kernel: such slices have long
    runs of neighbours, which windows have not.
    """
    rank = len(geometry.kernel)
    if x.ndim == rank + 1:
        x = x.unsqueeze(0)
    offsets = offsets or (0,) * rank
    counts = [
        math.ceil((n - offset) / every) for n, offset in zip(geometry.places(x.shape), offsets, strict=True)
    ]
    x = torch.nn.functional.pad(x.float(), [p for pair in reversed(geometry.padding) for p in pair])
    x = x.transpose(0, 1)
    columns = x.new_empty(len(x), math.prod(geometry.kernel), x.shape[1], *counts)
    for i, position in enumerate(itertools.product(*map(range, geometry.kernel))):
        spans = [slice(None), slice(None)]
        for axis, k in enumerate(position):
            start = offsets[axis] * geometry.stride[axis] + k * geometry.dilation[axis]
            step = geometry.stride[axis] * every
            spans.append(slice(start, start + (counts[axis] - 1) * step + 1, step))
        columns[:, i] = x[tuple(spans)]
    return columns.view(geometry.groups, -1, x.shape[1] * math.prod(counts))


CHUNK = 1 << 24
"""Elements of rows made at a time; a convolution makes as many of each input element as its kernel has."""


def batched(x: Tensor, geometry: Geometry | None) -> bool:
    """Whether the first axis counts samples; of a convolution's input without it, it counts channels."""
    return x.ndim >= (2 if geometry is None else len(geometry.kernel) + 2)


def chunks(
    x_tilde: Tensor, x: Tensor | None, geometry: Geometry | None
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Inputs of the compressed and the original layer in pieces along the first axis."""
    elements = x_tilde.numel()
    if geometry is not None:
        elements = elements * math.prod(geometry.kernel) // math.prod(geometry.stride)
    count = max(1, math.ceil(elements / CHUNK))
    if not batched(x_tilde, geometry) or count == 1:
        return [(x_tilde, x)]
    parts = x_tilde.chunk(count)
    return zip(parts, x.chunk(count) if x is not None else [None] * len(parts), strict=True)
