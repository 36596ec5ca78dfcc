"""Cyclic coordinate descent over the entries of a table: better codes for given table and scales.

The step is that of `compress.passes.solvers.descent`, with the nearest entry of a table in the place of
rounding: all codes but one held fixed, the output error ``(w - q) H (w - q)^T`` of a row is least at
``q_t + r_t / H_tt`` with ``r = (w - q) H``, and among the values a code can take, at the one nearest to it.
No step raises the error (QuantEase, Behdin et al. 2023, section 3; it holds for any set of values).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codebook import CodebookEncoding
from compress.numerics import magnitude
from compress.passes.solvers.codebooks import Coded, nearest, values

_BLOCK = 128


def codebook_descent(
    weight: Tensor,
    coded: Coded,
    H: Tensor,
    encoding: CodebookEncoding,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
) -> Coded:
    """Move codes to lower the output error; table and scales stay.

    Entries of the weight that are exactly zero keep their code, that of 0.

    Args:
        weight: float ``[O, N]``; its rows belong to the groups of H in order, equally many to each.
        coded: where to start from.
        H: float32 ``[G, N, N]``, second moments of the inputs, one for each convolution group
            (G = 1 elsewhere).
        encoding: of `coded`.
        sweeps: passes over all columns at most; stops early when no code moves.
        damping: added to the diagonal, as a fraction of its mean: a pull towards plain rounding.
    """
    groups, columns = H.shape[0], weight.shape[1]
    w = weight.float().reshape(groups, -1, columns)
    H = H / magnitude(H.diagonal(dim1=1, dim2=2)).unsqueeze(-1)
    mean = H.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    H = H + damping * mean.view(-1, 1, 1) * torch.eye(columns)
    diagonal = H.diagonal(dim1=1, dim2=2)
    scale = coded.scales.repeat_interleave(encoding.width(columns), dim=1)[:, :columns].reshape_as(w)
    # a group of zeros only has nothing to move, and nothing may divide by its scale
    movable = (w != 0) & (scale != 0)
    divisor = torch.where(scale == 0, 1.0, scale)
    q = values(coded, encoding).reshape_as(w)
    codes = coded.codes.long().reshape_as(w)
    gradient = (w - q) @ H
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, columns, _BLOCK):
            block = slice(start, min(start + _BLOCK, columns))
            local, moved = gradient[..., block].clone(), torch.zeros_like(q[..., block])
            for i, t in enumerate(range(block.start, block.stop)):
                wanted = q[..., t] + local[..., i] / diagonal[:, t].unsqueeze(1)
                code = torch.where(
                    movable[..., t], nearest(wanted / divisor[..., t], coded.table), codes[..., t]
                )
                value = coded.table[code] * scale[..., t]
                step = value - q[..., t]
                codes[..., t], q[..., t], moved[..., i] = code, value, step
                local -= step.unsqueeze(-1) * H[:, t, block].unsqueeze(1)
            gradient -= moved @ H[:, block]
        if torch.equal(before, codes):
            break
    return Coded(codes.flatten(0, 1).to(torch.uint8), coded.table, coded.scales)
