"""Masks: exact counts against a sort, and the pattern in every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.masks import Pattern, keep_largest, keep_n_of_m, parse_pattern


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_keep_largest_equals_a_stable_sort(size: int, sparsity: float, seed: int, ties: bool) -> None:
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 3).round()
    mask = keep_largest(scores, sparsity)
    keep = size - round(sparsity * size)
    order = torch.sort(scores, descending=True, stable=True).indices
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:keep]] = True
    assert torch.equal(mask, expected)


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 9), m=st.integers(2, 8), data=st.data())
def test_keep_n_of_m(groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = torch.rand(3, groups * m, generator=torch.Generator().manual_seed(groups))
    mask = keep_n_of_m(scores, n, m)
    kept = mask.unflatten(-1, (-1, m))
    assert (kept.sum(-1) == n).all()
    values = scores.unflatten(-1, (-1, m))
    lowest_kept = values.masked_fill(~kept, torch.inf).amin(-1)
    highest_gone = values.masked_fill(kept, -torch.inf).amax(-1)
    assert (lowest_kept >= highest_gone).all()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.one_of(st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 4)] * 4)),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    share=st.floats(0, 1),
)
def test_blocks_stay_or_go_whole(shape: tuple[int, ...], rows: int, columns: int, share: float) -> None:
    shape = (shape[0] * rows, shape[1] * columns, *shape[2:])
    pattern = Pattern(rows=rows, columns=columns)
    assert not pattern.misfit(shape)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    keep = round(share * scores.numel() / pattern.unit)
    mask = pattern.mask(scores, keep)
    # blocks one by one, for every kernel position
    kept, gone = [], []
    positions = scores.flatten(2).shape[2] if len(shape) > 2 else 1
    for k in range(positions):
        s, m = (t.reshape(*shape[:2], -1)[..., k] for t in (scores, mask))
        for i in range(0, shape[0], rows):
            for j in range(0, shape[1], columns):
                here = (slice(i, i + rows), slice(j, j + columns))
                assert m[here].all() or not m[here].any()
                (kept if m[here].all() else gone).append(float(s[here].double().square().sum()))
    assert len(kept) == keep
    assert min(kept, default=9e9) >= max(gone, default=0.0) - 1e-6


def test_n_of_m_goes_along_input_channels() -> None:
    scores = torch.rand(3, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = parse_pattern("2:4").mask(scores, 0)
    for k in range(6):
        assert torch.equal(mask.flatten(2)[..., k], keep_n_of_m(scores.flatten(2)[..., k], 2, 4))


def test_blocks_of_the_smallest_numbers_can_be_told_apart() -> None:
    mask = parse_pattern("block:1x2").mask(torch.tensor([[1e-36, 1e-36, 3e-36, 0.0]]), 1)
    assert mask.tolist() == [[False, False, True, True]]


def test_shapes_that_do_not_fit() -> None:
    assert "6 input channels are no multiple of 4" in parse_pattern("2:4").misfit((5, 6))
    assert "5 x 6 channels" in parse_pattern("block:2x3").misfit((5, 6))
    assert not parse_pattern("unstructured").misfit((5, 6))


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "half", "", "block:0x4", "block:4"])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(ValueError, match="N:M"):
        parse_pattern(text)
