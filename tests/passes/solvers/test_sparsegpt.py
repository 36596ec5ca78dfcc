"""SparseGPT against algorithm 1 of the paper, written with the inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.masks import keep_count, keep_n_of_m
from compress.passes.solvers.refit import refit_survivors
from compress.passes.solvers.scores import score
from compress.passes.solvers.sparsegpt import sparsegpt
from compress.testing import assert_close
from tests.passes.solvers.problems import Problem, problem


def by_inverse(p: Problem, keep: int, n: int, m: int, damping: float) -> tuple[Tensor, Tensor]:
    """One group; each entry removed is compensated in all columns to come, at once."""
    H, columns = p.H[0], p.weight.shape[1]
    ridge = damping * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    P = torch.linalg.inv(H + ridge)
    U = torch.linalg.cholesky(P, upper=True)
    w, mask = p.weight.clone(), torch.zeros(p.weight.shape, dtype=torch.bool)
    by_score = keep_count(w.abs() / P.diagonal().sqrt(), keep)
    for t in range(columns):
        scores = (w / U.diagonal()).abs()
        if m and t % m == 0:
            mask[:, t : t + m] = keep_n_of_m(scores[:, t : t + m], n, m)
        if not m and t % 8 == 0:
            mask[:, t : t + 8] = keep_count(scores[:, t : t + 8], int(by_score[:, t : t + 8].sum()))
        error = torch.where(mask[:, t], 0.0, w[:, t] / U[t, t])
        w[:, t + 1 :] -= torch.outer(error, U[t, t + 1 :])
    return torch.where(mask, w, 0.0), mask


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 3, 8, 40, 128, 130, 141]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_unstructured_equals_the_algorithm_of_the_paper(
    rows: int, columns: int, share: float, seed: int
) -> None:
    p = problem(seed, rows, columns, 2 * columns)
    keep = round(share * p.weight.numel())
    values, mask = sparsegpt(p.weight, p.H, keep)
    expected, expected_mask = by_inverse(p, keep, 0, 0, 0.01)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, expected_mask)
    assert (values[~mask] == 0).all()
    if keep:
        assert_close(expected, values, db=120)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 40),
    n_m=st.sampled_from([(2, 4), (1, 2), (3, 7), (1, 5)]),
    seed=st.integers(0, 99),
)
def test_n_of_m_equals_the_algorithm_of_the_paper(
    rows: int, groups: int, n_m: tuple[int, int], seed: int
) -> None:
    n, m = n_m
    p = problem(seed, rows, groups * m, 2 * groups * m)
    values, mask = sparsegpt(p.weight, p.H, 0, n=n, m=m)
    expected, expected_mask = by_inverse(p, 0, n, m, 0.01)
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
    assert torch.equal(mask, expected_mask)
    assert_close(expected, values, db=120)


def test_convolution_groups_are_layers_of_their_own() -> None:
    p = problem(0, rows=3, columns=12, groups=2)
    values, mask = sparsegpt(p.weight, p.H, 0, n=2, m=4)
    for k in range(2):
        part = Problem(p.weight[3 * k : 3 * k + 3], p.x[k : k + 1], p.x_tilde[k : k + 1])
        alone = sparsegpt(part.weight, part.H, 0, n=2, m=4)
        assert torch.equal(mask[3 * k : 3 * k + 3], alone[1])
        assert_close(alone[0], values[3 * k : 3 * k + 3], db=150)


@pytest.mark.parametrize("unlike", [False, True])
def test_masks_are_better_than_by_score(unlike: bool) -> None:
    """With inputs of one size, and of sizes that fall a thousandfold from column to column."""
    p = problem(1, rows=48, columns=128, samples=1000, decay=0.5)
    x = p.x * (torch.logspace(1, -2, 128) if unlike else 1)
    p = Problem(p.weight, x, x)

    def error(mask: Tensor) -> float:
        return p.error(refit_survivors(p.weight, mask, p.H, iterations=200))

    scores = [
        score(kind, p.weight, diag=p.H.diagonal(dim1=1, dim2=2), H=p.H)
        for kind in ("magnitude", "wanda", "obs")
    ]
    assert error(sparsegpt(p.weight, p.H, 0, n=2, m=4)[1]) < min(error(keep_n_of_m(s, 2, 4)) for s in scores)
    keep = p.weight.numel() // 5
    assert error(sparsegpt(p.weight, p.H, keep)[1]) < min(error(keep_count(s, keep)) for s in scores)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_the_size_of_inputs_does_not_matter(size: float) -> None:
    p = problem(0, 4, 24)
    values, mask = sparsegpt(p.weight.float(), p.H.float(), 40)
    other_values, other_mask = sparsegpt(p.weight.float(), p.H.float() * size, 40)
    assert torch.equal(mask, other_mask)
    assert_close(values, other_values, db=90)


def test_dead_and_broken_inputs() -> None:
    values, mask = sparsegpt(torch.ones(2, 4), torch.zeros(1, 4, 4), 4)
    assert int(mask.sum()) == 4
    assert torch.equal(values, mask.float())
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt(torch.ones(2, 4), torch.full((1, 4, 4), torch.nan), 4)
