"""Feasible sets: the values each column of a weight may take, as objects that all solvers share.

A grid answers one question, "which of your values is nearest to this", for one column of all rows at a time.
Solvers work on columns, so everything here is stored with the columns first: the *column view* of a weight
``[O, N]`` is ``[groups, N, O / groups]``, where `groups` counts convolution groups (1 elsewhere).

=================== ==================================================================================
`IntegerGrid`       ``s (c - z)``: the stored integer codes, with scale and zero point per group of columns
`MidTread`          ``{0, +-d, .., +-K d}``: the alphabet of the GPFQ papers; ternary for K = 1
`Binary`            ``{-d, +d}``
`Masked`            any of them, with entries that stay exactly zero
`SoftThreshold`     any of them after shrinking by lambda: sparse GPFQ with an L1 penalty
`HardThreshold`     any of them, where ``|v| <= lambda`` becomes 0: sparse GPFQ, storable as integers
`OffsetThreshold`   ``{0} + {+-(lambda + k d')}``: the hard form of the paper; not a scale times an integer
=================== ==================================================================================

Sources: Zhang, Zhou and Saab 2023, "Post-training quantization for neural networks with provable guarantees"
(arXiv 2201.11113), sections 2 and 5 (sparse quantization), and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.encoding import IntEncoding


class Grid(Protocol):
    """What a solver needs to know of a feasible set."""

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Round one column.

        Args:
            values: float ``[groups, rows]``; not changed.
            column: its number in the weight, whatever order a solver goes in.

        Returns:
            a new tensor of the same shape and dtype, every entry in the set.
        """
        ...


def columns_of(weight: Tensor, groups: int = 1) -> Tensor:
    """``[O, N]`` -> the column view ``[groups, N, O / groups]``, contiguous."""
    return weight.reshape(groups, -1, weight.shape[1]).mT.contiguous()


def rows_of(columns: Tensor) -> Tensor:
    """The inverse of `columns_of`."""
    return columns.mT.flatten(0, 1)


@dataclass(frozen=True)
class IntegerGrid:
    """``s (c - z)`` for codes c of an encoding; scale s and zero point z for each group of columns.

    Attributes:
        scale: float ``[column groups, groups, rows]``, nonzero; may be negative.
        zero: the same shape, whole numbers.
        lowest, highest: codes, ends included.
        width: columns in a column group.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    width: int

    @classmethod
    def of(
        cls,
        scales: Tensor,
        zero_points: Tensor | None,
        encoding: IntEncoding,
        columns: int,
        groups: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> IntegerGrid:
        """The grid of an encoding.

        Args:
            scales: ``[O, column groups]``.
            zero_points: the same shape, or None for the constant one of a symmetric encoding.
            encoding: bits, group size.
            columns: N.
            groups: convolution groups.
            dtype: solvers compute in it.
        """
        scale = columns_of(scales, groups).movedim(1, 0).to(dtype).contiguous()
        if zero_points is None:
            zero = torch.full_like(scale, encoding.zero)
        else:
            zero = columns_of(zero_points, groups).movedim(1, 0).to(dtype).contiguous()
        return cls(scale, zero, encoding.lowest - zero, encoding.highest - zero, encoding.width(columns))

    def nearest(self, values: Tensor, column: int) -> Tensor:
        g = column // self.width
        scale = self.scale[g]
        return torch.div(values, scale).round_().clamp_(self.low[g], self.high[g]).mul_(scale)

    def codes(self, values: Tensor) -> Tensor:
        """Codes of values on the grid: column view -> uint8 ``[O, N]``."""
        count = values.shape[1]
        expand = torch.arange(count) // self.width
        scale, zero = (t.movedim(0, 1)[:, expand] for t in (self.scale, self.zero))
        return rows_of(torch.round(values / scale) + zero).to(torch.uint8)


@dataclass(frozen=True)
class MidTread:
    """``{0, +-d, .., +-K d}``, that is ``2K + 1`` levels. The papers call ``K = 2^(b-1)`` "b bits".

    Attributes:
        step: d, one for all, or ``[groups, rows]``.
        levels: K, on each side of zero.
    """

    step: Tensor
    levels: int

    @classmethod
    def of_layer(cls, weight: Tensor, bits: int, constant: float = 1.16) -> MidTread:
        """The papers' rule, one step for the layer: ``d = C mean_rows(max |w_row|) / K``, ``K = 2^(bits-1)``.

        Args:
            weight: ``[O, N]``.
            bits: as the papers count them; 1 is ternary.
            constant: C; 1.16 is their default at 4 bits.
        """
        levels = 1 << (bits - 1)
        return cls(constant * weight.abs().amax(1).mean() / levels, levels)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return torch.div(values, self.step).round_().clamp_(-self.levels, self.levels).mul_(self.step)


@dataclass(frozen=True)
class Binary:
    """``{-d, +d}``; zero goes up. `step` is d > 0, one for all, or ``[groups, rows]``."""

    step: Tensor

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return torch.where(values < 0, -self.step, self.step).to(values.dtype).expand_as(values).clone()


@dataclass(frozen=True)
class Masked:
    """Another grid, but where `keep` is False the value is zero.

    Attributes:
        keep: bool, column view ``[groups, N, rows]``.
    """

    grid: Grid
    keep: Tensor

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return self.grid.nearest(values, column).mul_(self.keep[:, column])


@dataclass(frozen=True)
class SoftThreshold:
    """``Q(sign(v) max(|v| - lambda, 0))``: each step minimises its error plus ``lambda |q| ||x||^2``."""

    grid: Grid
    threshold: float

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return self.grid.nearest(torch.nn.functional.softshrink(values, self.threshold), column)


@dataclass(frozen=True)
class HardThreshold:
    """0 where ``|v| <= lambda``, else ``Q(v)``: sparse, not shrunk, and still a scale times an integer."""

    grid: Grid
    threshold: float

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return self.grid.nearest(values, column).mul_(values.abs() > self.threshold)


@dataclass(frozen=True)
class OffsetThreshold:
    """``{0} + {+-(lambda + k d')}, k = 0..K, d' = d - lambda / K``: the hard threshold as the paper has it.

    The top level ``K d`` is that of `MidTread`. Attributes as there, and `threshold`, lambda < K d.
    """

    step: Tensor
    levels: int
    threshold: float

    def nearest(self, values: Tensor, column: int) -> Tensor:
        size = values.abs()
        step = self.step - self.threshold / self.levels
        k = torch.div(size - self.threshold, step).round_().clamp_(0, self.levels)
        return torch.sign(values) * (self.threshold + k * step) * (size > self.threshold)
