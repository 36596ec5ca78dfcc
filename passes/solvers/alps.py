"""ALPS: which weights of a layer stay, and their values, from the moments of its inputs (Meng et al. 2024).

Row by row the new weights v minimise, with ``H = E[x~ x~^T]`` and ``G = E[x~ x^T]``,

    E (w x - v x~)^2 + lambda |w - v|^2     where all v together have a given number of entries, or a pattern

The alternating direction method of multipliers (section 3.1 of the paper) splits v into B, free, and D, on a
support. With the columns scaled to ``diag(A) = 1``, ``A = H + lambda I``, and ``C = w (A + G - H)^T``:

    B = (C + rho (D - U)) (A + rho I)^-1,   T = B + U,   D = T where |T| is largest, else 0,   U = T - D

while rho grows, until the support stands. Then least squares on the support (section 3.3, here
`compress.passes.solvers.refit`), from D on.

Two things differ from the paper. The first rho is half the geometric mean of the eigenvalues of A, which
tells how correlated the inputs are, and it doubles every 4 iterations: 12 are enough. And there is an inverse
for each of the three rho in place of one eigendecomposition: faster, and half the work in an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.numerics import magnitude
from compress.passes.solvers.feedback import damped
from compress.passes.solvers.refit import refit_survivors

Keep = Callable[[Tensor], Tensor]
"""The pattern: scores ``[O, N]``, none negative -> bool mask ``[O, N]``, True = kept."""

_EVERY, _GROWTH = 4, 2.0
"""Iterations at one rho, and the factor to the next."""
_ROWS = 256
_ROUGHLY: dict[str, Any] = {"iterations": 30, "tolerance": 1e-3}
"""Rows by which two supports are compared at first, and how far they are refitted for it."""


def alps(
    weight: Tensor,
    H: Tensor,
    keep: Keep,
    *,
    G: Tensor | None = None,
    damping: float = 0.01,
    iterations: int = 12,
) -> Tensor:
    """Prune a layer; better than `refit_survivors` on the support of the largest weights, or that.

    The two are compared by the objective of the module docstring: on evenly spread rows if those leave no
    doubt (four standard errors), else on all of them.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order.
        H: float32 ``[groups, N, N]``, second moments of the inputs, one for each convolution group.
        keep: which entries stay, given scores for all.
        G: float32 ``[groups, N, N]``, ``E[x~ x^T]``, where the inputs of the original network differ.
        damping: lambda, as a fraction of the mean of diag(H); > 0.
        iterations: of the splitting, at most.

    Returns:
        float32 ``[O, N]``, zero outside the support.
    """
    # one scale for all rows: their entries are compared with one another
    size, unit = magnitude(weight.flatten()), magnitude(H.diagonal(dim1=1, dim2=2).flatten())
    w = (weight.to(H.dtype) / size).reshape(len(H), -1, weight.shape[1])
    layer = _Layer(w, damped(H, damping).div_(unit), None if G is None else (G - H).div_(unit))

    def refit(mask: Tensor, rows: slice, **options: Any) -> Tensor:
        """Least squares on some rows of each group: ``[groups, rows, N]``."""
        some, kept = w[:, rows], mask.view_as(w)[:, rows]
        new = refit_survivors(some.flatten(0, 1), kept.flatten(0, 1), H, G=G, damping=damping, **options)
        return new.view_as(some)

    every = slice(None)
    magnitudes = keep(w.flatten(0, 1).abs())
    split = layer.split(keep, iterations)
    if split is None:
        return refit(magnitudes, every).flatten(0, 1) * size
    # the splitting ends close to the minimiser, from where a few steps do
    found = refit(split != 0, every, start=split, iterations=8, tolerance=0.1)
    for step in sorted({1, max(1, len(w) * w.shape[1] // _ROWS)}, reverse=True):
        rows = slice(None, None, step)
        other = refit(magnitudes, rows) if step == 1 else refit(magnitudes, rows, **_ROUGHLY)
        gain = layer.objective(other, rows) - layer.objective(found[:, rows], rows)
        if step > 1 and float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain)):
            break
        if step == 1 and float(gain.sum()) < 0:
            found = other
    return found.flatten(0, 1) * size


@dataclass(frozen=True)
class _Layer:
    """The objective of the module docstring.

    Attributes:
        w: float32 ``[groups, rows, N]``.
        A: ``H + lambda I``, ``[groups, N, N]``.
        change: ``G - H``; None where it is zero.
    """

    w: Tensor
    A: Tensor
    change: Tensor | None

    def objective(self, values: Tensor, rows: slice) -> Tensor:
        """Of each of some rows, up to a constant of the row: float64, flat.

        Args:
            values: ``[groups, rows, N]``.
        """
        step = values - self.w[:, rows]
        slope = step @ self.A
        if self.change is not None:
            slope -= 2 * (self.w[:, rows] @ self.change.mT)
        return (slope * step).sum(-1, dtype=torch.float64).flatten()

    def split(self, keep: Keep, iterations: int) -> Tensor | None:
        """D of the module docstring, ``[groups, rows, N]``; None where A cannot be factorised."""
        scale = self.A.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)  # [groups, 1, N]
        A = (self.A / scale).div_(scale.mT)
        target = (self.w * scale) @ A
        if self.change is not None:
            target += self.w @ self.change.mT / scale
        factor, failed = torch.linalg.cholesky_ex(A)
        if bool(failed.any()):
            return None
        rho = factor.diagonal(dim1=1, dim2=2).log().mean(1).mul(2).exp().div(2).view(-1, 1, 1)
        del factor
        T = self.w * scale
        mask = keep(T.flatten(0, 1).abs()).view_as(T)
        T = T.masked_fill(~mask, 0.0)
        for i in range(iterations):
            if i % _EVERY == 0:
                if i:
                    rho = rho * _GROWTH
                    T = torch.where(mask, T, T / _GROWTH)  # rho U stays
                inverse = A.clone()
                inverse.diagonal(dim1=1, dim2=2).add_(rho.squeeze(2))
                inverse = torch.linalg.cholesky(inverse)
                inverse = torch.cholesky_inverse(inverse)
            # T is D on the support and U elsewhere
            B = torch.where(mask, T, -T).mul_(rho).add_(target) @ inverse
            T = B.add_(T.masked_fill_(mask, 0.0))
            before, mask = mask, keep(T.flatten(0, 1).abs()).view_as(T)
            if torch.equal(mask, before):
                break
        return torch.where(mask, T, 0.0) / scale
