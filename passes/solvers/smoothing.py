"""How much of an activation's range to move into the weight: per-channel scales of least output error.

A layer ``y = W x`` is ``y = (W diag(s)) (x / s)`` for any positive s. With x rounded on one grid for the
whole tensor (step ``R / 255``, R the range of ``x / s``) and each row of W on its own (step
``max_j |w_oj| s_j / 127``), rounding noise being white with variance step^2 / 12, the squared error is ::

    E(s) =  (R / 255)^2 / 12  sum_j s_j^2 sum_o w_oj^2
            +  sum_o (max_j |w_oj| s_j / 127)^2 / 12  sum_j E[x_j^2] / s_j^2

A convolution has several taps for each j: sums and maxima run over them as well.

Two families of s are tried and the best is taken: SmoothQuant's ``s_j = max|x_j|^a / max_o|w_oj|^(1-a)`` over
the migration strength a (Xiao et al. 2023, equation 4, there with one strength for the whole model), and
``s_j = max(1, max|x_j| / t)``, which touches outliers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_STRENGTHS = tuple(i / 20 for i in range(4, 20))
_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Smoothing:
    """What the search found.

    Attributes:
        scales: float32 ``[N]``, positive; divide the activation by it and multiply the weight's columns.
        gain: predicted squared error without over with, at least 1.
        error_before: predicted relative error of the output without, a fraction.
    """

    scales: Tensor
    gain: float
    error_before: float


def smoothing(low: Tensor, high: Tensor, energy: Tensor, weight: Tensor) -> Smoothing:
    """Per-channel scales of least predicted output error.

    Args:
        low, high: float ``[N]``, smallest and largest value of each input channel.
        energy: float ``[N]``, ``E[x_j^2]``.
        weight: float ``[O, N]`` or ``[O, N, taps]``; of all layers that read the input, one below the other.
    """
    w = weight.double().reshape(*weight.shape[:2], -1)
    magnitude = torch.maximum(-low, high).double().clamp_min(1e-12)
    columns, tops = w.square().sum((0, 2)), w.abs().amax(2)
    low, high, energy = low.double(), high.double(), energy.double()

    def error(s: Tensor) -> float:
        reach = float((high / s).max().clamp(min=0) - (low / s).min().clamp(max=0))
        rounding = (reach / 255) ** 2 * float((columns * s.square()).sum())
        steps = (tops * s).amax(1) / 127
        return rounding + float(steps.square().sum() * (energy / s.square()).sum())

    alive = magnitude > 1e-6 * magnitude.max()
    weights = tops.amax(0).clamp_min(1e-5 * float(tops.max()) + 1e-12)
    candidates = [magnitude**a / weights ** (1 - a) for a in _STRENGTHS]
    candidates += [(magnitude / torch.quantile(magnitude, q)).clamp_min(1) for q in _QUANTILES]
    best, scales = error(torch.ones_like(magnitude)), torch.ones_like(magnitude)
    plain = best
    for s in candidates:
        # a channel that never fires says nothing about its range; leave it as it is
        s = torch.where(alive, s / s[alive].log().mean().exp(), torch.ones_like(s))
        found = error(s)
        if found < best:
            best, scales = found, s
    output = 12 * float((columns * energy).sum())
    before = math.sqrt(plain / output) if output > 0 else 0.0
    return Smoothing(scales.float(), plain / best if best > 0 else 1.0, before)
