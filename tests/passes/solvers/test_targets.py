"""The least-squares target against one direct solve, and the choice on held-out samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.feedback import round_with_feedback
from compress.passes.solvers.gptq import gptq
from compress.passes.solvers.grids import IntegerGrid, columns_of
from compress.passes.solvers.targets import RIDGES, Moments, choose_target, refit_target
from compress.testing import assert_close
from tests.passes.solvers.problems import Problem, problem


def moments(p: Problem, part: slice = slice(None)) -> Moments:
    x, x_tilde = p.x[:, part], p.x_tilde[:, part]
    return Moments(x_tilde.mT @ x_tilde / x.shape[1], x_tilde.mT @ x / x.shape[1])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 30),
    groups=st.sampled_from([1, 3]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_stacked_least_squares(rows: int, columns: int, groups: int, zeros: bool, seed: int) -> None:
    p = problem(seed, rows, columns, 50, groups, change=0.5)
    if zeros:
        p.weight[p.weight < 0.3] = 0
    found = refit_target(p.weight, moments(p), 0.1)
    for i, w in enumerate(p.weight):
        k = i // rows
        ridge = (0.1 * p.H[k].diagonal().mean()).sqrt() * torch.eye(columns, dtype=torch.float64)
        left = torch.cat([p.x_tilde[k] / 50**0.5, ridge])
        right = torch.cat([p.x[k] @ w / 50**0.5, ridge @ w])
        kept = (w != 0).nonzero().flatten()
        expected = torch.zeros_like(w)
        if len(kept):
            expected[kept] = torch.linalg.lstsq(left[:, kept], right.unsqueeze(1)).solution[:, 0]
        assert torch.equal(found[i] == 0, expected == 0)
        assert_close(expected, found[i], db=60)


def test_rounding_the_target_is_rounding_with_both_moments() -> None:
    """Target then GPTQ is greedy least squares: every future weight refitted after each rounding."""
    p = problem(1, 3, 32, 300, change=0.3)
    grid = p.grid(4)
    target = refit_target(p.weight, moments(p), 0.0)
    found = gptq(target, p.H, grid, damping=1e-12, act_order=False).values
    assert torch.equal(found, greedy_least_squares(p, grid))


def greedy_least_squares(p: Problem, grid: IntegerGrid) -> Tensor:
    x, x_tilde = p.x[0], p.x_tilde[0]
    wanted = x @ p.weight.T
    q = torch.zeros_like(p.weight)
    for t in range(p.weight.shape[1]):
        rest = wanted - x_tilde[:, :t] @ q[:, :t].T
        free = torch.linalg.lstsq(x_tilde[:, t:], rest).solution
        q[:, t] = grid.nearest(free[0].unsqueeze(0), t)[0]
    return q


@pytest.mark.parametrize(("samples", "used"), [(4000, True), (40, False)])
def test_used_where_held_out_samples_agree(samples: int, used: bool) -> None:
    p = problem(2, 8, 32, samples, change=0.5 if used else 0.0)
    if not used:  # x~ is x and independent noise: W' can only chase that noise
        noise = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        p = Problem(p.weight, p.x, p.x + 1e-3 * noise)
    held = slice(0, samples // 5)
    fitting = slice(samples // 5, None)
    found = choose_target(p.weight, moments(p), moments(p, fitting), moments(p, held))
    if used:
        fresh = problem(2, 8, 32, samples, change=0.5)
        assert fresh.error(found) < 0.9 * fresh.error(p.weight)
    else:
        assert p.error(found) <= p.error(p.weight) * 1.001


def test_pruned_weights_come_close_to_their_target() -> None:
    """Of what a refit to the last digit gains, choosing leaves less than a thousandth."""
    p = problem(2, 8, 32, 4000, change=0.5)
    p.weight[p.weight.abs() < 0.5] = 0
    whole = moments(p)
    found = choose_target(p.weight, whole, moments(p, slice(800, None)), moments(p, slice(0, 800)))
    assert torch.equal(found == 0, p.weight == 0)
    exactly = {"iterations": 500, "tolerance": 1e-9}
    targets = [refit_target(p.weight, whole, ridge, **exactly) for ridge in RIDGES]
    start, reached, *least = (p.error(v) for v in (p.weight, found, *targets))
    assert start - reached > 0.999 * (start - min(least)) > 0


def test_no_data_leaves_the_weight() -> None:
    p = problem(3, 4, 10)
    nothing = Moments(torch.zeros_like(p.H), torch.zeros_like(p.H))
    assert torch.equal(refit_target(p.weight, nothing, 0.1), p.weight)
    assert torch.equal(choose_target(p.weight, nothing, nothing, nothing), p.weight)


def test_feedback_of_nothing_is_rounding() -> None:
    p = problem(4, 4, 70)
    w, grid = columns_of(p.weight), p.grid(4)
    rounded = round_with_feedback(w, w, torch.zeros_like(p.H), grid)
    assert torch.equal(rounded, torch.stack([grid.nearest(w[:, t], t) for t in range(70)], 1))
