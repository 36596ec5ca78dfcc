"""Rounding within the pair limits: safe for every weight, and close to rounding without them."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.activations import saturates
from compress.passes.solvers.saturation import saturation_free


def signed(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.int32) - 128


def error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, H: torch.Tensor) -> float:
    d = (w - signed(codes) * scales).double()
    return float(((d @ H.double()) * d).sum())


@given(st.integers(1, 9), st.integers(1, 21), st.integers(0, 99), st.booleans(), st.booleans())
def test_never_saturates(rows: int, columns: int, seed: int, flat: bool, reorder: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w = torch.full_like(w, -0.3) if flat else w
    x = torch.randn(40, columns, generator=generator)
    order = torch.randperm(columns, generator=generator) if reorder else None
    rounded = saturation_free(w, x.square().mean(0), (x.T @ x)[None] / 40, order=order)
    codes = signed(rounded.codes)
    assert not saturates(codes if order is None else codes[:, order]).any()
    assert (rounded.scales > 0).all() and codes.abs().max() <= 127


def test_costs_less_than_a_bit() -> None:
    """The error lies between those of 8 bits without limits and of 7 bits, nearer to the former."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 384, generator=generator)
    eye = torch.eye(384)
    safe, free = saturation_free(w), saturation_free(w, paired=False)
    seven = w.abs().amax(1, keepdim=True) / 64
    by_seven = float((w - torch.round(w / seven) * seven).double().square().sum())
    by_safe, by_free = (error(w, r.codes, r.scales, eye) for r in (safe, free))
    assert by_free <= by_safe < 0.6 * by_seven


def test_a_pair_is_split_best() -> None:
    """One pair, at the scale found: no allowed codes are better."""
    w, h = torch.tensor([[1.0, 0.8]]), torch.tensor([1.0, 3.0])
    rounded = saturation_free(w, h)
    found = error(w, rounded.codes, rounded.scales, torch.diag(h))
    for a, b in itertools.product(range(128), repeat=2):
        if a + b <= 128:
            d = w - torch.tensor([[a, b]]) * rounded.scales
            # rounding of the real optimum along the limit is at most half a step away from the best
            assert found <= float((h * d.square()).sum()) + float(rounded.scales) ** 2


@given(st.integers(2, 24), st.integers(0, 99))
def test_descent_lowers_the_output_error(columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, columns, generator=generator)
    w[:, 0] = 0
    x = torch.randn(60, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    H = x.T @ x / 60
    H_damped = H + 0.01 * H.diagonal().mean() * torch.eye(columns)
    before = saturation_free(w, H.diagonal(), None)
    after = saturation_free(w, H.diagonal(), H[None])
    assert torch.equal(before.scales, after.scales)
    limit = error(w, before.codes, before.scales, H_damped)
    assert error(w, after.codes, after.scales, H_damped) <= limit * (1 + 1e-4) + 1e-9
    assert (signed(after.codes)[:, 0] == 0).all()


def test_rows_of_zeros_and_groups() -> None:
    assert (signed(saturation_free(torch.zeros(2, 5)).codes) == 0).all()
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(6, 10, generator=generator)
    x = torch.randn(2, 30, 10, generator=generator)
    H = x.mT @ x / 30
    both = saturation_free(w, None, H)
    halves = [saturation_free(w[3 * i : 3 * i + 3], None, H[i : i + 1]).codes for i in (0, 1)]
    assert torch.equal(both.codes, torch.cat(halves))
