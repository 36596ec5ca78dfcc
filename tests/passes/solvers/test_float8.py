"""Float8 weights against what is slow and obvious."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.float8 import LARGEST, to_float8
from compress.passes.solvers.float8 import fit_float8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(weight: Tensor, values: Tensor, scales: Tensor, H: Tensor) -> float:
    d = (weight - values * scales).double().view(len(H), -1, weight.shape[1])
    return float(torch.einsum("gri,gij,grj->", d, H.double(), d))


@given(st.integers(1, 6), st.integers(1, 19), st.sampled_from([1e-30, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_rows_are_rounded_on_the_best_of_eight_scales(rows: int, columns: int, size: float) -> None:
    weight = noise(rows, columns, seed=columns) * size
    h = noise(columns, seed=1).square()
    values, scales = fit_float8(weight, h)
    assert torch.equal(to_float8(values).float(), values) and bool((scales > 0).all())
    for w, found, scale in zip(weight.double(), values.double(), scales.double(), strict=True):
        tried = [w.abs().max() / LARGEST * 2 ** (i / 8) for i in range(8)]
        errors = [(h * (w - to_float8(w / s).double() * s).square()).sum() for s in tried]
        assert (h * (w - found * scale).square()).sum() <= min(errors) * 1.001 + 1e-12 * (h * w * w).sum()


def test_descent_lowers_the_output_error_and_keeps_zeros() -> None:
    x = noise(200, 24) @ noise(24, 24, seed=5)
    H = (x.T @ x / 200).unsqueeze(0)
    weight = noise(16, 24, seed=2)
    weight[noise(16, 24, seed=3) > 0.5] = 0
    plain = fit_float8(weight, H[0].diagonal())
    moved = fit_float8(weight, H[0].diagonal(), H)
    assert torch.equal(plain[1], moved[1]) and torch.equal(to_float8(moved[0]).float(), moved[0])
    assert output_error(weight, *moved, H) < 0.6 * output_error(weight, *plain, H)
    assert bool((moved[0][weight == 0] == 0).all())


def test_rows_of_convolution_groups_and_rows_of_zeros() -> None:
    H = torch.stack([torch.eye(5), 3 * torch.eye(5)])
    weight = noise(6, 5)
    weight[2] = 0
    values, scales = fit_float8(weight, None, H)
    assert bool((values[2] == 0).all()) and float(scales[2]) == 1
    relative = (weight - values * scales).norm() / weight.norm()
    assert float(relative) < 0.04
