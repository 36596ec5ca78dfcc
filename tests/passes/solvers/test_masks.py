"""Masks: exact counts against a sort, and the pattern in every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.masks import keep_largest, keep_n_of_m, parse_pattern


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


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "half", ""])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(ValueError, match="N:M"):
        parse_pattern(text)
