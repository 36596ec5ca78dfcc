"""Cyclic coordinate descent on a grid: better rounding for given scales.

With ``H = E[x~ x~^T]`` and ``G = E[x~ x^T]`` the output error of a row is, up to a constant,
``E (w x - q x~)^2 = q H q^T - 2 q G w^T``. All values but one held fixed, the best value of coordinate t is

    Q( q_t + r_t / H_tt ),   r = G w - H q

Sweeping over the columns never raises the error, needs no factorisation, and so works for singular H too
(few samples, tiny convolutions).

Source: the descent step is that of QuantEase (Behdin et al. 2023, arXiv 2309.01885, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.passes.solvers.feedback import damped, round_with_feedback
from compress.passes.solvers.grids import Grid, columns_of, rows_of


def coordinate_descent(
    weight: Tensor,
    values: Tensor,
    H: Tensor,
    grid: Grid,
    *,
    G: Tensor | None = None,
    sweeps: int = 4,
    damping: float = 0.01,
) -> Tensor:
    """Move values on the grid to lower the output error.

    Args:
        weight: the target, float ``[O, N]``; its rows belong to the groups of H in order.
        values: where to start from, ``[O, N]``, on the grid.
        H: float ``[groups, N, N]``, second moments of the inputs; computation is in its dtype.
        grid: where values may lie.
        G: the same shape, moments with the inputs of the original network; None where those are the same.
        sweeps: passes over all columns at most; stops early when nothing moves.
        damping: added to the diagonals, as a fraction of the mean: a pull towards the weight that keeps the
            solution from chasing the calibration samples.

    Returns:
        ``[O, N]``, on the grid.
    """
    groups = H.shape[0]
    w, q = (columns_of(t.to(H.dtype), groups) for t in (weight, values))
    inherited = None if G is None else torch.bmm(G - H, w)
    H = damped(H, damping)
    diagonal = H.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    feedback = H / diagonal
    if inherited is not None:
        inherited /= diagonal
    for _ in range(sweeps):
        # in units of the weight: q + r / H_tt
        wanted = torch.baddbmm(q, feedback, w - q)
        if inherited is not None:
            wanted += inherited
        new = round_with_feedback(wanted, q, feedback, grid)
        moved = not torch.equal(new, q)
        q = new
        if not moved:
            break
    return rows_of(q)
