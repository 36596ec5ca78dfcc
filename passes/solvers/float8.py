"""Weights as E4M3 numbers: the scale of each row, and the numbers.

The relative step of a float is the same at every size, so a scale matters only by where between two powers
of two it puts the row, and by what it leaves below the smallest normal number, 2^-6. Hence eight scales from
``max|w| / 448`` to twice that are tried, and the one of least weighted error
``sum_j h_j (w_j - s f_j)^2``, ``h_j = E[x_j^2]``, is taken; with all second moments of the inputs, coordinate
descent (`compress.passes.solvers.descent`) then moves numbers to lower the error of the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.float8 import LARGEST, to_float8
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.grids import Masked, columns_of

_RATIOS = tuple(2 ** (i / 8) for i in range(8))


@dataclass(frozen=True)
class Float8Grid:
    """``s f`` for the E4M3 numbers f, a `compress.passes.solvers.grids.Grid`.

    Attributes:
        scale: positive float32 ``[groups, rows]``.
    """

    scale: Tensor

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return to_float8(values / self.scale).to(values.dtype) * self.scale


def fit_float8(
    weight: Tensor,
    importance: Tensor | None = None,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Numbers and scales. Zeros stay exactly zero, so a pruned weight keeps its pattern.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        importance: ``h``, nonnegative float ``[N]`` or ``[O, N]``; None for all ones.
        H, G: float ``[groups, N, N]``, second moments of the inputs, and with those of the original network;
            None to leave out the descent, or to aim at the weight.
        sweeps, damping: of the descent.

    Returns:
        float32 ``[O, N]``, E4M3 numbers, and positive float32 scales ``[O, 1]``.
    """
    w = weight.detach().float()
    h = torch.ones(w.shape[1]) if importance is None else importance.float().clamp_min(0)
    h = h.expand_as(w) + 1e-12
    base = w.abs().amax(1, keepdim=True) / LARGEST
    base = torch.where(base > torch.finfo(torch.float32).tiny, base, torch.ones_like(base))
    units = w / base  # squares of very small weights would be zero
    scale, best = base, torch.full_like(base, torch.inf)
    for ratio in _RATIOS:
        error = (h * (units - to_float8(units / ratio).float() * ratio).square()).sum(1, keepdim=True)
        scale = torch.where(error < best, base * ratio, scale)
        best = torch.minimum(error, best)
    values = to_float8(w / scale).float()
    if H is not None:
        groups = H.shape[0]
        grid = Masked(Float8Grid(scale.reshape(groups, -1)), columns_of(w != 0, groups))
        moved = coordinate_descent(w, values * scale, H.float(), grid, G=G, sweeps=sweeps, damping=damping)
        values = to_float8(moved / scale).float()
    return values, scale
