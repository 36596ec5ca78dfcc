"""How much each layer keeps, given how much all of them keep together.

A provider is a family of densities (fractions of weights kept) that rise with one number t; t is found so
that the weights kept sum to the budget. Capping belongs to the family: what a full layer cannot take goes to
the others, because t rises for all.

============ ========================================= ====================================================
`uniform`    ``t``                                     the same everywhere
`uniform+`   ``t``, first convolution 1, last fully    Gale et al. 2019 (arXiv 1902.09574), section 6
             connected layer at least 0.2
`er`         ``t (n_in + n_out) / (n_in n_out)``       Mocanu et al. 2018 (arXiv 1707.04780), eq. 2
`erk`        ``t sum(shape) / prod(shape)``            Evci et al. 2020, RigL (arXiv 1911.11134), section 3
`balanced`   ``t / size``: equal numbers of weights    Gadhikar et al. 2023 (arXiv 2210.02412), section 4
`pyramidal`  ``t^l`` for the l-th layer, l = 1, 2, ..  the same
`owl`        ``t + 2 lambda`` times the share of       Yin et al. 2023 (arXiv 2310.05175), section 3.2; a
             outliers, normalised to 0 .. 1            share for each transformer block there, weight here
`global`     what is left of all scores ranked         Han et al. 2015 (arXiv 1506.02626)
             together
============ ========================================= ====================================================

As fixed masks for training from scratch: Liu et al. 2022 (arXiv 2202.02643) find `erk` the best of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from compress.passes.solvers.masks import keep_largest_of

Ratios = Literal["uniform", "uniform+", "er", "erk", "balanced", "pyramidal", "owl", "global"]

OUTLIER = 5.0
"""M of OWL: a score this many times the mean of its layer is an outlier."""

_LAMBDA = 0.08
"""Of OWL: the densities of two layers differ by twice this at most."""

_LAST_DENSITY = 0.2
"""The least density of the last fully connected layer with `uniform+`."""


def densities(
    shapes: Sequence[Sequence[int]],
    density: float,
    ratios: Ratios,
    *,
    outliers: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The fraction of weights that each layer keeps.

    Args:
        shapes: of the weights ``[O, I/groups, *kernel]``, layers in the order they run.
        density: fraction of all weights to keep, in [0, 1].
        ratios: the provider (module docstring); `global` has no densities before scores are ranked: `kept`.
        outliers: for `owl`, the share of outliers in each layer (`outlier_share`).

    Returns:
        fractions in [0, 1]; weighted with the sizes of the layers they average to `density` within 1e-12.

    Raises:
        ValueError: `density` is out of range or less than `uniform+` can do; no outliers for `owl`; `global`.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}, not within 0 .. 1")
    if not shapes:
        return ()
    sizes = [math.prod(shape) for shape in shapes]
    family = _family(shapes, sizes, ratios, outliers)
    least = family(0.0)
    budget = density * math.fsum(sizes)
    if _kept(least, sizes) > budget * (1 + 1e-12):
        share = _kept(least, sizes) / math.fsum(sizes)
        raise ValueError(
            f"{ratios} keeps at least {share:.4f} of these weights, more than the {density:.4f} asked for"
        )
    return _solve(family, sizes, budget)


def kept(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    ratios: Ratios,
    *,
    scores: Sequence[Tensor] | None = None,
    unit: int = 1,
) -> tuple[int, ...]:
    """How many weights, or blocks of weights, each layer keeps.

    Args:
        shapes: as for `densities`.
        sparsity: fraction of all weights to remove, in [0, 1].
        ratios: the provider.
        scores: for `global` and `owl`, one for each weight (block) of each layer, any shape; those of `owl`
            are ``|w| sqrt(E x^2)``.
        unit: weights in a block; every layer's size is a multiple of it.

    Returns:
        whole numbers; their sum is exactly ``total - round(sparsity * total)``, total counting units.
        Densities are rounded by largest remainder, so no layer is further than one from its own.

    Raises:
        ValueError: as for `densities`; no scores where they are needed.
    """
    if not shapes:
        return ()
    if ratios in ("global", "owl") and scores is None:
        raise ValueError(f"{ratios} needs scores")
    units = [math.prod(shape) // unit for shape in shapes]
    if ratios == "global":
        assert scores is not None
        return tuple(int(mask.sum()) for mask in keep_largest_of(scores, sparsity, "global"))
    outliers = [outlier_share(s) for s in scores] if ratios == "owl" and scores is not None else None
    wanted = densities(shapes, 1 - sparsity, ratios, outliers=outliers)
    total = sum(units)
    return _rounded(
        [d * n for d, n in zip(wanted, units, strict=True)], units, total - round(sparsity * total)
    )


def outlier_share(scores: Tensor, multiple: float = OUTLIER) -> float:
    """The fraction of scores larger than `multiple` times their mean (Yin et al. 2023, eq. 2)."""
    return float((scores > multiple * scores.double().mean()).double().mean())


# -- the families ----------------------------------------------------------------------------------

_Family = Callable[[float], list[float]]
"""t in [0, 1] -> densities that do not fall with t; all of them 1 at t = 1."""


def _family(
    shapes: Sequence[Sequence[int]], sizes: Sequence[int], ratios: Ratios, outliers: Sequence[float] | None
) -> _Family:
    if ratios == "uniform":
        return lambda t: [t] * len(sizes)
    if ratios == "uniform+":
        floors = [0.0] * len(sizes)
        fully_connected = [i for i, shape in enumerate(shapes) if len(shape) == 2]
        convolutions = [i for i, shape in enumerate(shapes) if len(shape) > 2]
        if fully_connected:
            floors[fully_connected[-1]] = _LAST_DENSITY
        if convolutions:
            floors[convolutions[0]] = 1.0
        return lambda t: [max(t, floor) for floor in floors]
    if ratios == "pyramidal":
        return lambda t: [t**depth for depth in range(1, len(sizes) + 1)]
    if ratios == "owl":
        if outliers is None:
            raise ValueError("owl needs the share of outliers in each layer")
        lowest, spread = min(outliers), max(outliers) - min(outliers)
        offsets = [2 * _LAMBDA * (o - lowest) / spread if spread else 0.0 for o in outliers]
        # t = 0: a density of -2 lambda before capping, so that nothing is kept; t = 1: all is
        return lambda t: [
            min(max(t * (1 + 2 * _LAMBDA) - 2 * _LAMBDA + offset, 0.0), 1.0) for offset in offsets
        ]
    if ratios == "er":
        return _proportional([sum(shape[:2]) / math.prod(shape[:2]) for shape in shapes])
    if ratios == "erk":
        return _proportional([sum(shape) / math.prod(shape) for shape in shapes])
    if ratios == "balanced":
        return _proportional([1 / size for size in sizes])
    known = ", ".join(get_args(Ratios))
    raise ValueError(f"ratios {ratios!r} have no densities of their own; `kept` takes {known}")


def _proportional(weights: Sequence[float]) -> _Family:
    """``min(1, t w)``, in units of t where the least of them is full at t = 1."""
    least = min(weights)
    relative = [w / least for w in weights]
    return lambda t: [min(1.0, t * r) for r in relative]


def _kept(fractions: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(d * n for d, n in zip(fractions, sizes, strict=True))


def _solve(family: _Family, sizes: Sequence[int], budget: float) -> tuple[float, ...]:
    """Bisection until two neighbouring numbers are left."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if _kept(family(middle), sizes) < budget:
            low = middle
        else:
            high = middle
    return tuple(family(high))


def _rounded(wanted: Sequence[float], units: Sequence[int], total: int) -> tuple[int, ...]:
    """Whole numbers that sum to `total`: the fractions that were cut off, largest first, are made up for."""
    counts = [min(math.floor(w), n) for w, n in zip(wanted, units, strict=True)]
    order = sorted(range(len(units)), key=lambda i: counts[i] - wanted[i])
    # sums of floats may be off by one either way
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        open_ = [i for i in order[::step] if 0 <= counts[i] + step <= units[i]]
        for i in open_[: abs(missing)]:
            counts[i] += step
    return tuple(counts)
