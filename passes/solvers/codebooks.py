"""Tables of a codebook encoding, and the codes and scales that go with one.

For given scales the best table is a one-dimensional weighted k-means problem over the normalised weights
``w / s`` with weights ``h s^2``, and for a given table the scale of a group is a search like that of
`compress.passes.solvers.scales`. Both lower ``sum_j h_j (w_j - s T[c_j])^2`` with ``h_j = E[x_j^2]``,
so they are done in turn. Every table holds an exact 0: pruned weights and padding stay 0.

Sources of the tables:

- ``nf4``: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), appendix E: the 16 published levels.
- ``power``: Yvinec et al. 2023, PowerQuant (arXiv 2301.09858), and NUPES (arXiv 2308.05600): a grid that
  is uniform in ``|w|^a``, so entry c is ``sign(c) |c / C|^(1/a)`` with ``C = 2^(b-1) - 1``. The papers
  leave one code unused; it is given to ``c = -2^(b-1)`` here, so that ``a = 1`` is the symmetric integer
  grid. Codes are nearest in the weight, not in its power, which is never worse.
- ``kmeans``: exact by dynamic programming (Wang and Song 2011, Ckmeans.1d.dp), with one centre held at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codebook import CodebookEncoding
from compress.numerics import magnitude

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_WEIGHTS_AT_ONCE = 1 << 21
"""Weights worked on at a time: bounds the memory of the search to a few dozen MB."""

_EXPONENT_SAMPLE = 1 << 16
_TABLE_SAMPLE = 1 << 22
"""Weights, in whole rows spread evenly, from which the exponent or the centres are found."""

_BINS = 256
"""Bins of the histogram that k-means is solved on."""


@dataclass(frozen=True)
class Coded:
    """uint8 codes ``[O, N]``, float32 table ``[levels]``, float32 scales ``[O, groups]``."""

    codes: Tensor
    table: Tensor
    scales: Tensor


def fit_codebook(
    weight: Tensor, importance: Tensor | None, encoding: CodebookEncoding, *, rounds: int = 2
) -> Coded:
    """Table, codes and scales of least weighted error for the encoding's kind of table.

    Args:
        weight: float ``[O, N]``.
        importance: ``h``, nonnegative float ``[N]`` or ``[O, N]``; None for all ones.
        encoding: the kind of table, its size and the groups.
        rounds: of k-means and scales in turn; stops earlier when the error does not fall.
    """
    w = weight.float()
    h = torch.ones_like(w) if importance is None else importance.float().expand_as(w)
    # errors are squares: of values around 1, they stay within what float32 can tell apart
    h = h / magnitude(h.flatten())
    # a group whose inputs were never active would leave its scale undefined: give all a little weight
    h = h + 1e-6 * h.mean(-1, keepdim=True).clamp_min(1e-6)
    if encoding.table == "nf4":
        return fit_scales(w, h, torch.tensor(NF4), encoding)
    if encoding.table == "power":
        return fit_scales(w, h, power(fit_exponent(w, h, encoding), encoding.bits), encoding)
    best, least = None, float("inf")
    # start with every group's extreme entry at +1: the table then needs only one entry out there
    scales = _extreme(_grouped(w, encoding))
    for _ in range(rounds):
        found = fit_scales(w, h, learned_table(w, h, scales, encoding), encoding)
        error = weighted_error(w, h, found, encoding)
        if best is not None and error >= least:
            break
        best, least, scales = found, error, found.scales
    assert best is not None
    return best


# -- tables ---------------------------------------------------------------------------------------


def power(exponent: float, bits: int) -> Tensor:
    """The grid ``sign(c) |c / (2^(b-1) - 1)|^(1 / exponent)`` for ``c = -2^(b-1) .. 2^(b-1) - 1``.

    Args:
        exponent: a of the module docstring, above 0; 1 gives the integer grid.
    """
    steps = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.float64)
    levels = steps.sign() * (steps.abs() / ((1 << (bits - 1)) - 1)) ** (1 / exponent)
    return levels.float()


def fit_exponent(weight: Tensor, importance: Tensor, encoding: CodebookEncoding) -> float:
    """The exponent in 0.40 .. 1.20 of least weighted error, to 0.01, on a sample of the rows.

    The error is locally convex in the exponent (PowerQuant, section 3.3): a coarse grid, then a fine one
    around its best point.
    """
    every = math.ceil(weight.numel() / _EXPONENT_SAMPLE)
    w, h = weight[::every], importance[::every]

    def error(hundredths: int) -> float:
        table = power(hundredths / 100, encoding.bits)
        return weighted_error(w, h, fit_scales(w, h, table, encoding), encoding)

    coarse = min(range(40, 121, 10), key=error)
    fine = [e for e in range(coarse - 9, coarse + 10, 3) if 40 <= e <= 120]
    middle = min(fine, key=error)
    return min((middle - 1, middle, middle + 1), key=error) / 100


def learned_table(weight: Tensor, importance: Tensor, scales: Tensor, encoding: CodebookEncoding) -> Tensor:
    """The best table for given scales: k-means of ``w / s`` weighted with ``h s^2``, ascending float32.

    Args:
        weight, importance: float ``[O, N]``.
        scales: float ``[O, groups]``; groups whose scale is 0 are left out.
    """
    every = math.ceil(weight.numel() / _TABLE_SAMPLE)
    weight, importance, scales = weight[::every], importance[::every], scales[::every].double()
    scale = scales.repeat_interleave(encoding.width(weight.shape[1]), dim=1)[:, : weight.shape[1]]
    used = scale != 0
    points = weight[used] / scale[used]
    mass = importance[used] * scale[used].square()
    return kmeans(points, mass, encoding.levels).float()


def kmeans(points: Tensor, mass: Tensor, clusters: int, *, bins: int = _BINS) -> Tensor:
    """Weighted one-dimensional k-means with one centre fixed at 0.

    Minimises ``sum_i mass_i min_c (points_i - T_c)^2``; the optimum over all clusterings whose borders
    are borders of a histogram's bins. The bins keep the sums of their own points, so the centres are exact.

    Args:
        points, mass: float64 ``[n]``; mass is nonnegative.
        clusters: centres, the one at 0 included.
        bins: of the histogram, of equal width; time grows with ``clusters * bins^2``.

    Returns:
        float64 ``[clusters]``, ascending; repeats 0 where fewer centres are enough.
    """
    if not points.numel():
        return points.new_zeros(clusters)
    low, high = points.amin(), points.amax()
    place = ((points - low) / (high - low).clamp_min(1e-300) * bins).long().clamp_(0, bins - 1)
    moments = torch.stack(
        [torch.bincount(place, mass * points**k, minlength=bins) for k in range(3)]
    )  # mass, first and second moment of every bin
    sums = torch.nn.functional.pad(moments.cumsum(1), (1, 0))
    total, first, second = (s.unsqueeze(0) - s.unsqueeze(1) for s in sums)  # [i, j]: bins i .. j - 1
    backwards = torch.ones(bins + 1, bins + 1, dtype=torch.bool).tril(-1)
    # what the points of bins i .. j - 1 cost as one cluster: around their mean, and around 0
    mean = first / total.clamp_min(1e-300)
    free = (second - first * mean).clamp_min(0).masked_fill(backwards, torch.inf)
    fixed = second.clamp_min(0).masked_fill(backwards, torch.inf)
    # best[z][j]: cost of the first j bins so far, z = 1 once the cluster at 0 is among the clusters
    start = torch.full((bins + 1,), torch.inf, dtype=torch.float64)
    start[0] = 0
    best = [start, torch.full_like(start, torch.inf)]
    trace = []
    for _ in range(clusters):
        plain, plain_from = (best[0].unsqueeze(1) + free).min(0)
        kept, kept_from = (best[1].unsqueeze(1) + free).min(0)
        now, now_from = (best[0].unsqueeze(1) + fixed).min(0)
        trace.append((plain_from, kept_from, now_from, now < kept))
        best = [plain, torch.minimum(kept, now)]
    centres, j, has_zero = [], bins, True
    for plain_from, kept_from, now_from, is_now in reversed(trace):
        if has_zero and bool(is_now[j]):
            i, centre, has_zero = int(now_from[j]), 0.0, False
        else:
            i = int((kept_from if has_zero else plain_from)[j])
            centre = float(mean[i, j]) if i < j else 0.0
        centres.append(centre)
        j = i
    return torch.tensor(sorted(centres), dtype=torch.float64)


# -- codes and scales -----------------------------------------------------------------------------


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry nearest to each value, int64; `table` is ascending."""
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)


def fit_scales(weight: Tensor, importance: Tensor, table: Tensor, encoding: CodebookEncoding) -> Coded:
    """Codes and scales of least weighted error for a given table.

    For each group, clip ratios of the extreme entry are tried with both signs (the table need not be
    symmetric), then scale and codes are refitted in turn, ``s = sum h w t / sum h t^2`` with ``t = T[c]``,
    as long as the error falls.

    Args:
        weight, importance: float32 ``[O, N]``.
        table: float32 ``[levels]``, ascending, with a 0.
    """
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    parts = [
        _fit_scales(w, h, table, encoding)
        for w, h in zip(weight.split(rows), importance.split(rows), strict=True)
    ]
    return Coded(torch.cat([p.codes for p in parts]), table, torch.cat([p.scales for p in parts]))


_RATIOS = {
    # clip ratios tried at each width: the fewer the levels, the more clipping can pay
    2: tuple(0.30 + 0.05 * i for i in range(17)),
    3: tuple(0.45 + 0.05 * i for i in range(14)),
    4: tuple(0.60 + 0.05 * i for i in range(10)),
}


def _fit_scales(weight: Tensor, importance: Tensor, table: Tensor, encoding: CodebookEncoding) -> Coded:
    original, h = _grouped(weight, encoding), _grouped(importance, encoding)
    size = magnitude(original)
    w, h = original / size, h / magnitude(h)
    extreme = _extreme(w)
    best = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    least = torch.full_like(best, torch.inf)
    levels = torch.zeros_like(w)

    def attempt(scale: Tensor) -> None:
        nonlocal best, least, levels
        found = table[nearest(w / scale.unsqueeze(-1), table)]
        error = (h * (w - found * scale.unsqueeze(-1)).square()).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        levels = torch.where(better.unsqueeze(-1), found, levels)

    for end in (table[0], table[-1]):
        if end != 0:
            for ratio in _RATIOS[encoding.bits]:
                scale = extreme * ratio / end
                attempt(torch.where(scale == 0, torch.ones_like(scale), scale))
    for _ in range(4):
        refit = (h * w * levels).sum(-1) / (h * levels.square()).sum(-1).clamp_min(1e-30)
        attempt(torch.where(refit == 0, best, refit))
    scale = best * size.squeeze(-1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = nearest(original / scale.unsqueeze(-1), table)
    return Coded(codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8), table, scale)


def weighted_error(weight: Tensor, importance: Tensor, coded: Coded, encoding: CodebookEncoding) -> float:
    """``sum h (w - w^)^2``, in units of a power of two that depends on the weight only.

    Args:
        weight, importance: float ``[O, N]``.
    """
    size = magnitude(weight.flatten())
    d = (weight - values(coded, encoding)) / size
    return float((importance * d.square()).double().sum())


def values(coded: Coded, encoding: CodebookEncoding) -> Tensor:
    """What the codes stand for, float32 ``[O, N]``."""
    columns = coded.codes.shape[1]
    scale = coded.scales.repeat_interleave(encoding.width(columns), dim=1)[:, :columns]
    return coded.table[coded.codes.int()] * scale


def _extreme(grouped: Tensor) -> Tensor:
    """The entry of largest magnitude in each group, with its sign: ``[..., width]`` -> ``[...]``."""
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _grouped(matrix: Tensor, encoding: CodebookEncoding) -> Tensor:
    """``[O, N]`` -> ``[O, groups, width]``, zero padded."""
    columns = matrix.shape[1]
    groups, width = encoding.groups(columns), encoding.width(columns)
    padded = torch.nn.functional.pad(matrix, (0, groups * width - columns))
    return padded.reshape(-1, groups, width)
