"""The range of an activation's grid, from a histogram.

- *mse*: clip both ends as far as it lowers the mean squared rounding error ``E (x - x^)^2``: cutting off a
  few rare values buys a finer step for all others (Banner et al. 2019, section 3; here by search instead of
  a fitted distribution).
- *percentile*: leave out a fixed fraction of the values (Wu et al. 2020, section 3.1).
- *minmax*: everything seen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.activations import LEVELS, Grid

Method = Literal["mse", "percentile", "minmax"]

_CLIPS = (*(1.0 - i / 40 for i in range(28)), 0.25, 0.2, 0.15, 0.1)
_OUTSIDE = 1e-4
"""Fraction of the values outside a percentile range, both ends together."""


def choose_grid(
    centers: Tensor,
    counts: Tensor,
    low: float,
    high: float,
    method: Method = "mse",
    *,
    symmetric: bool = False,
) -> Grid:
    """The grid for a value whose distribution is known.

    Args:
        centers, counts: float64 ``[B]``, histogram.
        low, high: smallest and largest value seen.
        method: see the module docstring.
        symmetric: zero point 128, the form of signed int8 kernels.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or not float(counts.sum()):
        return Grid.of(low, high, symmetric=symmetric)
    if method == "percentile":
        share = counts.cumsum(0) / counts.sum()
        below = float(centers[int(torch.searchsorted(share, _OUTSIDE / 2))])
        above = float(centers[int(torch.searchsorted(share, 1 - _OUTSIDE / 2).clamp(max=len(centers) - 1))])
        return Grid.of(max(low, below), min(high, above), symmetric=symmetric)
    filled = counts > 0
    centers, counts = centers[filled], counts[filled]
    best, found = float("inf"), Grid.of(low, high, symmetric=symmetric)
    for clip_low in _CLIPS if low < 0 and not symmetric else (1.0,):
        for clip_high in _CLIPS if high > 0 else (1.0,):
            tried = Grid.of(
                low * (clip_high if symmetric else clip_low), high * clip_high, symmetric=symmetric
            )
            error = rounding_error(centers, counts, tried)
            if error < best:
                best, found = error, tried
    return found


def rounding_error(centers: Tensor, counts: Tensor, grid: Grid) -> float:
    """``sum counts (x - x^)^2`` over the bins of a histogram."""
    codes = (torch.round(centers / grid.scale) + grid.zero_point).clamp_(0, LEVELS - 1)
    return float((counts * (centers - (codes - grid.zero_point) * grid.scale).square()).sum())
