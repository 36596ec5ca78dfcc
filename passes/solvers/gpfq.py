"""GPFQ, greedy path-following quantization: each value makes up for the errors before it.

For a row w, inputs X of the original and X~ of the compressed network (columns ``X_t``, ``X~_t``),
for t = 1, 2, ..:

    u <- u + w_t X_t;   q_t = Q(<X~_t, u> / ||X~_t||^2);   u <- u - q_t X~_t

so that q_t is the exact minimiser of ``||u + w_t X_t - p X~_t||`` over the grid, and at the end
``u = X w - X~ q``. It corrects errors already made, also those of earlier layers (X~ against X), and never
touches weights to come; that is what GPTQ does. `gpfq_samples` is this, word for word. `gpfq` is the same
from second moments, ``H = X~^T X~`` and ``G = X~^T X``, whose size does not depend on the number of samples:

    q_t = Q( [ sum_{j<=t} G[t, j] w_j - sum_{j<t} H[t, j] q_j ] / H[t, t] )

Sources: Lybrand and Saab 2021 (arXiv 2010.15703); Zhang, Zhou and Saab 2023 (arXiv 2201.11113), section 2.
An input that is never active (``H[t, t] = 0``) says nothing about its weight; it is rounded as it is,
where the authors' code writes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.passes.solvers.feedback import descending, round_with_feedback
from compress.passes.solvers.grids import Grid, columns_of, rows_of


def gpfq(
    weight: Tensor, H: Tensor, grid: Grid, *, G: Tensor | None = None, act_order: bool = False
) -> Tensor:
    """Quantize from second moments.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        H: float ``[groups, N, N]``, ``E[x~ x~^T]``; computation is in its dtype.
        grid: where values may lie.
        G: the same shape, ``E[x~ x^T]``; None where x = x~.
        act_order: columns by falling ``H[t, t]`` instead of as they are; nearly always better.

    Returns:
        ``[O, N]``, every value on the grid.
    """
    w = columns_of(weight.to(H.dtype), H.shape[0])
    order = descending(H) if act_order else None
    if order is not None:
        w, H = w[:, order], H[:, order][:, :, order]
        G = None if G is None else G[:, order][:, :, order]
    energy = H.diagonal(dim1=1, dim2=2)
    inverse = torch.where(energy > 0, 1 / energy, 0.0).unsqueeze(-1)
    base = w
    if G is not None:
        base = torch.baddbmm(w, inverse * (G - H).tril_(), w)
    values = round_with_feedback(base, w, inverse * H, grid, None if order is None else order.tolist())
    if order is not None:
        values = values[:, torch.argsort(order)]
    return rows_of(values)


def gpfq_samples(weight: Tensor, x: Tensor, x_tilde: Tensor, grid: Grid) -> Tensor:
    """The definition, on the samples themselves: slow, and the truth `gpfq` is tested against.

    Args:
        weight: float ``[O, N]``.
        x, x_tilde: ``[m, N]``, one row for each sample; all in one dtype.
        grid: where values may lie; one convolution group.

    Returns:
        ``[O, N]``, every value on the grid.
    """
    u = x.new_zeros(x.shape[0], weight.shape[0])
    q = torch.empty_like(weight)
    for t in range(weight.shape[1]):
        u += torch.outer(x[:, t], weight[:, t])
        energy = x_tilde[:, t].square().sum()
        wanted = x_tilde[:, t] @ u / energy if energy > 0 else weight[:, t]
        q[:, t] = grid.nearest(wanted.unsqueeze(0), t).squeeze(0)
        u -= torch.outer(x_tilde[:, t], q[:, t])
    return q
