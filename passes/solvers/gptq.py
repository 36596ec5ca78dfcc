"""GPTQ: each error is diffused to the weights to come, so far as those can make up for it.

With the factorisation ``H = U D U^T``, U unit upper triangular, the columns are rounded in order as

    q_t = Q( w_t + sum_{j<t} (w_j - q_j) U[j, t] )

which is GPTQ (OPTQ) exactly (Chee et al. 2023, QuIP, theorem 6) and Babai's nearest-plane algorithm, but
takes one Cholesky factorisation of H instead of two and an inverse. Group scales are static, that is fixed
before, so columns can be taken by falling energy ("act-order") without any index in the stored weight.

Source: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.feedback import descending, factored, round_with_feedback
from compress.passes.solvers.grids import Grid, columns_of, rows_of


@dataclass(frozen=True)
class Solution:
    """A quantized weight.

    Attributes:
        values: ``[O, N]``, on the grid.
        damping: what the factorisation took, as a fraction of the mean of the diagonal; None if it failed.
        note: what did not go as asked, for people; empty if all did.
    """

    values: Tensor
    damping: float | None
    note: str = ""


def gptq(weight: Tensor, H: Tensor, grid: Grid, *, damping: float = 0.01, act_order: bool = True) -> Solution:
    """Quantize by error diffusion.

    Where H cannot be factorised, damping is raised up to a thousandfold; where even that does not help, the
    weight is rounded to nearest and improved by coordinate descent, which needs no factorisation.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        H: float ``[groups, N, N]``, second moments of the inputs; computation is in its dtype.
        grid: where values may lie.
        damping: added to the diagonal, as a fraction of its mean.
        act_order: columns by falling ``H[t, t]``.
    """
    w = columns_of(weight.to(H.dtype), H.shape[0])
    order = descending(H) if act_order else torch.arange(H.shape[1])
    steps: list[int] = order.tolist()
    factor = factored(H[:, order][:, :, order], damping)
    if factor is None:
        start = torch.stack([grid.nearest(w[:, t], t) for t in range(len(steps))], 1)
        values, note = rows_of(start), "H is not finite; rounded to nearest"
        if bool(H.isfinite().all()):
            values = coordinate_descent(weight, values, H, grid)
            note = "H could not be factorised; coordinate descent instead of GPTQ"
        return Solution(values, None, note)
    w = w[:, order]
    values = round_with_feedback(w, w, factor.feedback, grid, steps)
    note = f"damping raised to {factor.damping:g}" if factor.damping > damping else ""
    return Solution(rows_of(values[:, torch.argsort(order)]), factor.damping, note)
