"""Coordinate descent: monotone, and where it ends no single change of a value helps."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.grids import Masked, columns_of
from tests.passes.solvers.problems import nearest, problem


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("change", [0.0, 0.3])
def test_never_raises_the_output_error(groups: int, change: float) -> None:
    p = problem(2, 6, 150, 400, groups, change)  # more than one block
    grid = p.grid(2, 16)
    start = nearest(p, grid)
    G = p.G if change else None
    errors = [p.error(start)]
    for sweeps in (1, 2, 4, 8):
        found = coordinate_descent(p.weight, start, p.H, grid, G=G, sweeps=sweeps, damping=0.0)
        errors.append(p.error(found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_sees_what_earlier_layers_did() -> None:
    p = problem(3, 8, 40, 2000, change=0.4)
    grid, start = p.grid(4), nearest(p, p.grid(4))
    blind = coordinate_descent(p.weight, start, p.H, grid, damping=0.0)
    assert p.error(coordinate_descent(p.weight, start, p.H, grid, G=p.G, damping=0.0)) < p.error(blind)


def test_ends_where_no_single_value_can_improve() -> None:
    """Against brute force over every single change."""
    p = problem(4, 3, 5, 50, change=0.2)
    grid = p.grid(2)
    found = coordinate_descent(p.weight, nearest(p, grid), p.H, grid, G=p.G, sweeps=50, damping=0.0)
    best = p.error(found)
    for row, column, code in itertools.product(range(3), range(5), range(4)):
        other = found.clone()
        other[row, column] = grid.scale[0, 0, row] * (code - 2)
        assert p.error(other) >= best - 1e-9


def test_zeros_stay_zero() -> None:
    p = problem(5, 4, 40)
    keep = columns_of(p.weight) > 0
    weight = p.weight * (p.weight > 0)
    grid = Masked(p.grid(4, 16), keep)
    start = torch.stack([grid.nearest(columns_of(weight)[:, t], t) for t in range(40)], 1)[0].T
    moved = coordinate_descent(weight, start, p.H, grid)
    assert not torch.equal(moved, start)
    assert (moved[weight == 0] == 0).all()


def test_a_singular_matrix_and_dead_inputs() -> None:
    p = problem(6, 4, 20)
    grid = p.grid(4, 16)
    start = nearest(p, grid)
    for H in (torch.zeros_like(p.H), torch.ones_like(p.H)):
        assert torch.isfinite(coordinate_descent(p.weight, start, H, grid)).all()
    assert torch.equal(coordinate_descent(p.weight, start, torch.zeros_like(p.H), grid), start)
