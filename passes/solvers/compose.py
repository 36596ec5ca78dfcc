"""One weight from floating point to codes: the solvers in the order in which they help each other.

``best`` is: aim at the least-squares target W' if held-out samples agree (`targets`), choose scales by
weighted search (`scales`), round with GPTQ in the order of falling energy (`gptq`), improve the codes by
coordinate descent (`descent`), fit the scales to the codes (`scale_refit`), and descend again. From GPTQ on
no step raises the error on the calibration data. The other methods are its parts, alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.numerics import magnitude
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.gpfq import gpfq
from compress.passes.solvers.gptq import gptq
from compress.passes.solvers.grids import IntegerGrid, Masked, columns_of
from compress.passes.solvers.scale_refit import refit_scales
from compress.passes.solvers.scales import Rounded, decoded, round_to_nearest, search_scales
from compress.passes.solvers.targets import Moments, choose_target

Method = Literal["best", "gptq", "gpfq", "descent", "rtn"]
Scales = Literal["search", "absmax"]

_ROUNDS = 2
"""Times that scales are fitted to codes and codes to scales."""


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a layer, each of these or None.

    Attributes:
        diag: float32 ``[groups, N]``, ``E[x~_j^2]``.
        H: float32 ``[groups, N, N]``, ``E[x~ x~^T]``.
        G: the same shape, ``E[x~ x^T]``; None where x = x~.
        fitting, held_out: moments of two disjoint parts of the samples.
    """

    diag: Tensor | None = None
    H: Tensor | None = None
    G: Tensor | None = None
    fitting: Moments | None = None
    held_out: Moments | None = None

    def normalised(self) -> Inputs:
        """The same of inputs times a number, one for all parts, so that moments are around 1."""
        if self.H is None:
            return self
        unit = 1 / magnitude(self.H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)

        def both(moments: Moments | None) -> Moments | None:
            return None if moments is None else Moments(moments.H * unit, moments.G * unit)

        G = None if self.G is None else self.G * unit
        return Inputs(self.diag, self.H * unit, G, both(self.fitting), both(self.held_out))


@dataclass(frozen=True)
class Composed:
    """A quantized weight, the weight it was made to stand for, and what did not go as asked."""

    rounded: Rounded
    target: Tensor
    note: str = ""


def compose(
    weight: Tensor,
    inputs: Inputs,
    encoding: IntEncoding,
    *,
    method: Method = "best",
    scales: Scales = "search",
) -> Composed:
    """Quantize one weight; exact zeros stay zero.

    Args:
        weight: float32 ``[O, N]``; its rows belong to the groups of the inputs in order.
        inputs: without H every method is ``rtn``.
        encoding: the grid and the groups of columns.
        method: see the module docstring.
        scales: weighted search, or the plain range of each group.
    """
    # squares of very small and very large numbers do not fit float32; powers of two round nothing
    size = magnitude(weight.flatten())
    found = _compose(weight / size, inputs.normalised(), encoding, method, scales)
    rounded = replace(found.rounded, scales=_in_range(found.rounded.scales * size))
    return Composed(rounded, found.target * size, found.note)


def _in_range(scales: Tensor) -> Tensor:
    """Zero is no scale, and stands for one too small to be told from it."""
    return torch.where(scales == 0, torch.finfo(scales.dtype).tiny, scales)


def _compose(
    weight: Tensor, inputs: Inputs, encoding: IntEncoding, method: Method, scales: Scales
) -> Composed:
    H, target = inputs.H, weight
    if method == "best" and inputs.G is not None and H is not None and inputs.held_out and inputs.fitting:
        target = choose_target(weight, Moments(H, inputs.G), inputs.fitting, inputs.held_out)
    if scales == "search":
        start = search_scales(target, importance(inputs.diag, weight), encoding)
    else:
        start = round_to_nearest(target, encoding)
    if H is None or method == "rtn":
        return Composed(start, target)
    grid = _Searched(start, encoding, columns_of(weight, H.shape[0]) != 0)
    if method == "gpfq":
        return Composed(grid.codes_of(gpfq(weight, H, grid.set, G=inputs.G, act_order=True)), target)
    if method == "descent":
        moved = coordinate_descent(weight, decoded(start, encoding), H, grid.set, G=inputs.G)
        return Composed(grid.codes_of(moved), target)
    found = gptq(target, H, grid.set)
    rounded = grid.codes_of(found.values)
    if method == "best":
        rounded = _improved(target, rounded, H, grid)
    return Composed(rounded, target, found.note)


def _improved(target: Tensor, rounded: Rounded, H: Tensor, grid: _Searched) -> Rounded:
    for last in [False] * _ROUNDS + [True]:
        grid = replace(grid, rounded=rounded)
        moved = coordinate_descent(target, decoded(rounded, grid.encoding), H, grid.set, sweeps=2)
        rounded = grid.codes_of(moved)
        if not last:
            rounded = refit_scales(target, rounded, H, grid.encoding)
    return rounded


@dataclass(frozen=True)
class _Searched:
    """Scales and zero points as a set of values."""

    rounded: Rounded
    encoding: IntEncoding
    keep: Tensor

    @property
    def integers(self) -> IntegerGrid:
        groups, columns = self.keep.shape[:2]
        return IntegerGrid.of(self.rounded.scales, self.rounded.zero_points, self.encoding, columns, groups)

    @property
    def set(self) -> Masked | IntegerGrid:
        return self.integers if bool(self.keep.all()) else Masked(self.integers, self.keep)

    def codes_of(self, values: Tensor) -> Rounded:
        codes = self.integers.codes(columns_of(values, self.keep.shape[0]))
        return replace(self.rounded, codes=codes)


def importance(diag: Tensor | None, weight: Tensor) -> Tensor | None:
    """``E[x_j^2]`` for each column, ``[N]``, or for each row's group ``[O, N]``."""
    if diag is None:
        return None
    return diag[0] if len(diag) == 1 else diag.repeat_interleave(len(weight) // len(diag), dim=0)
