"""Alternating least squares for weights that are products: one factor at a time, the others fixed.

A decomposed weight is linear in each of its factors, so with ``H = E[x x^T]`` the error of the layer's
output,

    E |W x - B x|^2 = tr (W - B) H (W - B)^T,    B = contract(.., F_i, ..),

is a quadratic in each of them. It is brought down by conjugate gradients, where the product with B's
derivative comes from automatic differentiation: so a form is its contraction, and no normal equations are
written out. Conjugate gradients never raise the error, wherever they are stopped. (The usual algorithm of
tensor decompositions, Kolda and Bader 2009, section 3.4, in the norm of the outputs.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def alternate(
    contract: Callable[..., Tensor],
    factors: Sequence[Tensor],
    weight: Tensor,
    H: Tensor | None = None,
    *,
    sweeps: int = 3,
    iterations: int = 15,
) -> list[Tensor]:
    """Improve all factors in turn.

    Args:
        contract: of the factors, to ``[O, N]``; linear in each.
        factors: to begin with.
        weight: ``[O, N]``, what they should stand for.
        H: ``[N, N]``, second moments of the inputs; None for the identity.
        sweeps: over all factors.
        iterations: of conjugate gradients at most, for each.

    Returns:
        the factors, of the same shapes and dtypes. The error has not risen.
    """
    found = list(factors)
    for _ in range(sweeps):
        for i in range(len(found)):

            def expand(factor: Tensor, i: int = i) -> Tensor:
                return contract(*found[:i], factor, *found[i + 1 :])

            found[i] = descend(expand, found[i], weight, H, iterations=iterations)
    return found


def descend(
    expand: Callable[[Tensor], Tensor],
    start: Tensor,
    weight: Tensor,
    H: Tensor | None = None,
    *,
    iterations: int = 15,
    tolerance: float = 1e-6,
) -> Tensor:
    """Conjugate gradients on ``tr (W - expand(F)) H (W - expand(F))^T``.

    Args:
        expand: linear, to ``[O, N]``.
        start: F to begin with.
        weight, H: as for `alternate`.
        tolerance: stop when the gradient has fallen by this factor.
    """
    both: Any = torch.func.vjp(expand, start)  # a third only where the function has more to tell
    value, pull = both

    def product(difference: Tensor) -> Tensor:
        back: Tensor
        (back,) = pull(difference if H is None else difference @ H)
        return back

    factor, residual = start.clone(), product(weight - value)
    direction, rho = residual, residual.square().sum()
    least = tolerance**2 * float(rho)
    for _ in range(iterations):
        image = product(expand(direction))
        curvature = float((direction * image).sum())
        if curvature <= 0 or float(rho) <= least:
            break
        step = float(rho) / curvature
        factor = factor + step * direction
        residual = residual - step * image
        new = residual.square().sum()
        direction = residual + (new / rho) * direction
        rho = new
    return factor
