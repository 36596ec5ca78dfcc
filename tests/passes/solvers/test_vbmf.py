"""Ranks by empirical variational Bayes: against the free energy by brute force, and planted ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.vbmf import evidence_rank

GRID = torch.logspace(-3, 5, 160, dtype=torch.float64)


def term(x: float, a: float) -> float:
    """Of one singular value: the minimum over both signal-to-noise ratios, on a grid."""
    p, q = GRID.unsqueeze(1), GRID.unsqueeze(0)
    kept = p.log1p() + a * q.log1p() - x * p * q / ((1 + p) * (1 + q))
    return x - math.log(x) + min(0.0, float(kept.min()))


def reference(values: torch.Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """Ranks at the best noise of a grid: of what is kept surely, and of what is kept perhaps."""
    short, long = sorted(shape)
    x, a = (values.square() / long).tolist(), short / long
    noises = torch.logspace(math.log10(min(x) / 10), math.log10(2 * sum(x) / len(x)), 60).tolist()
    best = min(noises, key=lambda s: sum(term(v / s, a) for v in x))
    gains = [term(v / best, a) - v / best + math.log(v / best) for v in x]
    return sum(g < -0.3 for g in gains), sum(g < -1e-9 for g in gains)


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 14), st.integers(4, 14), st.integers(0, 3), st.floats(0.05, 1.5), st.integers(0, 99))
def test_against_the_free_energy(outputs: int, inputs: int, rank: int, noise: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(outputs, rank, generator=g).double() @ torch.randn(rank, inputs, generator=g).double()
    values = torch.linalg.svdvals(low + noise * torch.randn(outputs, inputs, generator=g).double())
    least, most = reference(values, (outputs, inputs))
    assert least <= evidence_rank(values, (outputs, inputs)) <= most


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 576), (100, 100)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_planted_ranks(shape: tuple[int, int], scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    for rank, noise in ((0, 1.0), (6, 0.5), (12, 0.0)):
        shapes = ((shape[0], rank), (rank, shape[1]), shape)
        first, second, white = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
        weight = scale * (first @ second + noise * white)
        assert evidence_rank(torch.linalg.svdvals(weight), shape) == rank
    assert evidence_rank(torch.zeros(4), (4, 9)) == 0
