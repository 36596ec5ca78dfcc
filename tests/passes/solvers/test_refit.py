"""The refit against one direct solve for each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.refit import refit_survivors
from compress.testing import assert_close


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 25),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_the_direct_solution(groups: int, rows: int, columns: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * rows, columns, generator=generator)
    mask = torch.rand(groups * rows, columns, generator=generator) >= share
    x = torch.randn(groups, 3 * columns, columns, generator=generator)
    H = x.mT @ x / (3 * columns)
    found = refit_survivors(weight, mask, H, damping=0.01, iterations=500, tolerance=1e-7)
    expected = torch.zeros_like(weight)
    for i in range(groups * rows):
        A = H[i // rows] + 0.01 * H[i // rows].diagonal().mean() * torch.eye(columns)
        kept = mask[i].nonzero().flatten()
        if len(kept):
            expected[i, kept] = torch.linalg.solve(A[kept][:, kept], (A @ weight[i])[kept])
    assert (found[~mask] == 0).all()
    if mask.any():
        assert_close(expected, found, db=60)


def test_halves_the_error_of_correlated_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x = x @ torch.diag(torch.arange(1, 65).float() ** -0.7) @ torch.randn(64, 64, generator=generator)
    H = (x.T @ x / 500)[None]
    mask = weight.abs() > weight.abs().median()

    def error(v: torch.Tensor) -> float:
        return float(((weight - v) @ H[0] * (weight - v)).sum())

    assert error(refit_survivors(weight, mask, H)) < 0.5 * error(weight * mask)


def test_dead_inputs_and_empty_rows() -> None:
    weight = torch.ones(2, 4)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    found = refit_survivors(weight, mask, torch.zeros(1, 4, 4))
    assert torch.equal(found, weight * mask)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e20, 1e36])
def test_the_size_of_weights_and_inputs_does_not_matter(size: float) -> None:
    """Squares of such numbers are 0 or infinite in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 32, generator=generator)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    H = (x.T @ x / 200)[None]
    mask = weight.abs() > weight.abs().median()
    expected = refit_survivors(weight, mask, H)
    assert_close(expected, (refit_survivors(weight * size, mask, H).double() / size).float(), db=60)
    assert_close(expected, refit_survivors(weight, mask, H / H.max() * size), db=60)
