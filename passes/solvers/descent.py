"""Cyclic coordinate descent on the integer grid: better rounding for given scales.

With ``H = E[x x^T]`` the output error of a row is ``(w - q) H (w - q)^T``. All codes but one held fixed,
the best value of coordinate t is ``q_t + r_t / H_tt`` with ``r = (w - q) H``, rounded to the grid. Sweeping
over the columns never raises the error, needs no factorisation, and so works for singular H too
(few samples, tiny convolutions). Rows are independent and done together; columns are done in blocks,
so that most of the work is one matrix product for each block.

Source: the descent step is that of QuantEase (Behdin et al. 2023, section 3), applied to codes that
`scales.search_scales` rounded first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.numerics import magnitude
from compress.passes.solvers.scales import Rounded

_BLOCK = 128


def coordinate_descent(
    weight: Tensor,
    rounded: Rounded,
    H: Tensor,
    encoding: IntEncoding,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
) -> Rounded:
    """Move codes to lower the output error; scales and zero points stay.

    Entries of the weight that are exactly zero keep the code of zero, so a sparsity pattern survives.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        rounded: where to start from.
        H: float32 ``[G, N, N]``, second moments of the inputs, one for each convolution group
            (G = 1 elsewhere).
        encoding: of `rounded`.
        sweeps: passes over all columns at most; stops early when no code moves.
        damping: added to the diagonal, as a fraction of its mean: a pull towards plain rounding
            that keeps the solution from chasing the calibration samples.

    Returns:
        new codes with the same scales and zero points.
    """
    groups, columns = H.shape[0], weight.shape[1]
    w = weight.float().reshape(groups, -1, columns)
    H = H / magnitude(H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)
    mean = H.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    H = H + damping * mean.view(-1, 1, 1) * torch.eye(columns)
    diagonal = H.diagonal(dim1=1, dim2=2)
    scale = _expand(rounded.scales, encoding, columns).view_as(w)
    if rounded.zero_points is None:
        zero = torch.full_like(scale, encoding.zero)
    else:
        zero = _expand(rounded.zero_points.float(), encoding, columns).view_as(w)
    frozen = w == 0
    codes = rounded.codes.float().view_as(w)
    gradient = (w - (codes - zero) * scale) @ H
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, columns, _BLOCK):
            block = slice(start, min(start + _BLOCK, columns))
            local, moved = gradient[..., block].clone(), torch.zeros_like(codes[..., block])
            for i, t in enumerate(range(block.start, block.stop)):
                s, z, q = scale[..., t], zero[..., t], codes[..., t]
                wanted = (q - z) * s + local[..., i] / diagonal[:, t].unsqueeze(1)
                new = (torch.round(wanted / s) + z).clamp_(0, encoding.levels - 1)
                new = torch.where(frozen[..., t], q, new)
                step = (new - q) * s
                codes[..., t] = new
                moved[..., i] = step
                local -= step.unsqueeze(-1) * H[:, t, block].unsqueeze(1)
            gradient -= moved @ H[:, block]
        if torch.equal(before, codes):
            break
    return Rounded(codes.flatten(0, 1).to(torch.uint8), rounded.scales, rounded.zero_points)


def _expand(per_group: Tensor, encoding: IntEncoding, columns: int) -> Tensor:
    """``[O, groups]`` -> ``[O, N]``."""
    return per_group.repeat_interleave(encoding.width(columns), dim=1)[:, :columns]
