"""How many singular values stand out of noise, by empirical variational Bayes.

After Nakajima, Sugiyama, Babacan and Tomioka 2013, JMLR 14, the global analytic solution of variational
Bayesian matrix factorization. A matrix ``[L, M]``, ``L <= M``, is taken for one of low rank with white noise
of variance s^2. The free energy splits into one term for each singular value g, which, with ``a = L / M`` and
``x = g^2 / (M s^2)``, is up to constants

    x - log x + min(0, min_{p, q >= 0} log(1 + p) + a log(1 + q) - x p q / ((1 + p) (1 + q)))

where p and q are signal to noise of the two factors, and 0 stands for a value that is left out. The inner
minimum is at ``p = T, q = T / a`` with ``2 T = x - 1 - a + sqrt((x - 1 - a)^2 - 4 a)``. So everything is
known once s^2 is, which minimises the sum.

Kim et al. (2016) take the ranks of Tucker-2 from it. It knows neither the inputs nor a budget, and weights
are not signal and white noise: it says how much structure a weight has, not how much of it a model needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POINTS, _ROUNDS = 256, 4
"""Values of s^2 that are looked at, and how often, each time between the neighbours of the best."""


def evidence_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values of a matrix are kept.

    Args:
        values: float ``[K]``, the singular values, K = min(shape), falling.
        shape: of the matrix.
    """
    short, long = sorted(shape)
    x = values.double().square() / long
    if not float(x[0]) > 0:
        return 0
    x = (x / x[0]).clamp_min(1e-24)
    return int((_gain(x / _noise(x, short / long), short / long) < 0).sum())


def _gain(x: Tensor, a: float) -> Tensor:
    """What keeping a value adds to the free energy; 0 where it is left out."""
    middle = x - 1 - a
    root = middle.square() - 4 * a
    T = torch.where((root > 0) & (middle > 0), (middle + root.clamp_min(0).sqrt()) / 2, 0.0)
    return (T.log1p() + a * (T / a).log1p() - T).clamp_max(0)


def _noise(x: Tensor, a: float) -> float:
    """s^2 that minimises the free energy, for values g^2 / M."""
    # with more noise than this nothing is left out of it, and with less all is kept
    low, high = float(x[-1]) / 100, float(x.mean()) * 1.01
    for _ in range(_ROUNDS):
        tried = torch.logspace(math.log10(low), math.log10(high), _POINTS, dtype=torch.float64)
        scaled = x / tried.unsqueeze(1)
        best = int((scaled - scaled.log() + _gain(scaled, a)).sum(1).argmin())
        low, high = float(tried[max(0, best - 1)]), float(tried[min(_POINTS - 1, best + 1)])
    return float(tried[best])
