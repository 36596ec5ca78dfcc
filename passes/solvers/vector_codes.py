"""Vectors as sums of entries of codebooks: weighted k-means, stage after stage on what is left.

One stage is k-means (Lloyd 1982): ``x_v ~ C[m(v)]``. With J stages, each made for the residual of those
before it, ``x_v ~ C_1[m_1(v)] + .. + C_J[m_J(v)]`` (residual vector quantization; Juang and Gray 1982, Chen
et al. 2010): as many different vectors as the product of the codebooks' sizes, at the price of their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ITERATIONS = 25
_AT_ONCE = 1 << 22
"""Distances held at a time."""


@dataclass(frozen=True)
class VectorCodes:
    """``x_v = sum_j codebooks[j][maps[j, v]]``.

    Attributes:
        codebooks: float ``[K_j, N]`` for each stage.
        maps: int64 ``[J, V]``.
    """

    codebooks: tuple[Tensor, ...]
    maps: Tensor

    def decode(self) -> Tensor:
        """The vectors it stands for, ``[V, N]``."""
        rows = [c[m] for c, m in zip(self.codebooks, self.maps, strict=True)]
        return torch.stack(rows).sum(0)


def residual_codes(
    points: Tensor, mass: Tensor, codes: int, stages: int, *, alone: Tensor | None = None, seed: int = 0
) -> VectorCodes:
    """Codebooks and codes of small ``sum_v mass_v |x_v - x^_v|^2``.

    Args:
        points: float ``[V, N]``.
        mass: positive float ``[V]``.
        codes: entries of each codebook; no more of them are made than there are points.
        stages: number of codebooks.
        alone: int64, points that keep an entry of the first codebook to themselves, behind the `codes`
            others, and are exact. None for none.
        seed: of the first centres.
    """
    alone = torch.empty(0, dtype=torch.long) if alone is None else alone
    shared = torch.ones(len(points), dtype=torch.bool)
    shared[alone] = False
    maps = torch.zeros(stages, len(points), dtype=torch.long)
    books = []
    rest = points[shared]
    for stage in range(stages):
        book, own = kmeans(rest, mass[shared], codes, seed=seed + stage)
        rest = rest - book[own]
        maps[stage, shared] = own
        books.append(book)
    if len(alone):
        later = sum((book[0] for book in books[1:]), torch.zeros_like(points[0]))
        maps[0, alone] = len(books[0]) + torch.arange(len(alone))
        books[0] = torch.cat((books[0], points[alone] - later))
    return VectorCodes(tuple(books), maps)


def kmeans(
    points: Tensor, mass: Tensor, clusters: int, *, iterations: int = _ITERATIONS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Weighted k-means: centres float ``[K, N]``, and the nearest of them for each point, int64 ``[V]``.

    The first centres are points drawn by mass; a cluster that loses all its points is given the one that fits
    worst. No iteration raises ``sum_v mass_v |x_v - c_m(v)|^2``.

    Args:
        points: float ``[V, N]``.
        mass: positive float ``[V]``.
        clusters: K; fewer where there are fewer points.
        iterations: at most; ends when no point changes its cluster.
        seed: of the draw.
    """
    clusters = min(clusters, len(points))
    generator = torch.Generator().manual_seed(seed)
    # the points of the largest exponential clocks: a draw by mass without replacement, of any number of them
    clocks = torch.empty(len(points), dtype=torch.float64).exponential_(generator=generator)
    centres = points[(clocks / mass.double()).topk(clusters, largest=False).indices].clone()
    nearest, distance = _nearest(points, centres)
    for _ in range(iterations):
        total = torch.zeros_like(centres).index_add_(0, nearest, points * mass.unsqueeze(1))
        weight = mass.new_zeros(clusters).index_add_(0, nearest, mass)
        empty = (weight == 0).nonzero().flatten()
        centres = total / weight.clamp_min(torch.finfo(weight.dtype).tiny).unsqueeze(1)
        if len(empty):
            centres[empty] = points[(distance * mass).topk(len(empty)).indices]
        before = nearest
        nearest, distance = _nearest(points, centres)
        if torch.equal(before, nearest):
            break
    return centres, nearest


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre of each point, and its squared distance."""
    lengths = centres.square().sum(1)
    found = [
        (lengths - 2 * part @ centres.mT).min(1) for part in points.split(max(1, _AT_ONCE // len(centres)))
    ]
    nearest = torch.cat([f.indices for f in found])
    distance = torch.cat([f.values for f in found]) + points.square().sum(1)
    return nearest, distance.clamp_min(0)
