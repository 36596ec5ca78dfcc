"""What a quantized layer should aim at: the weight that does best on the inputs it will really get.

The layers before this one are compressed already, so its input is x~ where it was x. The least-squares answer
to that, with a ridge that pulls towards the weight as it is (not towards zero), is

    W' = argmin_V E |W x - V x~|^2 + lambda |V - W|^2 = W (G + lambda I)^T (H + lambda I)^-1

with ``H = E[x~ x~^T]`` and ``G = E[x~ x^T]``. At lambda = 0, ``E |W x - q x~|^2`` and ``E |(W' - q) x~|^2``
differ by a constant, so rounding W' with H alone solves the problem with both; with GPTQ that is Qronos
(arXiv 2505.11695) up to its first column. On few samples W' chases noise, so whether it is used, and with
which lambda, is decided on samples that were held out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.passes.solvers.feedback import damped
from compress.passes.solvers.grids import columns_of, rows_of
from compress.passes.solvers.refit import refit_survivors

RIDGES = (0.01, 0.1, 1.0)
"""Tried in turn; fractions of the mean of diag(H)."""
_ENOUGH: dict[str, Any] = {"iterations": 10, "tolerance": 0.01}
"""How far pruned weights are fitted to choose by, and to be rounded."""


class Moments(NamedTuple):
    """``H = E[x~ x~^T]`` and ``G = E[x~ x^T]``, float ``[groups, N, N]``."""

    H: Tensor
    G: Tensor


def refit_target(weight: Tensor, moments: Moments, ridge: float, **accuracy: Any) -> Tensor:
    """W' of the module docstring; exact zeros of the weight stay zero.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order.
        moments: of the inputs; computation is in their dtype.
        ridge: lambda, as a fraction of the mean of diag(H).
        accuracy: of a weight with zeros, `iterations` and `tolerance` of `refit_survivors`.

    Returns:
        ``[O, N]``; the weight itself where H cannot be factorised.
    """
    H, G = moments
    keep = weight != 0
    if not bool(keep.all()):
        return refit_survivors(weight, keep, H, G=G, damping=ridge, **accuracy)
    w = columns_of(weight.to(H.dtype), H.shape[0])
    lower, info = torch.linalg.cholesky_ex(damped(H, ridge))
    if bool(info.any()):
        return weight
    # (H + lambda)^-1 (G + lambda) w = w + (H + lambda)^-1 (G - H) w
    return rows_of(w + torch.cholesky_solve(torch.bmm(G - H, w), lower))


def choose_target(weight: Tensor, moments: Moments, fitting: Moments, held_out: Moments) -> Tensor:
    """W' with the ridge that does best on held-out samples, or the weight if that does better still.

    Args:
        weight: float ``[O, N]``.
        moments: of all samples; the chosen W' is made from these.
        fitting, held_out: of two disjoint parts of them.

    Returns:
        ``[O, N]``.
    """
    some = _some_rows(weight, len(moments.H))
    best, chosen = _error(some, some, held_out), None
    for ridge in RIDGES:
        error = _error(some, refit_target(some, fitting, ridge, **_ENOUGH), held_out)
        if error < best:
            best, chosen = error, ridge
    return weight if chosen is None else refit_target(weight, moments, chosen, **_ENOUGH)


def _some_rows(weight: Tensor, groups: int) -> Tensor:
    """Evenly spread rows, at least 256 if there are so many: enough to choose one number by."""
    rows = weight.view(groups, -1, weight.shape[1])
    return rows[:, :: max(1, rows.shape[1] // 256)].flatten(0, 1)


def _error(weight: Tensor, values: Tensor, moments: Moments) -> float:
    """``E |W x - V x~|^2`` up to a constant that does not depend on V, summed over rows."""
    H, G = moments
    w, v = (columns_of(t.to(H.dtype), H.shape[0]) for t in (weight, values))
    return float((v * (torch.bmm(H, v) - 2 * torch.bmm(G, w))).double().sum())
