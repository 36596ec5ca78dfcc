"""8-bit weights whose products never overflow 16 bits: exact on processors without VNNI, and as fast.

Before VNNI, x86 multiplies uint8 activations by int8 weights with ``vpmaddubsw``: two neighbouring products
are added in 16 bits *with saturation*. With the full range of codes, 255 * (127 + 127) = 64770 becomes 32767,
and the sum is silently wrong. The usual cure, 7-bit weights (``reduce_range``), halves their resolution.
Less is enough: a pair ``(a, b)`` of codes that share an accumulator never saturates, whatever the
activations are, if and only if::

    max(a, 0) + max(b, 0) <= 128   and   min(a, 0) + min(b, 0) >= -128        (255 * 128 = 32640 < 2^15)

Pairs are the neighbours (0, 1), (2, 3), ... along the kernel's order of summation. Large codes are rare,
and two of one sign side by side are rarer, so few codes have to move, by little. How far scale and codes
move is decided by the layer's output error, ``sum_j h_j (w_j - s q_j)^2`` with ``h_j = E[x_j^2]``, and, where
``H = E[x x^T]`` is known, by coordinate descent within the pair limits (as `descent`, Behdin et al. 2023).

Source of the problem: Intel oneDNN developer guide, "Nuances of int8 computations".
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.activations import PAIR_LIMIT, pairs_of
from compress.passes.solvers.scales import Rounded

_TOP = 127
_RATIOS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 127 / 64)
"""Scales to try, times ``max|w| / 127``; the last one leaves no pair above the limit."""
_BLOCK = 128


def saturation_free(
    weight: Tensor,
    importance: Tensor | None = None,
    H: Tensor | None = None,
    *,
    order: Tensor | None = None,
    paired: bool = True,
    sweeps: int = 3,
    damping: float = 0.01,
) -> Rounded:
    """Round to symmetric int8, one scale for each row, under the pair limits.

    Zeros stay exactly zero, so a pruned weight keeps its pattern.

    Args:
        weight: float ``[O, N]``.
        importance: ``h``, nonnegative float ``[N]`` or ``[O, N]``; None for all ones.
        H: float ``[G, N, N]``, second moments of the inputs, G convolution groups with ``O / G`` rows each;
            None to leave out the descent.
        order: int64 ``[N]``, the columns in the order in which the kernel sums them; None if as they are.
        paired: False for kernels that add in 32 bits at once, such as depthwise ones: no limits.
        sweeps, damping: of the descent; `damping` is added to the diagonal of H as a fraction of its mean.

    Returns:
        uint8 codes ``[O, N]`` (zero point 128), positive float32 scales ``[O, 1]``, no zero points.
    """
    w = weight.detach().float()
    h = torch.ones(w.shape[1]) if importance is None else importance.float().clamp_min(0)
    h = h.expand_as(w) + 1e-12
    if order is not None:
        w, h = w[:, order], h[:, order]
        H = None if H is None else H[:, order][:, :, order]
    base = w.abs().amax(1, keepdim=True) / _TOP
    base = torch.where(base > 0, base, torch.ones_like(base))
    best = torch.full((w.shape[0], 1), torch.inf)
    scale, codes = base.clone(), torch.zeros_like(w)
    for ratio in _RATIOS:
        tried = base * ratio
        candidate = _limited(w / tried, h, paired)
        error = (h * (w - candidate * tried).square()).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        codes = torch.where(better, candidate, codes)
    if H is not None and sweeps:
        codes = _descend(w, codes, scale, H.float(), paired, sweeps, damping)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    return Rounded((codes + 128).to(torch.uint8), scale.contiguous(), None)


def _limited(x: Tensor, h: Tensor, paired: bool) -> Tensor:
    """Nearest codes to real `x` within the range and the pair limits, weighted by `h`.

    Where a pair ``(a, b)`` of one sign is over the limit, the nearest point with ``|a| + |b| = 128`` is
    ``|a| - e h_b / (h_a + h_b)``, with e the excess: the less important one moves more.
    """
    codes = torch.round(x).clamp_(-_TOP, _TOP)
    if not paired:
        return codes
    pairs = pairs_of(codes)
    same = pairs[..., 0] * pairs[..., 1] > 0
    magnitude = pairs.abs()
    over = same & (magnitude.sum(-1) > PAIR_LIMIT)
    if not over.any():
        return codes
    real, weights = pairs_of(x).abs().clamp(max=_TOP), pairs_of(h)
    excess = real.sum(-1) - PAIR_LIMIT
    first = torch.round(real[..., 0] - excess * weights[..., 1] / weights.sum(-1)).clamp_(1, _TOP)
    moved = torch.stack((first, PAIR_LIMIT - first), -1) * pairs.sign()
    return torch.where(over.unsqueeze(-1), moved, pairs).flatten(1)[:, : x.shape[1]]


def _descend(
    weight: Tensor, codes: Tensor, scale: Tensor, H: Tensor, paired: bool, sweeps: int, damping: float
) -> Tensor:
    """Coordinate descent on ``(w - s q) H (w - s q)^T``; every code moves between what its partner allows."""
    groups, columns = H.shape[0], weight.shape[1]
    mean = H.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    H = H + damping * mean.view(-1, 1, 1) * torch.eye(columns)
    diagonal = H.diagonal(dim1=1, dim2=2)
    w, s = weight.reshape(groups, -1, columns), scale.reshape(groups, -1)
    q = codes.reshape(groups, -1, columns).clone()
    gradient = (w - q * s.unsqueeze(-1)) @ H
    for _ in range(sweeps):
        before = q.clone()
        for start in range(0, columns, _BLOCK):
            block = slice(start, min(start + _BLOCK, columns))
            local, moved = gradient[..., block].clone(), torch.zeros_like(q[..., block])
            for i, t in enumerate(range(block.start, block.stop)):
                new = torch.round(q[..., t] + local[..., i] / (diagonal[:, t].unsqueeze(1) * s))
                new.clamp_(-_TOP, _TOP)
                other = t ^ 1
                if paired and other < columns:
                    new = new.minimum(PAIR_LIMIT - q[..., other].clamp(min=0))
                    new = new.maximum(-PAIR_LIMIT - q[..., other].clamp(max=0))
                new = torch.where(w[..., t] == 0, q[..., t], new)
                step = (new - q[..., t]) * s
                q[..., t] = new
                moved[..., i] = step
                local -= step.unsqueeze(-1) * H[:, t, block].unsqueeze(1)
            gradient -= moved @ H[:, block]
        if torch.equal(before, q):
            break
    return q.flatten(0, 1)
