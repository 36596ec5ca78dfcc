"""The best scales for given codes, in closed form, with all correlations between inputs.

With codes fixed, ``q_j = s_g(j) c_j`` (c: code minus zero point) is linear in the scales of a row, and the
output error ``(w - q) H (w - q)^T`` is least where

    M s = b,   M[g, g'] = sum_{j in g, k in g'} c_j H_jk c_k,   b[g] = sum_{j in g} c_j (H w)_j

one small system for each row. Alternated with coordinate descent on the codes it never raises the error.
For one scale per row this is the closing step of Beacon (Zhang and Saab 2025, arXiv 2508.20293).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.passes.solvers.feedback import damped
from compress.passes.solvers.scales import Rounded

_AT_ONCE = 1 << 22
"""Entries of ``[rows, N]`` worked on at a time."""


def refit_scales(
    weight: Tensor, rounded: Rounded, H: Tensor, encoding: IntEncoding, *, damping: float = 0.01
) -> Rounded:
    """New scales for the same codes and zero points.

    A scale keeps its sign, a group without nonzero codes keeps its scale, and a row whose error would not
    fall keeps them all.

    Args:
        weight: the target, float ``[O, N]``; its rows belong to the groups of H in order.
        rounded: codes, scales and zero points.
        H: float32 ``[groups, N, N]``, second moments of the inputs.
        encoding: of `rounded`.
        damping: added to the diagonal, as a fraction of its mean; the same as in the descent around it.
    """
    groups, columns = H.shape[0], weight.shape[1]
    H = damped(H, damping)
    steps = _steps(rounded, encoding).to(H.dtype)
    rows = weight.shape[0] // groups
    at_once = max(1, _AT_ONCE // max(columns, rounded.scales.shape[1] ** 2))
    parts = []
    for k in range(groups):
        for start in range(k * rows, (k + 1) * rows, at_once):
            part = slice(start, min(start + at_once, (k + 1) * rows))
            w, old = weight[part].to(H.dtype), rounded.scales[part]
            parts.append(_solve(w, steps[part], old, H[k], encoding.width(columns)))
    return Rounded(rounded.codes, torch.cat(parts), rounded.zero_points)


def _solve(w: Tensor, c: Tensor, old: Tensor, H: Tensor, width: int) -> Tensor:
    count = old.shape[1]

    def by_group(products: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(products, (0, count * width - products.shape[1]))
        return padded.view(-1, count, width).sum(-1)

    b = by_group(c * (w @ H))
    M = w.new_empty(len(w), count, count)
    for g in range(count):
        here = slice(g * width, min((g + 1) * width, w.shape[1]))
        M[:, g] = by_group(c * (c[:, here] @ H[here]))
    empty = M.diagonal(dim1=1, dim2=2) <= 0
    # an empty group: its row and column of M are zero; 1 s = s_old leaves it as it is
    M.diagonal(dim1=1, dim2=2).add_(empty.to(M.dtype))
    b = torch.where(empty, old.to(b.dtype), b)
    lower, info = torch.linalg.cholesky_ex(M)
    solved = torch.cholesky_solve(b.unsqueeze(-1), lower).squeeze(-1)
    # a scale of the other sign would turn an asymmetric range around, and one near zero round all of it away
    new = torch.where(solved * old > 0.1 * old.square(), solved, old.to(solved.dtype))

    def error(s: Tensor) -> Tensor:
        return (s * ((M @ s.unsqueeze(-1)).squeeze(-1) - 2 * b)).sum(1)

    better = (info == 0) & (error(new) < error(old.to(new.dtype)))
    return torch.where(better.unsqueeze(1), new.to(old.dtype), old)


def _steps(rounded: Rounded, encoding: IntEncoding) -> Tensor:
    columns = rounded.codes.shape[1]
    if rounded.zero_points is None:
        return rounded.codes.float() - encoding.zero
    zero = rounded.zero_points.float().repeat_interleave(encoding.width(columns), dim=1)[:, :columns]
    return rounded.codes.float() - zero
