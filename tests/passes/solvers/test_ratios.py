"""Ratio providers: budgets to the last weight, caps, and the formulas against slow references."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.ratios import Ratios, densities, kept, outlier_share

Shape = tuple[int, ...]

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=12,
)
RESNET: list[Shape] = [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3), *[(32, 32, 3, 3)] * 5]
RESNET += [(64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]


def sizes(shapes: list[Shape]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


def mean(fractions: tuple[float, ...], shapes: list[Shape]) -> float:
    return math.fsum(d * n for d, n in zip(fractions, sizes(shapes), strict=True)) / sum(sizes(shapes))


@settings(max_examples=150, deadline=None)
@given(
    shapes=SHAPES,
    density=st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.sampled_from([0.0, 1.0, 1e-9])),
    ratios=st.sampled_from([r for r in get_args(Ratios) if r != "global"]),
    data=st.data(),
)
def test_densities_meet_the_budget(
    shapes: list[Shape], density: float, ratios: Ratios, data: st.DataObject
) -> None:
    outliers = data.draw(st.lists(st.floats(0, 1), min_size=len(shapes), max_size=len(shapes)))
    try:
        found = densities(shapes, density, ratios, outliers=outliers)
    except ValueError:
        assert ratios == "uniform+"
        convolutions = [s for s in shapes if len(s) > 2]
        fully_connected = [s for s in shapes if len(s) == 2]
        least = sum(sizes(convolutions[:1])) + 0.2 * sum(sizes(fully_connected[-1:]))
        assert density * sum(sizes(shapes)) < least
        return
    assert all(0 <= d <= 1 for d in found)
    assert mean(found, shapes) == pytest.approx(density, abs=1e-12)


@settings(max_examples=120, deadline=None)
@given(
    shapes=SHAPES, sparsity=st.floats(0, 1), ratios=st.sampled_from(get_args(Ratios)), seed=st.integers(0, 99)
)
def test_counts_are_exact(shapes: list[Shape], sparsity: float, ratios: Ratios, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(shape, generator=generator) for shape in shapes]
    try:
        counts = kept(shapes, sparsity, ratios, scores=scores)
    except ValueError:
        assert ratios == "uniform+"
        return
    total = sum(sizes(shapes))
    assert sum(counts) == total - round(sparsity * total)
    assert all(0 <= k <= n for k, n in zip(counts, sizes(shapes), strict=True))
    if ratios != "global":
        outliers = [outlier_share(s) for s in scores]
        wanted = densities(shapes, 1 - sparsity, ratios, outliers=outliers)
        for k, d, n in zip(counts, wanted, sizes(shapes), strict=True):
            assert abs(k - d * n) < 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.integers(1, 30), min_size=1, max_size=6), sparsity=st.floats(0, 1))
def test_blocks_are_counted_whole(blocks: list[int], sparsity: float) -> None:
    counts = kept([(4 * n, 4) for n in blocks], sparsity, "uniform", unit=16)
    assert sum(counts) == sum(blocks) - round(sparsity * sum(blocks))
    assert all(k <= n for k, n in zip(counts, blocks, strict=True))


def erk_of_the_authors(shapes: list[Shape], density: float, kernel: bool) -> list[float]:
    """Make the densest layer dense while one is above 1, and solve for the others anew (RigL's code)."""
    raw = [sum(s) / math.prod(s) if kernel else (s[0] + s[1]) / (s[0] * s[1]) for s in shapes]
    n = sizes(shapes)
    dense: set[int] = set()
    while True:
        others = [i for i in range(len(shapes)) if i not in dense]
        room = density * sum(n) - sum(n[i] for i in dense)
        scale = room / sum(raw[i] * n[i] for i in others)
        top = max(raw[i] for i in others)
        if scale * top <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= {i for i in others if raw[i] == top}


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, density=st.floats(0.01, 0.99), kernel=st.booleans())
def test_erk_equals_the_authors_iteration(shapes: list[Shape], density: float, kernel: bool) -> None:
    found = densities(shapes, density, "erk" if kernel else "er")
    assert found == pytest.approx(erk_of_the_authors(shapes, density, kernel), abs=1e-9)


def test_formulas_on_a_resnet() -> None:
    n = sizes(RESNET)
    assert densities(RESNET, 0.3, "uniform") == pytest.approx([0.3] * len(n))
    plus = densities(RESNET, 0.1, "uniform+")
    assert plus[0] == 1
    assert plus[-1] == 0.2
    assert len(set(plus[1:-1])) == 1
    balanced = [d * k for d, k in zip(densities(RESNET, 0.2, "balanced"), n, strict=True)]
    # small layers are full, the others keep the same number
    assert balanced[0] == pytest.approx(n[0])
    assert balanced[1:7] == pytest.approx(n[1:7])
    assert balanced[7:-1] == pytest.approx([balanced[8]] * 12)
    pyramid = densities(RESNET, 0.2, "pyramidal")
    assert pyramid == pytest.approx([pyramid[0] ** (i + 1) for i in range(len(n))])


def test_owl_equals_its_formula_and_caps() -> None:
    shapes: list[Shape] = [(32, 64)] * 4
    outliers = [0.01, 0.03, 0.02, 0.05]
    found = densities(shapes, 0.3, "owl", outliers=outliers)
    # of the authors' code, with equal layers
    scaled = [(o - 0.01) / (0.05 - 0.01) * 0.16 for o in outliers]
    assert found == pytest.approx([s - sum(scaled) / 4 + 0.3 for s in scaled])
    assert densities(shapes, 0.3, "owl", outliers=[0.2] * 4) == pytest.approx([0.3] * 4)
    low = densities(shapes, 0.02, "owl", outliers=outliers)
    assert min(low) == 0
    assert mean(low, shapes) == pytest.approx(0.02)


def test_outliers_are_counted_against_their_own_mean() -> None:
    scores = torch.ones(10, 10)
    scores[0, :3] = 100.0
    assert outlier_share(scores) == 0.03
    assert outlier_share(scores / 1e30) == 0.03


def test_global_ranks_all_scores_together() -> None:
    scores: list[Tensor] = [torch.tensor([[5.0, 1.0, 4.0]]), torch.tensor([[2.0, 3.0, 0.0, 6.0]])]
    assert kept([(1, 3), (1, 4)], 3 / 7, "global", scores=scores) == (2, 2)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps at least 0\.2000"):
        densities([(10, 10)], 0.1, "uniform+")
    with pytest.raises(ValueError, match="needs scores"):
        kept([(4, 4)], 0.5, "owl")
    with pytest.raises(ValueError, match="outliers"):
        densities([(4, 4)], 0.5, "owl")
    with pytest.raises(ValueError, match="of their own"):
        densities([(4, 4)], 0.5, "global")
    with pytest.raises(ValueError, match="not within"):
        densities([(4, 4)], 1.5, "erk")
    assert kept([], 0.5, "erk") == ()
