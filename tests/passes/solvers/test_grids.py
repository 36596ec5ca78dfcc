"""Grids against brute force over their levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding, encode
from compress.passes.solvers.grids import (
    Binary,
    Grid,
    HardThreshold,
    IntegerGrid,
    Masked,
    MidTread,
    OffsetThreshold,
    SoftThreshold,
    columns_of,
    rows_of,
)
from compress.passes.solvers.scales import search_scales


def closest(values: Tensor, levels: Tensor) -> Tensor:
    """The slow way: every level tried."""
    return levels[(values.unsqueeze(-1) - levels).abs().argmin(-1)]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([(2, None), (4, None), (4, 3), (8, None)]),
    group=st.sampled_from([-1, 16]),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 3]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_integer_grid_is_what_the_encoding_decodes_to(
    bits: tuple[int, int | None], group: int, symmetric: bool, groups: int, rows: int, columns: int, seed: int
) -> None:
    encoding = IntEncoding(bits[0], group, symmetric, bits[1])
    shape = (groups * rows, columns)
    found = search_scales(values(*shape, seed=seed), None, encoding)
    grid = IntegerGrid.of(found.scales, found.zero_points, encoding, columns, groups)
    wanted = columns_of(2 * values(*shape, seed=seed + 1).float(), groups)
    rounded = torch.stack([grid.nearest(wanted[:, t], t) for t in range(columns)], 1)
    codes = grid.codes(rounded)
    stored = encode(codes, found.scales, found.zero_points, encoding, shape, torch.float32)
    assert torch.equal(stored.decode(), rows_of(rounded))
    # no other code of the grid is closer
    best = torch.full(shape, torch.inf)
    for code in range(encoding.lowest, encoding.highest + 1):
        other = encode(
            torch.full_like(codes, code), found.scales, found.zero_points, encoding, shape, torch.float32
        )
        best = torch.minimum(best, (other.decode() - rows_of(wanted)).abs())
    assert torch.allclose((stored.decode() - rows_of(wanted)).abs(), best, rtol=1e-4, atol=1e-5)


def test_alphabets() -> None:
    v, d = 3 * values(2, 50), torch.tensor(0.4, dtype=torch.float64)
    ternary = torch.tensor([-0.4, 0.0, 0.4], dtype=torch.float64)
    five_bits = 0.4 * torch.arange(-16, 17, dtype=torch.float64)
    cases: list[tuple[Grid, Tensor]] = [
        (MidTread(d, 1), ternary),
        (MidTread(d, 16), five_bits),
        (Binary(d), torch.tensor([-0.4, 0.4], dtype=torch.float64)),
    ]
    for grid, levels in cases:
        assert torch.allclose(grid.nearest(v, 0), closest(v, levels))


def test_scale_of_the_papers() -> None:
    weight = torch.tensor([[1.0, -2.0], [4.0, 0.0]])
    grid = MidTread.of_layer(weight, 4, constant=1.5)
    assert grid.levels == 8
    assert float(grid.step) == pytest.approx(1.5 * 3 / 8)


def test_thresholds() -> None:
    v, d, lam, count = 2 * values(1, 400), torch.tensor(0.3, dtype=torch.float64), 0.25, 4
    plain = MidTread(d, count)
    shrunk = torch.sign(v) * (v.abs() - lam).clamp_min(0)
    assert torch.allclose(SoftThreshold(plain, lam).nearest(v, 0), plain.nearest(shrunk, 0))
    hard = HardThreshold(plain, lam).nearest(v, 0)
    assert torch.equal(hard, torch.where(v.abs() <= lam, 0, plain.nearest(v, 0)))
    step = 0.3 - lam / count
    side = lam + step * torch.arange(count + 1, dtype=torch.float64)
    assert float(side[-1]) == pytest.approx(0.3 * count)
    paper = OffsetThreshold(d, count, lam).nearest(v, 0)
    assert torch.equal(paper == 0, v.abs() <= lam)
    over = v.abs() > lam
    assert torch.allclose(paper[over], closest(v[over], torch.cat([-side, side])))


def test_a_mask_goes_with_every_grid() -> None:
    keep = values(2, 5, 3) > 0
    v = 1 + values(2, 3).abs()
    d = torch.tensor(0.5, dtype=torch.float64)
    for grid in (MidTread(d, 4), Binary(d), HardThreshold(MidTread(d, 4), 0.1), OffsetThreshold(d, 4, 0.1)):
        for t in range(5):
            masked = Masked(grid, keep).nearest(v, t)
            assert torch.equal(masked != 0, keep[:, t])
            assert torch.equal(masked[keep[:, t]], grid.nearest(v, t)[keep[:, t]])


def test_column_view() -> None:
    weight = values(6, 5)
    view = columns_of(weight, 2)
    assert view.shape == (2, 5, 3)
    assert torch.equal(view[1, :, 0], weight[3])
    assert torch.equal(rows_of(view), weight)
