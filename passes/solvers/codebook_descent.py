"""Better codes for a given table and given scales: coordinate descent on the entries of a table.

The solver is that of `compress.passes.solvers.descent`, which works for any set of values; here they are
``s T[c]``, a scale for each group of columns times the entries of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codebook import CodebookEncoding
from compress.numerics import magnitude
from compress.passes.solvers.codebooks import Coded, nearest, values
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.grids import Masked, columns_of


@dataclass(frozen=True)
class TableGrid:
    """``s T[c]`` for the entries of a table, a `compress.passes.solvers.grids.Grid`.

    Attributes:
        table: float32 ``[levels]``, ascending.
        scale: float32 ``[column groups, groups, rows]``, of any sign; 0 makes every value 0.
        width: columns in a column group.
    """

    table: Tensor
    scale: Tensor
    width: int

    def nearest(self, values: Tensor, column: int) -> Tensor:
        scale = self.scale[column // self.width]
        return self.table[nearest(values / _divisor(scale), self.table)] * scale


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def codebook_descent(
    weight: Tensor,
    coded: Coded,
    H: Tensor,
    encoding: CodebookEncoding,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
) -> Coded:
    """Move codes to lower the output error; table and scales stay.

    Entries of the weight that are exactly zero keep their code, that of 0.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        coded: where to start from.
        H: float32 ``[G, N, N]``, second moments of the inputs, one for each convolution group
            (G = 1 elsewhere).
        encoding: of `coded`.
        sweeps: passes over all columns at most; stops early when no code moves.
        damping: added to the diagonal, as a fraction of its mean: a pull towards plain rounding.
    """
    groups, columns = H.shape[0], weight.shape[1]
    w = weight.float()
    scale = columns_of(coded.scales, groups).movedim(1, 0).contiguous()
    movable = w != 0
    grid = Masked(TableGrid(coded.table, scale, encoding.width(columns)), columns_of(movable, groups))
    H = H / magnitude(H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)
    moved = coordinate_descent(w, values(coded, encoding), H, grid, sweeps=sweeps, damping=damping)
    scales = coded.scales.repeat_interleave(encoding.width(columns), dim=1)[:, :columns]
    codes = nearest(moved / _divisor(scales), coded.table).to(torch.uint8)
    # a group of zeros only has no codes to tell apart
    return Coded(torch.where(movable & (scales != 0), codes, coded.codes), coded.table, coded.scales)
