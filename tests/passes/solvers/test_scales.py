"""Scale search: never worse than plain rounding, right where the truth is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding, encode
from compress.passes.solvers.scales import Rounded, decoded, round_to_nearest, search_scales


def decode(rounded: Rounded, encoding: IntEncoding, shape: tuple[int, ...]) -> Tensor:
    return encode(rounded.codes, rounded.scales, rounded.zero_points, encoding, shape, torch.float32).decode()


def weighted(weight: Tensor, value: Tensor, h: Tensor) -> float:
    return float((h * (weight - value).double().square()).sum())


cases = st.tuples(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([-1, 16, 32]),
    st.booleans(),
    st.integers(1, 7),
    st.integers(1, 75),
    st.integers(0, 50),
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_search_is_never_worse_than_round_to_nearest(case: tuple[int, int, bool, int, int, int]) -> None:
    bits, group, symmetric, rows, columns, seed = case
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(bits, group, symmetric)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** (seed % 7 - 3)
    h = torch.rand(columns, generator=generator) + 0.01
    plain = decode(round_to_nearest(weight, encoding), encoding, (rows, columns))
    found = decode(search_scales(weight, h, encoding), encoding, (rows, columns))
    assert torch.equal(found, decoded(search_scales(weight, h, encoding), encoding))
    assert weighted(weight, found, h) <= weighted(weight, plain, h) * (1 + 1e-5) + 1e-12


@settings(max_examples=30, deadline=None)
@given(cases)
def test_zeros_stay_zero(case: tuple[int, int, bool, int, int, int]) -> None:
    bits, group, symmetric, rows, columns, seed = case
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(bits, group, symmetric)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    h = torch.rand(columns, generator=generator)
    value = decode(search_scales(weight, h, encoding), encoding, (rows, columns))
    assert torch.isfinite(value).all()
    assert (value[weight == 0] == 0).all()


def test_minus_eight_is_reached() -> None:
    """The symmetric grid is -8..7; the largest weight goes to -8, whatever its sign."""
    encoding = IntEncoding(4, -1, True)
    exact = torch.arange(-8, 8).float().unsqueeze(0) * 0.37
    for weight in (exact, -exact):
        found = search_scales(weight, None, encoding)
        assert torch.allclose(decode(found, encoding, (1, 16)), weight, atol=1e-6)
        assert int(found.codes.min()) == 0


def test_weights_on_the_grid_are_kept_exactly() -> None:
    encoding = IntEncoding(4, 16, False)
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::16], codes[:, 1::16] = 0, 15  # the whole range is in use
    weight = (codes - 5) * 0.02
    value = decode(search_scales(weight, None, encoding), encoding, (8, 64))
    assert torch.allclose(value, weight, atol=1e-6)


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    encoding = IntEncoding(4, -1, True)
    weight = torch.randn(64, 32, generator=generator)
    h = torch.ones(32)
    h[:4] = 100.0
    plain = decode(search_scales(weight, None, encoding), encoding, (64, 32))
    aware = decode(search_scales(weight, h, encoding), encoding, (64, 32))
    assert weighted(weight[:, :4], aware[:, :4], h[:4]) < 0.8 * weighted(weight[:, :4], plain[:, :4], h[:4])


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_constant_and_extreme_weights(value: float) -> None:
    weight = torch.full((2, 33), value)
    for encoding in (IntEncoding(4, 16, True), IntEncoding(4, 16, False), IntEncoding(8, -1, True)):
        found = decode(search_scales(weight, None, encoding), encoding, (2, 33))
        assert torch.isfinite(found).all()
        assert torch.allclose(found, weight, rtol=1e-2)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-21, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("encoding", [IntEncoding(4, 16, True), IntEncoding(8, -1, False)], ids=str)
def test_the_size_of_weights_and_inputs_does_not_matter(encoding: IntEncoding, size: float) -> None:
    """Squares of such numbers are 0 or infinite in float32; filters that died in training look like this."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 48, generator=generator)
    x = torch.randn(100, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    H = (x.T @ x / 100)[None]

    def error(scaled: Tensor, H: Tensor) -> float:
        found = search_scales(scaled, H[0].diagonal(), encoding)
        return float((scaled.double() - decode(found, encoding, (4, 48))).norm() / scaled.double().norm())

    usual = error(weight, H)
    assert error(weight * size, H) == pytest.approx(usual, rel=1e-2)
    assert error(weight, H / H.max() * size) == pytest.approx(usual, rel=1e-2)


@pytest.mark.parametrize("group", [-1, 32])
def test_scales_of_8_bits_are_positive(group: int) -> None:
    """No runtime gains by the code -128, and TensorRT refuses negative scales."""
    weight = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    found = search_scales(weight, None, IntEncoding(8, group))
    assert bool((found.scales > 0).all())
    assert bool((search_scales(weight, None, IntEncoding(4, group)).scales < 0).any())
