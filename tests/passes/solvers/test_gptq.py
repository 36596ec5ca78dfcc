"""GPTQ against its two textbook forms: the projection it is, and the inverse it was written with."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.gpfq import gpfq
from compress.passes.solvers.gptq import gptq
from compress.passes.solvers.grids import IntegerGrid
from tests.passes.solvers.problems import Problem, nearest, problem


def by_projection(p: Problem, grid: IntegerGrid, damping: float) -> Tensor:
    """Round ``w_t + <P X_t, u> / |P X_t|^2``; P projects off the columns still to come."""
    m, columns = p.x.shape[1:]
    ridge = (damping * p.H[0].diagonal().mean() * m).sqrt() * torch.eye(columns, dtype=torch.float64)
    x = torch.cat([p.x[0], ridge])
    u = x.new_zeros(x.shape[0], p.weight.shape[0])
    q = torch.empty_like(p.weight)
    for t in range(columns):
        future = x[:, t + 1 :]
        column = x[:, t]
        if future.shape[1]:
            column = column - future @ torch.linalg.lstsq(future, column.unsqueeze(1)).solution.squeeze(1)
        wanted = p.weight[:, t] + column @ u / column.square().sum()
        q[:, t] = grid.nearest(wanted.unsqueeze(0), t).squeeze(0)
        u += torch.outer(x[:, t], p.weight[:, t] - q[:, t])
    return q


def by_inverse(p: Problem, grid: IntegerGrid, damping: float) -> Tensor:
    """Algorithm 1 of the paper, without blocks, for each convolution group."""
    parts = []
    for k, part in enumerate(p.weight.view(p.x.shape[0], -1, p.weight.shape[1])):
        H = p.H[k] + damping * p.H[k].diagonal().mean() * torch.eye(part.shape[1], dtype=torch.float64)
        U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
        v, q = part.clone(), torch.empty_like(part)
        for t in range(part.shape[1]):
            everywhere = v[:, t].unsqueeze(0).expand(p.x.shape[0], -1)
            q[:, t] = grid.nearest(everywhere, t)[k]
            v[:, t:] -= torch.outer((v[:, t] - q[:, t]) / U[t, t], U[t, t:])
        parts.append(q)
    return torch.cat(parts)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 90),
    groups=st.sampled_from([1, 2]),
    samples=st.integers(2, 100),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([-1, 16]),
    seed=st.integers(0, 99),
)
def test_equals_the_algorithm_of_the_paper(
    rows: int, columns: int, groups: int, samples: int, bits: int, group: int, seed: int
) -> None:
    p = problem(seed, rows, columns, samples, groups)
    grid = p.grid(bits, group)
    found = gptq(p.weight, p.H, grid, damping=0.05, act_order=False)
    assert torch.equal(found.values, by_inverse(p, grid, 0.05))
    assert not found.note


def test_rounds_what_the_future_cannot_repair() -> None:
    p = problem(1, 3, 20, 80)
    grid = p.grid(2)
    assert torch.equal(gptq(p.weight, p.H, grid, act_order=False).values, by_projection(p, grid, 0.01))


def test_act_order_is_a_permutation_of_the_columns() -> None:
    p = problem(2, 4, 30)
    order = torch.argsort(p.H[0].diagonal(), descending=True, stable=True)
    swapped = Problem(p.weight[:, order], p.x[..., order], p.x_tilde[..., order])
    grid = p.grid(4)  # one scale for each row, so the same for all columns
    truth = gptq(swapped.weight, swapped.H, grid, act_order=False).values
    assert torch.equal(gptq(p.weight, p.H, grid).values[:, order], truth)


def test_better_than_gpfq_than_rounding() -> None:
    p = problem(3, 32, 64, 2000, decay=1.0)
    grid = p.grid(4)
    errors = [
        p.error(v) for v in (gptq(p.weight, p.H, grid).values, gpfq(p.weight, p.H, grid), nearest(p, grid))
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


def test_fewer_samples_than_columns() -> None:
    p = problem(4, 5, 60, 7)
    found = gptq(p.weight.float(), p.H.float(), p.grid(4))
    assert found.damping is not None
    assert p.error(found.values) < p.error(nearest(p, p.grid(4)))


def test_no_factorisation_is_data_not_an_exception() -> None:
    p = problem(5, 4, 20)
    grid = p.grid(4)
    H = p.H.clone()
    H[0, 3, 3] = -40 * float(H[0].diagonal().sum())  # no damping can help
    found = gptq(p.weight, H, grid)
    assert found.damping is None
    assert "could not be factorised" in found.note
    broken = gptq(p.weight, torch.full_like(H, torch.nan), grid)
    assert "not finite" in broken.note
    assert torch.equal(broken.values, nearest(p, grid))


def test_damping_is_raised_when_needed() -> None:
    p = problem(6, 4, 12)
    H = p.H - 0.05 * p.H[0].diagonal().mean() * torch.eye(12, dtype=torch.float64)
    smallest = float(torch.linalg.eigvalsh(H[0])[0] / H[0].diagonal().mean())
    assert smallest < -0.02  # so a damping of 0.01 is not enough
    found = gptq(p.weight, H, p.grid(4), damping=0.01)
    assert found.damping == 0.1
    assert "damping raised to 0.1" in found.note


def test_no_data_at_all() -> None:
    p = problem(7, 4, 12)
    grid = p.grid(4)
    assert torch.equal(gptq(p.weight, torch.zeros_like(p.H), grid).values, nearest(p, grid))
