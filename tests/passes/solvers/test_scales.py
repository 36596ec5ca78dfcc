"""Scale search and descent: never worse than what they start from, right where the truth is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding, encode
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.scales import Rounded, round_to_nearest, search_scales


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
    assert weighted(weight, found, h) <= weighted(weight, plain, h) * (1 + 1e-5) + 1e-12


@settings(max_examples=30, deadline=None)
@given(cases)
def test_zeros_stay_zero(case: tuple[int, int, bool, int, int, int]) -> None:
    bits, group, symmetric, rows, columns, seed = case
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(bits, group, symmetric)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    x = torch.randn(40, columns, generator=generator)
    H = (x.T @ x / 40)[None]
    found = search_scales(weight, H[0].diagonal(), encoding)
    moved = coordinate_descent(weight, found, H, encoding)
    for rounded in (found, moved):
        value = decode(rounded, encoding, (rows, columns))
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


@pytest.mark.parametrize("groups", [1, 3])
def test_descent_never_raises_the_output_error(groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    encoding = IntEncoding(2, 16, True)
    rows, columns = 6, 150  # more than one block
    weight = torch.randn(groups * rows, columns, generator=generator)
    x = torch.randn(groups, 400, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    H = x.mT @ x / 400
    start = search_scales(weight, H.diagonal(dim1=1, dim2=2).repeat_interleave(rows, 0), encoding)

    def error(rounded: Rounded) -> float:
        d = (weight - decode(rounded, encoding, tuple(weight.shape))).view(groups, rows, columns)
        return float((d @ H * d).sum())

    errors = [error(start)]
    for sweeps in (1, 2, 4):
        errors.append(error(coordinate_descent(weight, start, H, encoding, sweeps=sweeps, damping=0.0)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_descent_ends_where_no_single_code_can_improve() -> None:
    """Against brute force over every single-code change."""
    generator = torch.Generator().manual_seed(3)
    encoding = IntEncoding(2, -1, True)
    weight = torch.randn(3, 5, generator=generator)
    x = torch.randn(50, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    H = (x.T @ x / 50)[None]
    found = coordinate_descent(
        weight, search_scales(weight, None, encoding), H, encoding, sweeps=50, damping=0.0
    )

    def error(codes: Tensor) -> Tensor:
        d = weight - decode(Rounded(codes, found.scales, None), encoding, (3, 5))
        return (d @ H[0] * d).sum(1)

    best = error(found.codes)
    for column, code in itertools.product(range(5), range(4)):
        other = found.codes.clone()
        other[:, column] = code
        assert (error(other) >= best - 1e-5).all()


def test_descent_takes_a_singular_matrix_and_dead_inputs() -> None:
    encoding = IntEncoding(4, 16, True)
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(4))
    for H in (torch.zeros(1, 20, 20), torch.ones(1, 20, 20)):
        moved = coordinate_descent(weight, search_scales(weight, H[0].diagonal(), encoding), H, encoding)
        assert torch.isfinite(decode(moved, encoding, (4, 20))).all()


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
        found = coordinate_descent(scaled, found, H, encoding)
        return float((scaled.double() - decode(found, encoding, (4, 48))).norm() / scaled.double().norm())

    usual = error(weight, H)
    assert error(weight * size, H) == pytest.approx(usual, rel=1e-2)
    assert error(weight, H / H.max() * size) == pytest.approx(usual, rel=1e-2)
