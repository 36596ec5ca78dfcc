"""GPFQ from moments against GPFQ on the samples, code for code."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.gpfq import gpfq, gpfq_samples
from compress.passes.solvers.grids import Binary, Grid, HardThreshold, IntegerGrid, MidTread, SoftThreshold
from tests.passes.solvers.problems import Problem, nearest, problem


def of_group(grid: IntegerGrid, group: int) -> IntegerGrid:
    """The part of a grid that belongs to one convolution group."""
    parts = (t[:, group : group + 1] for t in (grid.scale, grid.zero, grid.low, grid.high))
    return IntegerGrid(*parts, grid.width)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 150),
    groups=st.sampled_from([1, 2, 3]),
    samples=st.integers(1, 60),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([-1, 16]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_moments_and_samples_agree(
    rows: int, columns: int, groups: int, samples: int, bits: int, group: int, symmetric: bool, seed: int
) -> None:
    p = problem(seed, rows, columns, samples, groups, change=0.2)
    grid = p.grid(bits, group, symmetric)
    found = gpfq(p.weight, p.H, grid, G=p.G)
    for k in range(groups):
        part = p.weight[k * rows : (k + 1) * rows]
        truth = gpfq_samples(part, p.x[k], p.x_tilde[k], of_group(grid, k))
        assert torch.equal(found[k * rows : (k + 1) * rows], truth)


def test_alphabets_and_thresholds_agree_too() -> None:
    p = problem(1, 5, 70, 50, change=0.1)
    grid = MidTread.of_layer(p.weight, 3)
    grids: list[Grid] = [grid, Binary(grid.step), SoftThreshold(grid, 0.1), HardThreshold(grid, 0.3)]
    for g in grids:
        truth = gpfq_samples(p.weight, p.x[0], p.x_tilde[0], g)
        assert torch.equal(gpfq(p.weight, p.H, g, G=p.G), truth)


def test_act_order_is_a_permutation_of_the_columns() -> None:
    p = problem(2, 4, 30, 200, change=0.1)
    step = p.weight.abs().mean()
    order = torch.argsort(p.H[0].diagonal(), descending=True, stable=True)
    swapped = Problem(p.weight[:, order], p.x[..., order], p.x_tilde[..., order])
    truth = gpfq_samples(swapped.weight, swapped.x[0], swapped.x_tilde[0], MidTread(step, 2))
    found = gpfq(p.weight, p.H, MidTread(step, 2), G=p.G, act_order=True)
    assert torch.equal(found[:, order], truth)


def test_greedy_beats_rounding_and_sees_what_earlier_layers_did() -> None:
    p = problem(3, 16, 64, 4000, change=0.2)
    grid = p.grid(4)
    blind = gpfq(p.weight, p.H, grid)
    assert p.error(gpfq(p.weight, p.H, grid, G=p.G)) < p.error(blind) < p.error(nearest(p, grid))


def test_inactive_inputs_are_rounded_as_they_are() -> None:
    p = problem(4, 3, 10)
    dead = torch.tensor([0, 7])
    p.x_tilde[..., dead] = 0
    grid = p.grid(4)
    found = gpfq(p.weight, p.H, grid, G=p.G)
    assert torch.equal(found[:, dead], nearest(p, grid)[:, dead])
    everywhere = gpfq(p.weight, torch.zeros_like(p.H), grid)
    assert torch.equal(everywhere, nearest(p, grid))


def test_computes_in_single_precision_when_asked() -> None:
    p = problem(5, 4, 33)
    found: Tensor = gpfq(p.weight.float(), p.H.float(), MidTread(torch.tensor(0.3), 4))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
