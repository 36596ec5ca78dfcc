"""SparseGPT: columns are pruned one after the other, and those to come make up for it as far as they can.

With ``H = U D U^T``, U unit upper triangular, what was removed before column t moves it to
``w_t + sum_{j<t} (w_j - v_j) U[j, t]``, as in GPTQ (`compress.passes.solvers.gptq`); then to remove an entry
of it costs ``w_t^2 D_t``. The mask is chosen when its columns are reached: of every m columns n stay, or the
best of a few columns.

Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. Two things differ. The paper takes as many
from every 128 columns; we take from every 8 as many as OBS scores of the whole layer say, because columns are
not alike. And what stays is better refitted (`compress.passes.solvers.refit`): values found on the way know
the columns after them only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics import magnitude
from compress.passes.solvers.feedback import factored
from compress.passes.solvers.grids import columns_of, rows_of
from compress.passes.solvers.masks import keep_count, keep_n_of_m
from compress.passes.solvers.scores import score

_BLOCK = 128
"""Columns whose sums over all before them are one matrix product."""

_WIDTH = 8
"""Columns that a mask is chosen for at a time, where it has no groups of its own."""


def sparsegpt(
    weight: Tensor, H: Tensor, keep: int, *, n: int = 0, m: int = 0, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Prune by error diffusion.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order.
        H: float ``[groups, N, N]``, second moments of the inputs; computation is in its dtype.
        keep: number of weights that stay.
        n, m: instead, `n` of every `m` consecutive columns of each row, N a multiple of `m`; 0 if not.
        damping: added to the diagonal, as a fraction of its mean.

    Returns:
        values ``[O, N]`` in the dtype of H, and the bool mask of those that stay. Counts are exact.

    Raises:
        ValueError: H is not finite.
    """
    H = H / magnitude(H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)
    factor = factored(H, damping)
    if factor is None:
        raise ValueError("the second moments of the inputs are not finite")
    w = columns_of(weight.to(H.dtype), H.shape[0])
    costs, feedback = factor.diagonal.sqrt().unsqueeze(-1), factor.feedback
    columns, width = w.shape[1], m or _WIDTH
    if not m:
        by_score = keep_count(score("obs", weight, H=H, damping=damping), keep)
        counts: list[int] = columns_of(by_score, H.shape[0]).sum((0, 2)).tolist()
    values, errors, mask = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w, dtype=torch.bool)
    step = max(_BLOCK // width, 1) * width
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        pull = feedback[:, start:stop, :start] @ errors[:, :start]
        for t in range(start, stop):
            if t % width == 0:
                here = slice(t, min(t + width, stop))
                now = pull[:, here.start - start : here.stop - start]
                now = torch.baddbmm(now, feedback[:, here, start:t], errors[:, start:t])
                # as if all of these stayed: what moves one of them moves those after it too
                now = torch.linalg.solve_triangular(
                    feedback[:, here, here], now, upper=False, unitriangular=True
                )
                scores = (w[:, here] + now).abs() * costs[:, here]
                mask[:, here] = (
                    keep_n_of_m(scores.mT, n, m).mT if m else keep_count(scores, sum(counts[here]))
                )
            value = pull[:, t - start].unsqueeze(1)
            value = torch.baddbmm(value, feedback[:, t : t + 1, start:t], errors[:, start:t]).squeeze(1)
            torch.mul(w[:, t] + value, mask[:, t], out=values[:, t])
            torch.sub(w[:, t], values[:, t], out=errors[:, t])
    return rows_of(values), rows_of(mask)
