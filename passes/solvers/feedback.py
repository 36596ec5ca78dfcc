"""Successive rounding with error feedback: the one loop behind GPFQ, GPTQ and coordinate descent.

Columns are rounded one after the other, and what the earlier ones did wrong is fed forward::

    q_t = Q_t( base_t + sum_{j<t} F[t, j] (anchor_j - q_j) )

The methods differ in `base`, `anchor` and `F` only (`gpfq`, `gptq`, `descent`). Rows are independent and done
together. The sum over finished blocks of columns is one matrix product for each block; within a block it is
one matrix-vector product for each column, on contiguous memory because columns come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.grids import Grid

_BLOCK = 64

_DAMPINGS = 3
"""Times the damping is raised, tenfold each, before giving up on a factorisation."""


def round_with_feedback(
    base: Tensor, anchor: Tensor, feedback: Tensor, grid: Grid, order: Sequence[int] | None = None
) -> Tensor:
    """Round all columns (module docstring).

    Args:
        base, anchor: float ``[groups, N, rows]``, columns in the order they are done.
        feedback: ``[groups, N, N]`` in the same order; only what is below the diagonal is read.
        grid: where values may lie.
        order: for each step the number of the column in the weight, as the grid counts; None if the same.

    Returns:
        ``[groups, N, rows]`` in the order of `base`, every value on the grid.
    """
    columns = base.shape[1]
    values, errors = torch.empty_like(base), torch.empty_like(base)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        wanted = base[:, start:stop]
        if start:
            wanted = torch.baddbmm(wanted, feedback[:, start:stop, :start], errors[:, :start])
        for t in range(start, stop):
            value = wanted[:, t - start]
            if t > start:
                value = torch.baddbmm(
                    value.unsqueeze(1), feedback[:, t : t + 1, start:t], errors[:, start:t]
                ).squeeze(1)
            nearest = grid.nearest(value, t if order is None else order[t])
            values[:, t] = nearest
            torch.sub(anchor[:, t], nearest, out=errors[:, t])
    return values


def descending(H: Tensor) -> Tensor:
    """Columns by falling energy ("act-order"), int64 ``[N]``; one order for all groups, ties by position."""
    return torch.argsort(H.diagonal(dim1=1, dim2=2).mean(0), descending=True, stable=True)


def damped(H: Tensor, damping: float) -> Tensor:
    """``H + damping mean(diag H) I`` for each group, a new tensor; the identity where H is zero."""
    mean = H.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, damping * mean, 1.0)
    result = H.clone()
    result.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return result


@dataclass(frozen=True)
class Factor:
    """``H + damping = U D U^T`` with U unit upper triangular, for each group.

    Attributes:
        feedback: ``U^T``, ``[groups, N, N]``, lower triangular with a unit diagonal.
        diagonal: D, ``[groups, N]``: what is left of ``E x_t^2`` once the columns after t have made up for it
            as far as they can.
        damping: what it took, as a fraction of the mean of the diagonal.
    """

    feedback: Tensor
    diagonal: Tensor
    damping: float


def factored(H: Tensor, damping: float) -> Factor | None:
    """The factors of H; where it has none, damping is raised up to a thousandfold. None if H is not finite.

    Args:
        H: float ``[groups, N, N]``, positive semidefinite.
        damping: added to the diagonal, as a fraction of its mean.
    """
    for attempt in range(_DAMPINGS + 1):
        used = damping * 10**attempt
        # the Cholesky factor of the reversed matrix, reversed back, is upper triangular
        lower, info = torch.linalg.cholesky_ex(damped(H, used).flip(1, 2))
        if not bool(info.any()) and bool(lower.isfinite().all()):
            root = lower.diagonal(dim1=1, dim2=2)
            feedback = (lower / root.unsqueeze(1)).flip(1, 2).mT.contiguous()
            return Factor(feedback, root.square().flip(1), used)
    return None
