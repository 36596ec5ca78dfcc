"""Least-squares refit: the best values of the weights that survived pruning.

For each row ``w`` with support S the refit is ``v_S = H_SS^-1 (H w)_S``, the minimiser of the output error
``(w - v) H (w - v)^T`` over all v that are zero outside S. Rows have different supports, so instead of one
factorisation each, all rows are solved together by conjugate gradients on the normal equations, projected
on the support and preconditioned with the diagonal (Meng et al. 2024, ALPS, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics import magnitude


def refit_survivors(
    weight: Tensor,
    mask: Tensor,
    H: Tensor,
    *,
    G: Tensor | None = None,
    damping: float = 0.01,
    start: Tensor | None = None,
    iterations: int = 60,
    tolerance: float = 1e-4,
) -> Tensor:
    """Refit the weights kept by a mask.

    Args:
        weight: float ``[O, N]``, before pruning; its rows belong to the groups of H in order.
        mask: bool ``[O, N]``, True = kept.
        H: float32 ``[G, N, N]``, second moments of the inputs, one for each convolution group.
        G: float32 ``[groups, N, N]``, ``E[x~ x^T]``, where the inputs of the original network differ: the
            right-hand side is then ``(w G^T)_S``.
        damping: added to the diagonal, as a fraction of its mean. The pull is towards `weight`, not
            towards zero.
        start: float ``[O, N]``, values to begin with; `weight` by default.
        iterations: of conjugate gradients at most.
        tolerance: stop when every row's residual has fallen by this factor.

    Returns:
        float32 ``[O, N]``, zero where `mask` is False.
    """
    groups, columns = H.shape[0], weight.shape[1]
    w = weight.to(H.dtype).reshape(groups, -1, columns)
    keep = mask.reshape_as(w)
    # the residuals are squared: of values around 1, they stay within the range of float32
    size = magnitude(w)
    w = w / size
    unit = magnitude(H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)
    A = H / unit
    diagonal = A.diagonal(dim1=1, dim2=2).clone()
    ridge = damping * diagonal.mean(1).clamp_min(1e-30)
    A.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    inverse = 1 / (diagonal + ridge.unsqueeze(1)).unsqueeze(1)
    v = torch.where(keep, w if start is None else start.to(H.dtype).reshape_as(w) / size, 0.0)
    residual = torch.where(keep, (w - v) @ A, 0.0)
    if G is not None:
        residual += torch.where(keep, w @ (G - H).div_(unit).mT, 0.0)
    first = residual.square().sum(-1, keepdim=True)
    z = inverse * residual
    direction, rho = z, (residual * z).sum(-1, keepdim=True)
    for _ in range(iterations):
        image = torch.where(keep, direction @ A, 0.0)
        # a row that is done has a zero direction; dividing by its zero would spread NaN
        step = rho / (direction * image).sum(-1, keepdim=True).clamp_min(1e-38)
        v = v + step * direction
        residual = residual - step * image
        if bool((residual.square().sum(-1, keepdim=True) <= tolerance**2 * first).all()):
            break
        z = inverse * residual
        new = (residual * z).sum(-1, keepdim=True)
        direction = z + (new / rho.clamp_min(1e-38)) * direction
        rho = new
    return (v * size).flatten(0, 1)
