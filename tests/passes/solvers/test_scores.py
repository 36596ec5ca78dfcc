"""Scores against what the output error really rises by when one weight is removed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.scores import Score, score
from compress.testing import assert_close
from tests.passes.solvers.problems import problem


def rise(row: Tensor, j: int, H: Tensor, kind: Score) -> float:
    """Removing entry j of a row: its output error, where the rest is free to make up for it with `obs`."""
    d = torch.zeros_like(row)
    d[j] = -row[j]
    if kind == "obs":
        others = [k for k in range(len(row)) if k != j]
        if others:
            d[others] = torch.linalg.solve(H[others][:, others], -(H[others] @ d))
    return float(d @ H @ d)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 20),
    groups=st.integers(1, 3),
    kind=st.sampled_from(["magnitude", "wanda", "obs"]),
    seed=st.integers(0, 99),
)
def test_squares_are_what_the_error_rises_by(
    rows: int, columns: int, groups: int, kind: Score, seed: int
) -> None:
    p = problem(seed, rows, columns, 3 * columns, groups)
    H, damping = p.H, 0.01
    ridge = damping * H.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) * torch.eye(columns, dtype=H.dtype)
    found = score(kind, p.weight, diag=H.diagonal(dim1=1, dim2=2), H=H, damping=damping)
    expected = torch.empty(groups * rows, columns)
    for i in range(groups * rows):
        moments = {"magnitude": torch.eye(columns).double(), "wanda": H[i // rows]}
        for j in range(columns):
            this = moments.get(kind, H[i // rows] + ridge[i // rows])
            expected[i, j] = rise(p.weight[i], j, this, kind) ** 0.5
    assert_close(expected, found, db=90)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e36])
def test_the_size_of_inputs_does_not_change_the_order(size: float) -> None:
    p = problem(0, 4, 24)
    H = p.H.float()
    for kind in ("wanda", "obs"):
        diag = H.diagonal(dim1=1, dim2=2)
        plain = score(kind, p.weight, diag=diag, H=H)
        scaled = score(kind, p.weight, diag=diag * size, H=H * size)
        assert_close(plain, (scaled.double() / size**0.5).float(), db=90)


def test_dead_inputs_and_what_is_missing() -> None:
    found = score("obs", torch.ones(2, 4), H=torch.zeros(1, 4, 4))
    assert bool(found.isfinite().all())
    with pytest.raises(ValueError, match="wanda needs"):
        score("wanda", torch.ones(2, 4))
    with pytest.raises(ValueError, match="obs needs"):
        score("obs", torch.ones(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        score("obs", torch.ones(2, 4), H=torch.full((1, 4, 4), torch.nan))
