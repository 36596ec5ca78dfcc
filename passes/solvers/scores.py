"""What it costs to remove a weight: the scores that pruning ranks weights by.

Each is the root of what the layer's output error ``E |(w - v) x|^2`` rises by when ``w_j`` becomes zero, so
squares of scores can be added up over a block. They differ in what is taken to be known of the inputs:

=========== ========================= ==================================================================
`magnitude` ``|w_j|``                 nothing: all inputs alike
`wanda`     ``|w_j| sqrt(H_jj)``      their size (Sun et al. 2023, arXiv 2306.11695, eq. 1)
`obs`       ``|w_j| / sqrt(P_jj)``,   their correlations: the weights that stay make up for it (Hassibi and
            ``P = H^-1``              Stork 1992, eq. 5)
=========== ========================= ==================================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.numerics import magnitude
from compress.passes.solvers.feedback import factored

Score = Literal["magnitude", "wanda", "obs"]


def score(
    kind: Score,
    weight: Tensor,
    *,
    diag: Tensor | None = None,
    H: Tensor | None = None,
    damping: float = 0.01,
) -> Tensor:
    """The score of every weight.

    Args:
        kind: see the module docstring.
        weight: float ``[O, N]``; its rows belong to the groups of the inputs in order.
        diag: float ``[groups, N]``, ``E[x_j^2]``, for `wanda`.
        H: float ``[groups, N, N]``, ``E[x x^T]``, for `obs`.
        damping: added to the diagonal of H, as a fraction of its mean.

    Returns:
        float32 ``[O, N]``, not negative.

    Raises:
        ValueError: what the score needs is not given, or H is not finite.
    """
    size = weight.abs().float()
    if kind == "magnitude":
        return size
    if kind == "wanda":
        if diag is None:
            raise ValueError("wanda needs the second moments of the inputs")
        return _times(size, diag.sqrt())
    if H is None:
        raise ValueError("obs needs the second moments of the inputs, with correlations")
    unit = magnitude(H.diagonal(dim1=1, dim2=2))
    factor = factored(H / unit.unsqueeze(-1), damping)
    if factor is None:
        raise ValueError("the second moments of the inputs are not finite")
    # P = U^-T D^-1 U^-1
    identity = torch.eye(H.shape[1], dtype=H.dtype).expand_as(H)
    inverse = torch.linalg.solve_triangular(factor.feedback, identity, upper=False, unitriangular=True)
    P = (inverse.square() / factor.diagonal.unsqueeze(1)).sum(2)
    return _times(size, (unit / P).sqrt())


def _times(size: Tensor, factors: Tensor) -> Tensor:
    """Entries of each row times those of its group."""
    groups, columns = factors.shape
    return (size.view(groups, -1, columns) * factors.float().unsqueeze(1)).flatten(0, 1)
